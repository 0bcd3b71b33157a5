"""Correction alone loses diversity as it goes on training (FreeFlow, arXiv 2511.19428).

Section 5.2, Figure 7, App. A.3. Students trained by Eq. 11 alone and by both objectives, at the
paper's constant rates (Table 6), are looked at after 40 % and at the end of their budget, by the
weight average that is sampled. On one set of exact points and one of noises:

    missed  1 - coverage (Naeem et al. 2020): share of the exact points with no sample within their
            distance to the 5 nearest exact points
    uneven  total variation in [0, 1] between the shares of samples nearest to each mode and the
            modes' weights

A loss of modes raises both, a loss of variety within them the first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distillbench.audits import mechanism
from distillbench.cells.build import Run
from distillbench.cells.steps import one_step
from distillbench.data.mixture import Mixture
from distillbench.method import Condition
from distillbench.seeds import Rng

BENCHMARK = "gaussians-ring"
METHODS = ("freeflow",)
ARMS = {"correction": "freeflow@correction-only@x0.15", "both": "freeflow@x0.15"}
EARLY = 0.4
COUNT = 2000
NEIGHBOURS = 5


def missed(samples: Tensor, exact: Tensor) -> float:
    """1 - coverage of `exact` by `samples`, [n, 2] each."""
    among = torch.cdist(exact, exact)
    radius = among.kthvalue(NEIGHBOURS + 1, dim=1).values  # the nearest is the point itself
    nearest = torch.cdist(exact, samples).amin(1)
    return float((nearest > radius).double().mean())


def uneven(samples: Tensor, mixture: Mixture) -> float:
    """Total variation of the samples' [n, 2] shares of modes from the weights."""
    modes = torch.cdist(samples, mixture.means).argmin(1)
    counts = torch.bincount(modes, minlength=len(mixture.means))
    shares = counts / len(samples)
    return float((shares - mixture.weights).abs().sum() / 2)


@torch.no_grad()
def diversity(run: Run, z: Tensor, name: str) -> dict[str, float]:
    """Both quantities of a student as it is now, on noises z [COUNT, 2]."""
    assert isinstance(run.data, Mixture)
    exact, _ = run.data.draw(Rng(run.cell.seed, "recall", "exact"), COUNT)
    x = run.method.sample(z, Condition(None), 1, Rng(run.cell.seed, "sample"))
    return {f"missed, {name}": missed(x, exact), f"uneven, {name}": uneven(x, run.data)}


def measure(seed: int) -> dict[str, float]:
    """Both quantities of both students, early and late."""
    z = Rng(seed, "recall", "noise").normal(COUNT, 2)
    quantities: dict[str, float] = {}
    for name, arm in ARMS.items():
        run, steps = mechanism.ready(BENCHMARK, arm, seed)
        for player in run.task.players.values():
            player.config = player.config.model_copy(update={"final_lr": 1.0})
        for i in range(steps):
            if i == round(EARLY * steps):
                quantities |= diversity(run, z, f"{name}, early")
            one_step(run, i, steps)
        quantities |= diversity(run, z, f"{name}, late")
    return quantities
