"""Cells: how one is identified, built, trained, watched, sampled and recorded."""
