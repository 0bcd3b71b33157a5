"""Isotropic Gaussian mixtures, whose velocity is known exactly (`teachers/exact.py`)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distillbench.config import MixtureData
from distillbench.seeds import Rng

RING_RADIUS = 1.5
IMAGE_SIDE = 4  # pixels


@dataclass(frozen=True)
class Mixture:
    """Means [K, *shape], one sigma, weights [K] that sum to 1, the class of every component [K]."""

    means: Tensor
    sigma: float
    weights: Tensor
    component_class: Tensor | None
    classes: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return tuple(self.means.shape[1:])

    def draw(self, rng: Rng, n: int) -> tuple[Tensor, Tensor | None]:
        """n exact samples [n, *shape] float32 with their classes [n], None where there are none."""
        last = len(self.weights) - 1
        k = torch.searchsorted(self.weights.cumsum(0), rng.uniform(n).cpu()).clamp(max=last)
        x = self.means[k] + self.sigma * rng.normal(n, *self.shape).cpu()
        return x, None if self.component_class is None else self.component_class[k]


def load(spec: MixtureData) -> Mixture:
    """The mixture of a benchmark's layout, sigma and weights."""
    weights = torch.tensor(spec.weights, dtype=torch.float64)
    weights = (weights / weights.sum()).float()
    count = len(spec.weights)
    if spec.layout == "image":
        component_class = torch.arange(count) % 2
        return Mixture(waves(count).float(), spec.sigma, weights, component_class, 2)
    means = ring(count) if spec.layout == "ring" else grid(count)
    return Mixture(means.float(), spec.sigma, weights, None, 0)


def ring(count: int) -> Tensor:
    """Means [count, 2] at equal angles on a circle, float64."""
    angle = torch.arange(count, dtype=torch.float64) * 2 * torch.pi / count
    return RING_RADIUS * torch.stack([angle.cos(), angle.sin()], 1)


def grid(count: int) -> Tensor:
    """Means [count, 2] on a square grid of unit steps around zero, float64; count is a square."""
    side = round(count**0.5)
    axis = torch.arange(side, dtype=torch.float64) - (side - 1) / 2
    return torch.cartesian_prod(axis, axis)


def waves(count: int) -> Tensor:
    """Means [count, 1, 4, 4]: the first of eight plane waves on 4 x 4 pixels, float64."""
    u = torch.arange(IMAGE_SIDE, dtype=torch.float64) * torch.pi / 4
    rows = u[:, None]
    columns = u[None]
    means = []
    for a in (1, 2):
        for b in (0, 1):
            for phase in (0.0, torch.pi):
                means.append(torch.cos(a * rows + b * columns + phase))
    return torch.stack(means)[:count, None]
