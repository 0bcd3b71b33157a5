"""Feature extractors: their networks, their weights, and the scripts that trained them."""
