"""Data sets by kind: what networks are trained on, and what samples are held against."""
