"""Reports: published records as tables, pictures and pages."""
