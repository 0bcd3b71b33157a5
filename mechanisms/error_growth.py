"""Along the path from noise the student of FreeFlow leaves its teacher.

arXiv 2511.19428, section 4.1, Figure 4. Prediction (Eq. 8) asks the teacher at the point the
student has reached, so an error at a small gap delta is carried to larger ones; correction (Eq. 11)
is to hold the end of the path. The truth is the exact flow phi of the mixture, in 128 Heun steps.
Per objective and delta, each the root mean square over noises, relative to that of the exact
quantity:

    map       student's average velocity U(z, 1, 1-delta) against (z - phi) / delta: the figure's
              curve F
    velocity  the teacher's velocity at the student's point against the one at phi: the figure's
              curve u
    marginal  sliced 2-Wasserstein distance of the student's points at delta = 1 to phi of other
              noises, in units of the data
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distillbench.audits import mechanism
from distillbench.cells.build import Run
from distillbench.method import Condition
from distillbench.paths import average_velocity, jump
from distillbench.samplers import Velocity, heun
from distillbench.seeds import Rng

BENCHMARK = "gaussians-ring"
METHODS = ("freeflow",)
ARMS = {"prediction": "freeflow@prediction-only@x0.1", "both": "freeflow@x0.1"}
DELTAS = (0.25, 0.5, 0.75, 1.0)  # on the grid of Eq. 14, N = 8, where the network is trained
COUNT = 4000
FINE = 128
DIRECTIONS = 64


def relative(a: Tensor, exact: Tensor) -> float:
    """Root mean square of a - exact over that of exact."""
    return float((a - exact).norm() / exact.norm())


def sliced(a: Tensor, b: Tensor) -> float:
    """Sliced 2-Wasserstein distance of a, b [N, 2], over equally spaced directions."""
    angle = torch.arange(DIRECTIONS) * math.pi / DIRECTIONS
    lines = torch.stack([angle.cos(), angle.sin()])
    sorted_a = (a @ lines).sort(0).values
    sorted_b = (b @ lines).sort(0).values
    return float((sorted_a - sorted_b).square().mean().sqrt())


@torch.no_grad()
def errors(run: Run, name: str, z: Tensor, other: Tensor) -> dict[str, float]:
    """The quantities of one student, called `name`, on noises z and `other` [COUNT, 2]."""
    net = run.task.players["student"].averaged()
    cond = Condition(None)
    one = torch.ones(len(z))
    quantities = {}

    def teacher(x: Tensor, t: Tensor) -> Tensor:
        return run.task.teacher.velocity(x, t, cond)

    for delta in DELTAS:
        s = one - delta
        phi = heun(until(teacher, delta), z, FINE)
        u = net(z, one, s=s)
        x = jump(z, u, one, s)
        quantities[f"map, {name}, delta {delta}"] = relative(u, average_velocity(z, phi, one, s))
        quantities[f"velocity, {name}, delta {delta}"] = relative(teacher(x, s), teacher(phi, s))
    quantities[f"marginal, {name}"] = sliced(x, heun(teacher, other, FINE))
    return quantities


def until(velocity: Velocity, delta: float) -> Velocity:
    """The flow of `velocity` from t = 1 to 1-delta, told as from r = 1 to 0."""

    def rest(x: Tensor, r: Tensor) -> Tensor:
        return delta * velocity(x, 1 - delta * (1 - r))

    return rest


def measure(seed: int) -> dict[str, float]:
    """The quantities of both students."""
    z = Rng(seed, "error growth", "z").normal(COUNT, 2)
    other = Rng(seed, "error growth", "other").normal(COUNT, 2)
    quantities: dict[str, float] = {}
    for name, arm in ARMS.items():
        quantities |= errors(mechanism.finished(BENCHMARK, arm, seed), name, z, other)
    return quantities
