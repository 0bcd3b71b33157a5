"""Laws of the time t and of pairs (t, s). Every function draws [n] float32 rows from an `Rng`."""

from __future__ import annotations

import torch
from torch import Tensor

from distillbench.seeds import Rng


def uniform(rng: Rng, n: int, low: float = 0.0, high: float = 1.0) -> Tensor:
    """t ~ U(low, high), [n] float32."""
    return low + (high - low) * rng.uniform(n)


def logit_normal(rng: Rng, n: int, mean: float, std: float) -> Tensor:
    """t = sigmoid(N(mean, std^2)), [n] float32 in (0, 1)."""
    return torch.sigmoid(mean + std * rng.normal(n))


def truncated_logit_normal(rng: Rng, n: int, mean: float, std: float, high: Tensor) -> Tensor:
    """sigmoid(N(mean, std^2)) given that it is at most `high` [n] in [0, 1]; [n] float32.

    By the inverse of the distribution function in logit space, in float64.
    """
    share = torch.special.ndtr((torch.logit(high.double()) - mean) / std)
    normal = torch.special.ndtri(rng.uniform(n).double() * share)
    s = torch.sigmoid(mean + std * normal)
    return torch.minimum(s.float(), high)  # rounding may put it above


def off_diagonal(n: int, diagonal: float) -> int:
    """How many of n rows have s < t when a share `diagonal` in [0, 1] of the batch has s = t.

    A fixed count: every batch has the same.
    """
    return n - round(diagonal * n)


def sorted_pair(
    rng: Rng, n: int, mean: float, std: float, diagonal: float
) -> tuple[Tensor, Tensor]:
    """(t, s), each [n] in (0, 1): two logit-normal draws sorted, t >= s; s = t in the last rows.

    The rows with s = t are a share `diagonal` in [0, 1] of the batch. MeanFlow (arXiv 2505.13447,
    section 4.3; the count is fixed as in its official ImageNet code). They keep the larger of the
    two draws, so their t is not a single logit-normal draw.
    """
    a = logit_normal(rng, n, mean, std)
    b = logit_normal(rng, n, mean, std)
    t = torch.maximum(a, b)
    s = torch.minimum(a, b)
    m = off_diagonal(n, diagonal)
    return t, torch.cat([s[:m], t[m:]])


def gap_pair(
    rng: Rng, n: int, mean: float, std: float, s_mean: float, s_std: float
) -> tuple[Tensor, Tensor]:
    """(t, s), each [n] in [0, 1], with t = s + g for a random gap g.

    g ~ logit-normal(mean, std), then s ~ logit-normal(s_mean, s_std) given s <= 1-g. TVM's default
    law (arXiv 2511.19797, official training/loss.py). (1, 0) is approached, never drawn.
    """
    g = logit_normal(rng, n, mean, std)
    s = truncated_logit_normal(rng, n, s_mean, s_std, 1 - g)
    return (s + g).clamp(max=1), s


def truncated_pair(
    rng: Rng, n: int, mean: float, std: float, s_mean: float, s_std: float
) -> tuple[Tensor, Tensor]:
    """(t, s), each [n] in [0, 1]: t ~ logit-normal(mean, std), s given s <= t.

    s ~ logit-normal(s_mean, s_std), truncated. TVM (arXiv 2511.19797), Table 3, `trunc`; not in the
    official code.
    """
    t = logit_normal(rng, n, mean, std)
    return t, truncated_logit_normal(rng, n, s_mean, s_std, t)


def clamped_pair(
    rng: Rng, n: int, mean: float, std: float, s_mean: float, s_std: float
) -> tuple[Tensor, Tensor]:
    """(t, s), each [n] in (0, 1): t ~ logit-normal(mean, std), s clamped at t.

    s = min(logit-normal(s_mean, s_std), t), so that many rows have s = t. TVM (arXiv 2511.19797),
    Table 3, `clamp`; not in the official code.
    """
    t = logit_normal(rng, n, mean, std)
    return t, torch.minimum(logit_normal(rng, n, s_mean, s_std), t)
