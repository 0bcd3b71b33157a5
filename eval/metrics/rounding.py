"""Rounding of published scores."""


def rounded(score: float) -> float:
    """A score with 8 significant digits: more is the noise of BLAS."""
    return float(f"{score:.8g}")
