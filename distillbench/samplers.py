"""Samplers from noise at t=1 to data at t=0.

Euler and Heun for velocities, jumps for flow maps, re-noising for denoisers. `velocity(x, t)`,
`denoise(x, t)` and `average(x, t, s)` take x [B, ...] and times [B]; every sampler returns
[B, ...] of the dtype of its noise.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from distillbench.paths import jump, noised, over
from distillbench.seeds import Rng

if TYPE_CHECKING:
    from distillbench.method import Step

Velocity = Callable[[Tensor, Tensor], Tensor]


def grid(steps: int, like: Tensor) -> list[Tensor]:
    """steps+1 uniform times from 1 to 0, each [B] for `like` [B, ...], of its dtype."""
    rows = (like.shape[0],)
    return [like.new_full(rows, 1 - i / steps) for i in range(steps + 1)]


def euler(velocity: Velocity, noise: Tensor, steps: int) -> Tensor:
    """Euler's method on dx/dt = v from `noise` [B, ...]; `steps` evaluations."""
    x = noise
    for t, s in pairwise(grid(steps, noise)):
        x = x - over(t - s, x) * velocity(x, t)
    return x


def heun_slope(velocity: Velocity, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Heun's slope [B, ...] from t [B] to s [B]; 2 evaluations.

    It is the mean of the velocities at x [B, ...] and at Euler's prediction of the end.
    """
    v = velocity(x, t)
    return 0.5 * (v + velocity(x - over(t - s, x) * v, s))


def heun(velocity: Velocity, noise: Tensor, steps: int) -> Tensor:
    """Heun's second-order method from `noise` [B, ...]; 2 x `steps` evaluations.

    The straight path has no singularity at t=0, so the last step is like the others.
    """
    x = noise
    for t, s in pairwise(grid(steps, noise)):
        x = x - over(t - s, x) * heun_slope(velocity, x, t, s)
    return x


def jumps(
    average: Callable[[Tensor, Tensor, Tensor], Tensor],
    noise: Tensor,
    steps: int,
    done: int | None = None,
) -> Tensor:
    """x <- x - (t-s) u(x, t, s) along a uniform grid, from `noise` [B, ...].

    MeanFlow (arXiv 2505.13447, Eq. 12); `steps` evaluations, or only the first `done` of them.
    """
    x = noise
    intervals = list(pairwise(grid(steps, noise)))
    for t, s in intervals[:done]:
        x = jump(x, average(x, t, s), t, s)
    return x


def renoising(
    denoise: Velocity,
    noise: Tensor,
    steps: int,
    fresh: Callable[[], Tensor],
    done: int | None = None,
    start: float = 1.0,
) -> Tensor:
    """The last x0 [B, ...] of x0 = denoise(x_t, t), x_t' = (1-t') x0 + t' e with fresh e.

    Over t = start, start (1 - 1/steps), ...; the first x_t is start times `noise` [B, ...], and
    `fresh()` draws e like x. Stochastic sampling of DMD2 (arXiv 2405.14867, section 4.4), ADD and
    consistency models; `steps` evaluations, or only the first `done` of them.
    """
    starts = grid(steps, noise)[:-1]
    times = [start * t for t in starts[:done]]
    x = denoise(start * noise, times[0])
    for t in times[1:]:
        x = denoise(noised(x, fresh(), t), t)
    return x


def simulated_input(
    denoise: Velocity,
    noise: Tensor,
    steps: int,
    k: int,
    fresh: Callable[[], Tensor],
    start: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """(x_t [B, ...], t [B]) that the k-th of `steps` evaluations of `renoising` would see.

    k = 0 gives (start noise, start); k evaluations, without gradient. Backward simulation (DMD2,
    arXiv 2405.14867, section 4.5): the student is trained on its own intermediate samples, not on
    noised data.
    """
    t = start * grid(steps, noise)[k]
    if k == 0:
        return start * noise, t
    with torch.no_grad():
        x0 = renoising(denoise, noise, steps, fresh, done=k, start=start)
        return noised(x0, fresh(), t), t


def drawn_step(step: Step, steps: int, every: int) -> int:
    """k in 0..steps-1 of `simulated_input`, uniform, one for the whole batch on every rank.

    DMD2 (arXiv 2405.14867), section 4.5. Over `steps * every` train steps the student's turns see
    each k once, in random order, and so do the steps of every other place between two turns:
    simulated steps are paid for, so that independent draws would give cells of unequal cost.
    """
    block, i = divmod(step.index, steps * every)
    turn, place = divmod(i, every)
    order = Rng(step.seed, "k", block, place)  # not `step.rng`: equal on all ranks
    return int(order.uniform(steps).argsort()[turn])


@torch.no_grad()
def in_batches(
    sample: Callable[[Tensor, Tensor | None], Tensor],
    noise: Tensor,
    labels: Tensor | None,
    batch: int,
) -> Tensor:
    """`sample(noise, labels)` [N, ...] over rows in batches of `batch`, without gradient.

    noise: [N, ...]; labels: [N] int64, or None.
    """
    parts = []
    for i in range(0, len(noise), batch):
        rows = slice(i, i + batch)
        own = None if labels is None else labels[rows]
        parts.append(sample(noise[rows], own))
    return torch.cat(parts)
