"""AlphaFlow's reading of MeanFlow (arXiv 2510.20771): do the parts of its loss pull apart?

Up to a constant, |u - sg(v - (t-s) du/dt)|^2 = L_TFM + L_TC (section 3): trajectory flow matching
L_TFM = |u - v|^2 and trajectory consistency L_TC = 2 (t-s) <u, sg(du/dt)>. Figure 6 and App. E:
over training the cosine of their gradients is negative, mostly below -0.4; that of L_FM' = L_TFM at
s = t with L_TC is higher, which is why rows with s = t help.

Measured at POINTS places of a run of UPDATES updates, on the training weights: the mean over
BATCHES batches of ROWS rows with s < t of the cosine of two gradients on the same rows. All
quantities are 1 - cosine: 1 no correlation, 2 opposite.

    tfm_tc            L_TFM with L_TC, from scratch, mean over the places
    tfm_tc_smallest   the same at the place where they conflict least
    fm_tc             L_FM' with L_TC, from scratch, mean over the places
    distilled_tfm_tc  L_TFM with L_TC where a teacher's velocity is v, mean over the places
"""

from __future__ import annotations

from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from distillbench import times
from distillbench.audits.mechanism import ready
from distillbench.cells.build import Run
from distillbench.cells.steps import one_step
from distillbench.method import Condition
from distillbench.paths import noised
from distillbench.seeds import Rng

BENCHMARK = "gaussians-ring"
METHODS = ("meanflow",)
UPDATES = 400
POINTS = 5
BATCHES = 8
ROWS = 128


def terms(run: Run, rng: Rng) -> dict[str, Tensor]:
    """The three parts of the loss on one batch of pairs s < t, each a scalar with its graph.

    Pairs are of the run's own law.
    """
    method: Any = run.method
    c = method.config
    net = run.task.players["student"].networks[0]
    cond = Condition(None)
    x, _ = run.data.draw(rng, ROWS)
    t, s = times.sorted_pair(rng, ROWS, c.time_mean, c.time_std, diagonal=0)
    e = rng.normal(*x.shape)
    x_t = noised(x, e, t)
    v = e - x if c.velocity == "data" else run.task.teacher.velocity(x_t, t, cond)
    tangents = (v, torch.ones_like(t), torch.zeros_like(s))
    u, du = run.task.jvp(net, (x_t, t, s), tangents, cond)  # du/dt, no gradient
    return {
        "tfm": (u - v).square().sum(1).mean(),
        "tc": (2 * (t - s) * (u * du).sum(1)).mean(),
        "fm": (net(x_t, t, s=t) - v).square().sum(1).mean(),
    }


def conflicts(run: Run, rng: Rng) -> dict[str, float]:
    """1 - cosine of the gradients of every two parts, mean over batches, as `tfm_tc`."""
    parameters = run.task.players["student"].parameters
    total = dict.fromkeys(("tfm_tc", "tfm_fm", "tc_fm"), 0.0)
    for _ in range(BATCHES):
        gradients = {}
        for name, loss in terms(run, rng).items():
            parts = torch.autograd.grad(
                loss, parameters, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            gradients[name] = torch.cat([g.flatten() for g in parts]).double()
        for a, b in combinations(gradients, 2):
            cosine = torch.cosine_similarity(gradients[a], gradients[b], 0).item()
            total[f"{a}_{b}"] += (1 - cosine) / BATCHES
    return total


def along(arm: str, seed: int) -> list[dict[str, float]]:
    """The conflicts after 1/POINTS, 2/POINTS, ... of a run."""
    run, _ = ready(BENCHMARK, arm, seed)
    places = []
    run.task.players["student"].total_updates = UPDATES
    for i in range(UPDATES):
        one_step(run, i, UPDATES)
        if (i + 1) % (UPDATES // POINTS) == 0:
            places.append(conflicts(run, Rng(seed, "term cosine", arm, i)))
    return places


def mean(places: list[dict[str, float]], name: str) -> float:
    """Mean of one conflict over the places of a run."""
    return sum(place[name] for place in places) / POINTS


def measure(seed: int) -> dict[str, float]:
    """The four quantities, each 1 - cosine."""
    scratch = along("meanflow@scratch", seed)
    distilled = along("meanflow", seed)
    return {
        "tfm_tc": mean(scratch, "tfm_tc"),
        "tfm_tc_smallest": min(place["tfm_tc"] for place in scratch),
        "fm_tc": mean(scratch, "tc_fm"),
        "distilled_tfm_tc": mean(distilled, "tfm_tc"),
    }
