"""Metrics: samples in, numbers out; every module whose code decides a number of metrics.json."""
