"""Does TVM's loss tell how good its samples are, and do more steps help?

arXiv 2511.19797, Theorem 1 and Table 1. Theorem 1 bounds the squared 2-Wasserstein distance of
samples to the data by the loss over all s, up to constants that it does not give. Distilled from a
mixture's exact velocity, at PLACES places of a run, on the training weights: the loss (term A,
Eq. 12, at t = 1 and s uniform, the theorem's integral for one step) and the sliced 2-Wasserstein
distance of one-step samples to the exact flow.

    correlation    1 + their rank correlation over the run: 1 none, 2 perfect
    steps_{1,2,4}  that distance of the finished student with 1, 2, 4 steps, in units of the data
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
ARM = "tvm@x0.1"
PLACES = 12
ROWS = 4096
FINE = 64
DIRECTIONS = 64


def sliced(a: Tensor, b: Tensor) -> float:
    """Sliced 2-Wasserstein distance of a, b [N, 2], over equally spaced directions."""
    angle = torch.arange(DIRECTIONS) * math.pi / DIRECTIONS
    lines = torch.stack([angle.cos(), angle.sin()])
    sorted_a = (a @ lines).sort(0).values
    sorted_b = (b @ lines).sort(0).values
    return float((sorted_a - sorted_b).square().mean().sqrt())


def measure(seed: int) -> dict[str, float]:
    """The rank correlation over the run, and the distance with 1, 2 and 4 steps."""
    run, steps = ready(BENCHMARK, ARM, seed)
    method: Any = run.method
    formulas = sys.modules[type(method).__module__]
    net = method.net
    cond = Condition(None)
    z = Rng(seed, "terminal bound", "z").normal(ROWS, 2)
    other = Rng(seed, "terminal bound", "other").normal(ROWS, 2)
    t = torch.ones(ROWS)
    s = Rng(seed, "terminal bound", "s").uniform(ROWS)

    def teacher(x: Tensor, t: Tensor) -> Tensor:
        return run.task.teacher.velocity(x, t, cond)

    with torch.no_grad():
        exact = heun(teacher, other, FINE)

    @torch.no_grad()
    def place() -> tuple[float, float]:
        """The loss and the distance now."""
        tangents = (torch.zeros_like(z), torch.zeros_like(t), torch.ones_like(s))
        u, du = run.task.jvp(net, (z, t, s), tangents, cond)
        dx_ds = formulas.terminal_velocity(u, du, t, s)
        target = teacher(jump(z, u, t, s), s)
        loss = formulas.terminal_loss(dx_ds, target, t, s, 1.0).mean()
        x = jumps(lambda x, t, s: net(x, t, s=s), z, 1)
        return loss.item(), sliced(x, exact)

    places = []
    for i in range(steps):
        one_step(run, i, steps)
        # 1/PLACES, 2/PLACES, ... of the run have passed.
        if (i + 1) * PLACES // steps > i * PLACES // steps:
            places.append(place())
    ranks = torch.tensor(places).argsort(0).argsort(0).float()
    quantities = {"correlation": 1 + torch.corrcoef(ranks.T)[0, 1].item()}
    with torch.no_grad():
        for n in (1, 2, 4):
            x = method.sample(z, cond, n, Rng(seed, "unused"))
            quantities[f"steps_{n}"] = sliced(x, exact)
    return quantities
