"""Data sets by kind: what students and teachers are trained on, and what samples are held against."""
