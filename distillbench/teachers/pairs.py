"""Regression pairs: noise and the teacher's own sample (DMD, arXiv 2311.18828, section 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor

from distillbench.method import Condition, Pairs, Teacher
from distillbench.samplers import heun, in_batches
from distillbench.seeds import Rng

BATCH = 512  # rows that the teacher is sampled at a time


@torch.no_grad()
def make_pairs(
    teacher: Teacher,
    pairs: Pairs,
    shape: tuple[int, ...],
    classes: int,
    guidance: float,
    rng: Rng,
) -> dict[str, Tensor]:
    """{"z": noise, "y": the teacher's deterministic ODE sample from z, "labels": in turn}.

    z, y: [pairs.count, *shape] float32; labels: int64 [pairs.count], left out without classes.
    """
    z = rng.normal(pairs.count, *shape)
    labels = torch.arange(pairs.count, device=z.device) % classes if classes else None

    def solve(noise: Tensor, own: Tensor | None) -> Tensor:
        cond = Condition(own, guidance)
        return heun(lambda x, t: teacher.velocity(x, t, cond), noise, pairs.heun_steps)

    made = {"z": z, "y": in_batches(solve, z, labels, BATCH)}
    if labels is not None:
        made["labels"] = labels
    return made
