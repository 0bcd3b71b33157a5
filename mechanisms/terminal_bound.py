"""Does TVM's loss tell how good its samples are, and do more steps help? (arXiv 2511.19797, Theorem 1 and Table 1)

Theorem 1 bounds the squared 2-Wasserstein distance of samples to the data by the loss over all s, up to constants that it does not
give. Distilled from a mixture's exact velocity, at PLACES places of a run, on the training weights: the loss (term A, Eq. 12, at
t = 1 and s uniform, the theorem's integral for one step) and the sliced 2-Wasserstein distance of one-step samples to the exact flow.

    correlation        1 + their rank correlation over the run: 1 none, 2 perfect
    steps_{1,2,4}      that distance of the finished student with 1, 2, 4 steps, in units of the data
"""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch import Tensor

from distillbench.audits.mechanism import ready
from distillbench.cells.steps import one_step
from distillbench.method import Condition
from distillbench.paths import jump
from distillbench.samplers import heun, jumps
from distillbench.seeds import Rng

BENCHMARK = "gaussians-ring"
METHODS = ("tvm",)
ARM, PLACES, ROWS, FINE, DIRECTIONS = "tvm@x0.1", 12, 4096, 64, 64


def sliced(a: Tensor, b: Tensor) -> float:
    """Sliced 2-Wasserstein distance of two sets of points in the plane, over equally spaced directions."""
    angle = torch.arange(DIRECTIONS) * math.pi / DIRECTIONS
    lines = torch.stack([angle.cos(), angle.sin()])
    return float(((a @ lines).sort(0).values - (b @ lines).sort(0).values).square().mean().sqrt())


def measure(seed: int) -> dict[str, float]:
    run, steps = ready(BENCHMARK, ARM, seed)
    method: Any = run.method
    formulas, net, cond = sys.modules[type(method).__module__], method.net, Condition(None)
    z, other = (Rng(seed, "terminal bound", name).normal(ROWS, 2) for name in ("z", "other"))
    t, s = torch.ones(ROWS), Rng(seed, "terminal bound", "s").uniform(ROWS)
    teacher = lambda x, t: run.task.teacher.velocity(x, t, cond)
    with torch.no_grad():
        exact = heun(teacher, other, FINE)

    @torch.no_grad()
    def place() -> tuple[float, float]:
        u, du = run.task.jvp(
            net, (z, t, s), (torch.zeros_like(z), torch.zeros_like(t), torch.ones_like(s)), cond
        )
        a = formulas.terminal_loss(
            formulas.terminal_velocity(u, du, t, s), teacher(jump(z, u, t, s), s), t, s, 1.0
        )
        return a.mean().item(), sliced(jumps(lambda x, t, s: net(x, t, s=s), z, 1), exact)

    found = []
    for i in range(steps):
        one_step(run, i, steps)
        if (
            i + 1
        ) * PLACES // steps > i * PLACES // steps:  # 1/PLACES, 2/PLACES, ... of the run have passed
            found.append(place())
    ranks = torch.tensor(found).argsort(0).argsort(0).float()
    out = {"correlation": 1 + torch.corrcoef(ranks.T)[0, 1].item()}
    with torch.no_grad():
        return out | {
            f"steps_{n}": sliced(method.sample(z, cond, n, Rng(seed, "unused")), exact)
            for n in (1, 2, 4)
        }
