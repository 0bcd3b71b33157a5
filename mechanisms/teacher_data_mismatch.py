"""Data that are not the teacher's samples spoil a student trained on them (FreeFlow, arXiv 2511.19428, section 3.1, Figure 2).

A student of MeanFlow in its distillation form (the paper's Eq. 5) sees the teacher's velocity at noised data x_t; the teacher, fixed,
is the exact flow of all eight modes. As in the figure's left panel the data lose classes: those of 8, 4 and 2 of the modes. FreeFlow
sees no data. Against the exact flow, 64 Heun steps of the teacher:

    samples  sliced 2-Wasserstein distance of one-step samples to exact ones of other noises, in units of the data (the figure has FID)
    map      root mean square distance of one-step samples to the exact ones of the same noises, over that of exact samples of other
             noises, so that 1 is no knowledge of the flow

Guidance alone makes the mismatch as well. With even and odd modes as two classes, `guidance`: sliced 2-Wasserstein distance between
noised data of class 0 at t = 0.25 and what the flow guided to class 0 with weight w makes of noise by then, in units of the data.
Nothing is trained for it; w = 1 is the error of sampling alone.
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
COUNT, DIRECTIONS, T = 4000, 64, 0.25


def restricted(mixture: Mixture, modes: int) -> Mixture:
    """The mixture with every (8 / modes)-th of its modes, their weights in the old proportions."""
    weights = mixture.weights * (
        torch.arange(len(mixture.weights)) % (len(mixture.weights) // modes) == 0
    )
    return dataclasses.replace(mixture, weights=weights / weights.sum())


def student(seed: int, mixture: Mixture) -> Run:
    """MeanFlow's student trained on data of `mixture`; the teacher stays as it is."""
    run, steps = mechanism.ready(BENCHMARK, "meanflow@x0.1", seed)
    run.data = mixture
    for i in range(steps):
        one_step(run, i, steps)
    return run


def sliced(a: Tensor, b: Tensor) -> float:
    """Sliced 2-Wasserstein distance of two sets of points in the plane."""
    angle = torch.arange(DIRECTIONS) * math.pi / DIRECTIONS
    lines = torch.stack([angle.cos(), angle.sin()])
    return float(((a @ lines).sort(0).values - (b @ lines).sort(0).values).square().mean().sqrt())


@torch.no_grad()
def guided_mismatch(mixture: Mixture, w: float, rng: Rng) -> float:
    """Distance of the guided teacher's own states at T to noised data of its class."""
    odd = torch.arange(len(mixture.weights)) % 2
    split = dataclasses.replace(mixture, component_class=odd, classes=2)
    own, weights = torch.zeros(COUNT, dtype=torch.long), mixture.weights * (odd == 0)
    teacher, cond = Teacher(MixtureVelocity(split), 2), Condition(own, w)
    x, _ = dataclasses.replace(split, weights=weights / weights.sum()).draw(rng, COUNT)
    part = lambda y, r: (
        (1 - T) * teacher.velocity(y, T + (1 - T) * r, cond)
    )  # from t = 1 to T, told as from r = 1 to 0
    return sliced(
        heun(part, rng.normal(COUNT, 2), 64),
        noised(x, rng.normal(COUNT, 2), torch.full((COUNT,), T)),
    )


def measure(seed: int) -> dict[str, float]:
    rng, mixture = (
        Rng(seed, "mismatch"),
        kinds.load(mechanism.cell(BENCHMARK, "teacher", seed).benchmark.data),
    )
    assert isinstance(mixture, Mixture)
    runs = {"data-free": mechanism.finished(BENCHMARK, "freeflow@x0.1", seed)}
    runs["data of 8 modes"] = mechanism.finished(BENCHMARK, "meanflow@x0.1", seed)
    runs |= {f"data of {k} modes": student(seed, restricted(mixture, k)) for k in (4, 2)}
    z, other, cond, found = (
        rng.normal(COUNT, 2),
        rng.normal(COUNT, 2),
        Condition(None),
        dict[str, float](),
    )
    exact, again = (
        heun(lambda x, t: runs["data-free"].task.teacher.velocity(x, t, cond), y, 64)
        for y in (z, other)
    )
    for name, run in runs.items():
        with torch.no_grad():
            x = run.method.sample(z, cond, 1, Rng(seed, "sample"))
        found[f"samples, {name}"], found[f"map, {name}"] = (
            sliced(x, again),
            float((x - exact).norm() / (again - exact).norm()),
        )
    return found | {
        f"guidance, w {w}": guided_mismatch(mixture, w, Rng(seed, "guidance", w))
        for w in (1.0, 1.5, 2.0, 3.0)
    }
