"""The audit: from published records to verdicts, and the page that shows their evidence."""
