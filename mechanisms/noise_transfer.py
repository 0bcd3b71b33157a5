"""A noise that is good for the student is good for its teacher.

FreeFlow, arXiv 2511.19428, section 5.2, Figure 8. Best-of-N: draw N noises, keep the one whose
one-step sample scores best, give that noise to the teacher. The paper's verifier judges images;
here the score is the coordinate of a sample along a direction drawn once a seed. Trajectories are
aligned by prediction (Eq. 9) only, so a student trained by correction (Eq. 11) alone is to transfer
worse. Per student:

    disorder  1 - Spearman's correlation of the scores that student and teacher (32 Heun steps) give
              to one noise
    lost      1 - gain of the teacher's score by the student's choice out of N = 16, over the gain
              by the teacher's own choice

`permuted` is the joint student's scores, each moved to another noise: what a choice at random
gives, near 1 in both. `DMD` is another student that is trained by matching distributions alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distillbench.audits import mechanism
from distillbench.cells.build import Run
from distillbench.method import Condition
from distillbench.samplers import heun
from distillbench.seeds import Rng

BENCHMARK = "gaussians-ring"
METHODS = ("freeflow", "dmd")
ARMS = {
    "both": "freeflow@x0.1",
    "prediction": "freeflow@prediction-only@x0.1",
    "correction": "freeflow@correction-only@x0.1",
    "DMD": "dmd@no-regression@x0.1",
}
N = 16
GROUPS = 1000


def disorder(a: Tensor, b: Tensor) -> float:
    """1 - Spearman's rank correlation of two sets of scores [n]."""
    ranks = torch.stack([x.argsort().argsort().double() for x in (a, b)])
    return 1 - float(torch.corrcoef(ranks)[0, 1])


def lost(student: Tensor, teacher: Tensor) -> float:
    """1 - the transferred gain over the oracle's, scores [n] in groups of N."""
    groups = teacher.view(GROUPS, N)
    choice = student.view(GROUPS, N).argmax(1, keepdim=True)
    gain = groups.gather(1, choice).mean() - groups.mean()
    largest = groups.amax(1).mean() - groups.mean()
    return 1 - float(gain / largest)


@torch.no_grad()
def scored(run: Run, z: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """Scores [n] of what the one-step student and the teacher make of noises z [n, 2]."""
    cond = Condition(None)
    exact = heun(lambda x, t: run.task.teacher.velocity(x, t, cond), z, 32)
    x = run.method.sample(z, cond, 1, Rng(run.cell.seed, "sample"))
    return x @ direction, exact @ direction


def measure(seed: int) -> dict[str, float]:
    """Disorder and loss of every student, and of the joint one's permuted scores."""
    rng = Rng(seed, "noise transfer")
    z = rng.normal(N * GROUPS, 2)
    angle = 2 * math.pi * float(rng.uniform(1))
    shift = 1 + int(rng.integers(1, N * GROUPS - 1))
    direction = torch.tensor([math.cos(angle), math.sin(angle)])
    quantities: dict[str, float] = {}
    for name, arm in ARMS.items():
        score, exact = scored(mechanism.finished(BENCHMARK, arm, seed), z, direction)
        scores = {name: score}
        if name == "both":
            scores["permuted"] = score.roll(shift)
        for who, own in scores.items():
            quantities[f"disorder, {who}"] = disorder(own, exact)
            quantities[f"lost, {who}"] = lost(own, exact)
    return quantities
