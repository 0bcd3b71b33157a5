"""The data set that a benchmark names by its kind."""

from __future__ import annotations

from distillbench.config import DigitsData, MixtureData
from distillbench.data import digits, mixture
from distillbench.data.images import Images
from distillbench.data.mixture import Mixture


def load(spec: DigitsData | MixtureData) -> Images | Mixture:
    """The data set of a benchmark's `data`."""
    return digits.load(spec) if isinstance(spec, DigitsData) else mixture.load(spec)
