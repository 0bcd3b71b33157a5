"""Audits: what claims ask, what answers them, and the proof that they were frozen first."""
