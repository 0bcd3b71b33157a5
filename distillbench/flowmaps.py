"""Losses of average velocities u(x_t, t, s) that several flow-map methods use."""

from __future__ import annotations

from torch import Tensor

from distillbench.paths import over


def meanflow_target(v: Tensor, du: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """u_tgt = sg(v - (t-s) du/dt), MeanFlow (arXiv 2505.13447) Eq. 10-11. v, du: [B, ...]; t, s: [B]; detached, like v."""
    return (v - over(t - s, v) * du).detach()


def adaptive_loss(u: Tensor, target: Tensor, p: float, c: float) -> Tensor:
    """Mean over the batch of L / sg(L + c)^p with L = sum of (u - target)^2 over a sample's elements, MeanFlow Eq. 22.

    u, target: [B, ...]; p >= 0 (0: plain squared error), c > 0. The sum matters: a mean would change c by its size.
    """
    squared = (u - target).square().flatten(1).sum(1)
    return (squared / (squared + c).detach().pow(p)).mean()
