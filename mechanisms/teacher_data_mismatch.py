"""Data that are not the teacher's samples spoil a student trained on them.

FreeFlow, arXiv 2511.19428, section 3.1, Figure 2. A student of MeanFlow in its distillation form
(the paper's Eq. 5) sees the teacher's velocity at noised data x_t; the teacher, fixed, is the exact
flow of all eight modes. As in the figure's left panel the data lose classes: those of 8, 4 and 2 of
the modes. FreeFlow sees no data. Against the exact flow, 64 Heun steps of the teacher:

    samples  sliced 2-Wasserstein distance of one-step samples to exact ones of other noises, in
             units of the data (the figure has FID)
    map      root mean square distance of one-step samples to the exact ones of the same noises,
             over that of exact samples of other noises, so that 1 is no knowledge of the flow

Guidance alone makes the mismatch as well. With even and odd modes as two classes, `guidance`:
sliced 2-Wasserstein distance between noised data of class 0 at t = 0.25 and what the flow guided to
class 0 with weight w makes of noise by then, in units of the data. Nothing is trained for it; w = 1
is the error of sampling alone.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from distillbench.audits import mechanism
from distillbench.cells.build import Run
from distillbench.cells.steps import one_step
from distillbench.data import kinds
from distillbench.data.mixture import Mixture
from distillbench.method import Condition, Teacher
from distillbench.paths import noised
from distillbench.samplers import heun
from distillbench.seeds import Rng
from distillbench.teachers.exact import MixtureVelocity

BENCHMARK = "gaussians-ring"
METHODS = ("freeflow", "meanflow")
COUNT = 4000
DIRECTIONS = 64
T = 0.25
WEIGHTS = (1.0, 1.5, 2.0, 3.0)


def restricted(mixture: Mixture, modes: int) -> Mixture:
    """The mixture with every (8 / modes)-th of its modes, their weights in the old proportions."""
    every = len(mixture.weights) // modes
    kept = torch.arange(len(mixture.weights)) % every == 0
    weights = mixture.weights * kept
    return dataclasses.replace(mixture, weights=weights / weights.sum())


def student(seed: int, mixture: Mixture) -> Run:
    """MeanFlow's student trained on data of `mixture`; the teacher stays as it is."""
    run, steps = mechanism.ready(BENCHMARK, "meanflow@x0.1", seed)
    run.data = mixture
    for i in range(steps):
        one_step(run, i, steps)
    return run


def sliced(a: Tensor, b: Tensor) -> float:
    """Sliced 2-Wasserstein distance of a, b [N, 2], over equally spaced directions."""
    angle = torch.arange(DIRECTIONS) * math.pi / DIRECTIONS
    lines = torch.stack([angle.cos(), angle.sin()])
    sorted_a = (a @ lines).sort(0).values
    sorted_b = (b @ lines).sort(0).values
    return float((sorted_a - sorted_b).square().mean().sqrt())


@torch.no_grad()
def guided_mismatch(mixture: Mixture, w: float, rng: Rng) -> float:
    """Distance of the guided teacher's own states at T to noised data of its class."""
    odd = torch.arange(len(mixture.weights)) % 2
    split = dataclasses.replace(mixture, component_class=odd, classes=2)
    weights = mixture.weights * (odd == 0)
    even = dataclasses.replace(split, weights=weights / weights.sum())
    teacher = Teacher(MixtureVelocity(split), 2)
    cond = Condition(torch.zeros(COUNT, dtype=torch.long), w)
    x, _ = even.draw(rng, COUNT)

    def part(y: Tensor, r: Tensor) -> Tensor:
        """The flow from t = 1 to T, told as from r = 1 to 0."""
        return (1 - T) * teacher.velocity(y, T + (1 - T) * r, cond)

    states = heun(part, rng.normal(COUNT, 2), 64)
    return sliced(states, noised(x, rng.normal(COUNT, 2), torch.full((COUNT,), T)))


def measure(seed: int) -> dict[str, float]:
    """The three quantities: `samples` and `map` by student, `guidance` by weight."""
    rng = Rng(seed, "mismatch")
    mixture = kinds.load(mechanism.cell(BENCHMARK, "teacher", seed).benchmark.data)
    assert isinstance(mixture, Mixture)
    runs = {
        "data-free": mechanism.finished(BENCHMARK, "freeflow@x0.1", seed),
        "data of 8 modes": mechanism.finished(BENCHMARK, "meanflow@x0.1", seed),
        "data of 4 modes": student(seed, restricted(mixture, 4)),
        "data of 2 modes": student(seed, restricted(mixture, 2)),
    }
    z = rng.normal(COUNT, 2)
    z_other = rng.normal(COUNT, 2)
    cond = Condition(None)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return runs["data-free"].task.teacher.velocity(x, t, cond)

    exact = heun(velocity, z, 64)
    other = heun(velocity, z_other, 64)
    quantities = {}
    for name, run in runs.items():
        with torch.no_grad():
            x = run.method.sample(z, cond, 1, Rng(seed, "sample"))
        quantities[f"samples, {name}"] = sliced(x, other)
        quantities[f"map, {name}"] = float((x - exact).norm() / (other - exact).norm())
    for w in WEIGHTS:
        quantities[f"guidance, w {w}"] = guided_mismatch(mixture, w, Rng(seed, "guidance", w))
    return quantities
