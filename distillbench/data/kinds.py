"""The data set that a benchmark names by its kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from distillbench.config import DigitsData, MixtureData
from distillbench.data import digits, mixture
from distillbench.data.images import Images
from distillbench.data.mixture import Mixture

LOADERS: dict[str, Callable[[Any], Images | Mixture]] = {
    "digits": digits.load,
    "mixture": mixture.load,
}


def load(spec: DigitsData | MixtureData) -> Images | Mixture:
    """The data set of a benchmark's `data`."""
    return LOADERS[spec.kind](spec)
