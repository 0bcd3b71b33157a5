"""What the first step of a student of DP-DMD hands on to the others.

arXiv 2602.03139, Figure 5, Eq. 7, Algorithm 1. The first step is to keep different noises apart: it
alone learns the teacher's secant, and the gradient of matching is cut before it. Steps share their
weights, so the others can move it all the same; and where it ends need not be where the teacher's
path is at that time, the mismatch that a review of the paper asks about. From v_1 = v(z, 1) of the
student, with t_1 = 3/4, per arm:

    spread     root mean square distance of the predicted images z - v_1 from their mean, averaged
               over CHECKS points of training, in units of the data
    moved      root mean square change of v_1 since the beginning of training, where the student is
               the teacher, at the end
    mismatch   sliced 2-Wasserstein distance of the states z - (1 - t_1) v_1 at the end from noised
               data at t_1

Arms: `both` is DP-DMD, `anchor` is it without the cut, `cut` without the anchor, `neither` DMD with
as many steps.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from distillbench.audits import mechanism
from distillbench.cells.steps import one_step
from distillbench.data.mixture import Mixture
from distillbench.paths import denoiser, jump, noised
from distillbench.seeds import Rng

BENCHMARK = "gaussians-ring"
METHODS = ("dp_dmd",)
ARMS = {
    "both": "dp_dmd@x0.08",
    "anchor": "dp_dmd@no-detach@x0.08",
    "cut": "dp_dmd@detach-only@x0.08",
    "neither": "dp_dmd@plain@x0.08",
}
COUNT = 4000
CHECKS = 10
DIRECTIONS = 64


def rms(a: Tensor) -> float:
    """Root mean square length of the rows of a [N, D]."""
    return float(a.square().sum(1).mean().sqrt())


def sliced(a: Tensor, b: Tensor) -> float:
    """Sliced 2-Wasserstein distance of a, b [N, 2], over equally spaced directions."""
    angle = torch.arange(DIRECTIONS) * math.pi / DIRECTIONS
    lines = torch.stack([angle.cos(), angle.sin()])
    sorted_a = (a @ lines).sort(0).values
    sorted_b = (b @ lines).sort(0).values
    return float((sorted_a - sorted_b).square().mean().sqrt())


def followed(arm: str, seed: int, z: Tensor) -> tuple[float, float, float]:
    """Train an arm; its spread, moved and mismatch on noises z [COUNT, 2]."""
    run, steps = mechanism.ready(BENCHMARK, arm, seed)
    assert isinstance(run.data, Mixture)
    method: Any = run.method
    one = torch.ones(len(z))
    rng = Rng(seed, "first step", "data")
    end = one - 1 / method.config.steps  # t_1
    with torch.no_grad():
        start = method.net(z, one)
    v = start
    spreads = []
    for i in range(steps):
        one_step(run, i, steps)
        if (i + 1) * CHECKS // steps > i * CHECKS // steps:  # the last of them at the end
            with torch.no_grad():
                v = method.net(z, one)
            x0 = denoiser(z, v, one)
            spreads.append(rms(x0 - x0.mean(0)))
    x, _ = run.data.draw(rng, len(z))
    expected = noised(x, rng.normal(len(z), 2), end)
    spread = sum(spreads) / len(spreads)
    return spread, rms(v - start), sliced(jump(z, v, one, end), expected)


def measure(seed: int) -> dict[str, float]:
    """The three quantities of every arm."""
    z = Rng(seed, "first step", "z").normal(COUNT, 2)
    quantities: dict[str, float] = {}
    for name, arm in ARMS.items():
        spread, moved, mismatch = followed(arm, seed, z)
        quantities[f"spread, {name}"] = spread
        quantities[f"moved, {name}"] = moved
        quantities[f"mismatch, {name}"] = mismatch
    return quantities
