"""Laws of the time t and of pairs (t, s). Every function draws [n] float32 rows from an `Rng`."""

from __future__ import annotations

import torch
from torch import Tensor

from distillbench.seeds import Rng


def uniform(rng: Rng, n: int, low: float = 0.0, high: float = 1.0) -> Tensor:
    """t ~ U(low, high)."""
    return low + (high - low) * rng.uniform(n)


def logit_normal(rng: Rng, n: int, mean: float, std: float) -> Tensor:
    """t = sigmoid(N(mean, std^2)), in (0, 1)."""
    return torch.sigmoid(mean + std * rng.normal(n))


def off_diagonal(n: int, diagonal: float) -> int:
    """How many of n rows have s < t when a share `diagonal` in [0, 1] of the batch has s = t (a fixed count)."""
    return n - round(diagonal * n)


def sorted_pair(rng: Rng, n: int, mean: float, std: float, diagonal: float) -> tuple[Tensor, Tensor]:
    """(t, s) = sorted pair of logit-normal draws with t >= s; the last rows, a share `diagonal`, have s = t.

    MeanFlow (arXiv 2505.13447, section 4.3; the count is fixed as in its official ImageNet code). The diagonal rows
    keep the larger of the two draws, so their t is not a single logit-normal draw.
    """
    a, b = logit_normal(rng, n, mean, std), logit_normal(rng, n, mean, std)
    t, s = torch.maximum(a, b), torch.minimum(a, b)
    m = off_diagonal(n, diagonal)
    return t, torch.cat([s[:m], t[m:]])
