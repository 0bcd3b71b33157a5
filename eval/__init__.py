"""Worth of samples: extractors, metrics, fixed rows, verdicts. Sees samples and records only."""
