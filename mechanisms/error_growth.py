"""Along the path from noise the student of FreeFlow leaves its teacher (arXiv 2511.19428, section 4.1, Figure 4).

Prediction (Eq. 8) asks the teacher at the point the student has reached, so an error at a small gap delta is carried to larger
ones; correction (Eq. 11) is to hold the end of the path. The truth is the exact flow phi of the mixture, in 128 Heun steps.
Per objective and delta, each the root mean square over noises, relative to that of the exact quantity:

    map       student's average velocity U(z, 1, 1-delta) against (z - phi) / delta: the figure's curve F
    velocity  the teacher's velocity at the student's point against the one at phi: the figure's curve u
    marginal  sliced 2-Wasserstein distance of the student's points at delta = 1 to phi of other noises, in units of the data
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distillbench.audits import mechanism
from distillbench.cells.build import Run
from distillbench.method import Condition
from distillbench.paths import average_velocity, jump
from distillbench.samplers import heun
from distillbench.seeds import Rng

BENCHMARK = "gaussians-ring"
METHODS = ("freeflow",)
ARMS = {"prediction": "freeflow@prediction-only@x0.1", "both": "freeflow@x0.1"}
DELTAS = (0.25, 0.5, 0.75, 1.0)  # on the grid of Eq. 14, N = 8, where the network is trained
COUNT, FINE, DIRECTIONS = 4000, 128, 64


def relative(a: Tensor, exact: Tensor) -> float:
    """Root mean square of a - exact over that of exact."""
    return float((a - exact).norm() / exact.norm())


def sliced(a: Tensor, b: Tensor) -> float:
    """Sliced 2-Wasserstein distance of two sets of points in the plane, over equally spaced directions."""
    angle = torch.arange(DIRECTIONS) * math.pi / DIRECTIONS
    lines = torch.stack([angle.cos(), angle.sin()])
    return float(((a @ lines).sort(0).values - (b @ lines).sort(0).values).square().mean().sqrt())


@torch.no_grad()
def errors(run: Run, name: str, z: Tensor, other: Tensor) -> dict[str, float]:
    """The quantities of one student, called `name`."""
    net, cond, one, found = (
        run.task.players["student"].averaged(),
        Condition(None),
        torch.ones(len(z)),
        dict[str, float](),
    )
    teacher = lambda x, t: run.task.teacher.velocity(x, t, cond)
    for delta in DELTAS:
        rest = lambda x, r, delta=delta: (
            delta * teacher(x, 1 - delta * (1 - r))
        )  # from t = 1 to 1-delta, told as from r = 1 to 0
        s, phi = one - delta, heun(rest, z, FINE)
        u = net(z, one, s=s)
        x = jump(z, u, one, s)
        found[f"map, {name}, delta {delta}"] = relative(u, average_velocity(z, phi, one, s))
        found[f"velocity, {name}, delta {delta}"] = relative(teacher(x, s), teacher(phi, s))
    return found | {f"marginal, {name}": sliced(x, heun(teacher, other, FINE))}


def measure(seed: int) -> dict[str, float]:
    z, other = (Rng(seed, "error growth", name).normal(COUNT, 2) for name in ("z", "other"))
    found: dict[str, float] = {}
    for name, arm in ARMS.items():
        found |= errors(mechanism.finished(BENCHMARK, arm, seed), name, z, other)
    return found
