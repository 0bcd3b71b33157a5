"""Losses of average velocities u(x_t, t, s) that several flow-map methods use."""

from __future__ import annotations

from torch import Tensor

from distillbench.paths import over


def meanflow_target(v: Tensor, du: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """u_tgt = sg(v - (t-s) du/dt), [B, ...], detached.

    v, du: [B, ...]; t, s: [B] with s <= t. MeanFlow (arXiv 2505.13447), Eq. 10-11.
    """
    return (v - over(t - s, v) * du).detach()


def adaptive_loss(u: Tensor, target: Tensor, p: float, c: float) -> Tensor:
    """Mean over the batch of L / sg(L + c)^p, L the sum of (u - target)^2 of a sample; a scalar.

    u, target: [B, ...]; p >= 0 (0: plain squared error), c > 0. The sum over a sample's elements
    matters: a mean would change c by their number. MeanFlow (arXiv 2505.13447), Eq. 22.
    """
    squared = (u - target).square().flatten(1).sum(1)
    return (squared / (squared + c).detach().pow(p)).mean()
