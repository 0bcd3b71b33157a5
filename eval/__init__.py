"""What a sample is worth: extractors, metrics, fixed rows, verdicts; sees samples and records only."""
