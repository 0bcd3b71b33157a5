"""Data sets and their splits. Images are float32 [N, C, H, W] in [-1, 1]; mixtures are drawn, not stored."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distillbench.config import DigitsData, MixtureData
from distillbench.seeds import Rng


@dataclass(frozen=True)
class Images:
    """A labelled image set: `train` for teacher and students, `reference` for evaluation only."""

    train: Tensor
    train_labels: Tensor
    reference: Tensor
    reference_labels: Tensor
    classes: int

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.train.shape[1:])

    def draw(self, rng: Rng, n: int) -> tuple[Tensor, Tensor]:
        """n training images with labels, with replacement."""
        index = rng.integers(n, len(self.train)).cpu()
        return self.train[index], self.train_labels[index]


@dataclass(frozen=True)
class Mixture:
    """Isotropic Gaussian mixture: means [K, *shape], one sigma, weights [K], the class of every component [K]."""

    means: Tensor
    sigma: float
    weights: Tensor
    component_class: Tensor | None
    classes: int

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.means.shape[1:])

    def draw(self, rng: Rng, n: int) -> tuple[Tensor, Tensor | None]:
        """n exact samples with their classes (None where there are none)."""
        k = torch.searchsorted(self.weights.cumsum(0), rng.uniform(n).cpu()).clamp(max=len(self.weights) - 1)
        x = self.means[k] + self.sigma * rng.normal(n, *self.shape).cpu()
        return x, None if self.component_class is None else self.component_class[k]


def alternate(labels: np.ndarray) -> np.ndarray:
    """[N] bool: within every class, by index, the 1st, 3rd, ... occurrence. Writers alternate, so both halves are alike."""
    first = np.zeros(len(labels), bool)
    for c in np.unique(labels):
        first[np.flatnonzero(labels == c)[::2]] = True
    return first


def load(spec: DigitsData | MixtureData) -> Images | Mixture:
    """The data set a benchmark names."""
    return _digits(spec.inner) if isinstance(spec, DigitsData) else _mixture(spec)


def _digits(inner: bool) -> Images:
    from sklearn.datasets import load_digits

    raw = load_digits()
    images = torch.from_numpy(raw.images / 8 - 1).float()[:, None]  # 0..16 -> [-1, 1]
    labels = torch.from_numpy(raw.target).long()
    train = alternate(raw.target)
    reference = ~train
    if inner:  # the training half takes the place of the whole; the other half is not looked at
        half = np.flatnonzero(train)
        first = alternate(raw.target[half])
        train, reference = half[first], half[~first]
    return Images(images[train], labels[train], images[reference], labels[reference], 10)


def _mixture(spec: MixtureData) -> Mixture:
    weights = torch.tensor(spec.weights, dtype=torch.float64)
    weights = (weights / weights.sum()).float()
    k = len(spec.weights)
    if spec.layout == "ring":
        angle = torch.arange(k, dtype=torch.float64) * 2 * torch.pi / k
        means, component_class = 1.5 * torch.stack([angle.cos(), angle.sin()], 1), None
    elif spec.layout == "grid":
        side = round(k**0.5)
        axis = torch.arange(side, dtype=torch.float64) - (side - 1) / 2
        means, component_class = torch.cartesian_prod(axis, axis), None
    else:  # patterns of plane waves on 4 x 4 pixels, classes taken in turn
        u = torch.arange(4, dtype=torch.float64) * torch.pi / 4
        waves = [torch.cos(a * u[:, None] + b * u[None] + p) for a in (1, 2) for b in (0, 1) for p in (0.0, torch.pi)]
        means, component_class = torch.stack(waves)[:k, None], torch.arange(k) % 2
    return Mixture(means.float(), spec.sigma, weights, component_class, 0 if component_class is None else 2)


def to_bytes(x: Tensor) -> Tensor:
    """[-1, 1] float -> uint8 0..255, rounded and clipped: what is stored and evaluated."""
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
