"""Number of steps N and solver in FreeFlow's discrete form.

arXiv 2511.19428, App. A.1, Eq. 14, Figure 9. Where Eq. 14 has no residual the student equals N
steps of the teacher's solver. The paper splits what remains into two errors: that of the solver, of
order 1 (Euler) or 2 (Heun) in 1/N and so smaller with more steps, and that of the network, which it
says accumulates over the steps and so grows with N. All are root mean square distances over noises
at delta = 1, over the spread of exact samples:

    solver   N steps of the teacher, from the exact flow (256 Heun steps): no training
    network  one-step sample of a student trained with Heun slopes on N steps, from those N steps of
             the teacher
    total    the same sample from the exact flow

of students trained by prediction alone and by both objectives, at N = 4 and 32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distillbench.audits import mechanism
from distillbench.cells.build import Run
from distillbench.method import Condition
from distillbench.samplers import euler, heun
from distillbench.seeds import Rng

BENCHMARK = "gaussians-ring"
METHODS = ("freeflow",)
ARMS = {
    ("prediction", 4): "freeflow@prediction-n4@x0.1",
    ("prediction", 32): "freeflow@prediction-n32@x0.1",
    ("both", 4): "freeflow@n4@x0.1",
    ("both", 32): "freeflow@n32@x0.1",
}
COUNT = 4000
FINE = 256
STEPS = (4, 8, 16, 32)


@torch.no_grad()
def solvers(run: Run, z: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The exact samples of z [COUNT, 2], and those of either solver at every N, by name."""

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return run.task.teacher.velocity(x, t, Condition(None))

    solved = {}
    for n in STEPS:
        solved[f"Euler, N {n}"] = euler(velocity, z, n)
    for n in STEPS:
        solved[f"Heun, N {n}"] = heun(velocity, z, n)
    return heun(velocity, z, FINE), solved


def measure(seed: int) -> dict[str, float]:
    """The three errors by solver, objective and N."""
    z = Rng(seed, "discretisation").normal(COUNT, 2)
    students = {key: mechanism.finished(BENCHMARK, arm, seed) for key, arm in ARMS.items()}
    exact, solved = solvers(students["prediction", 4], z)

    def distance(a: Tensor, b: Tensor) -> float:
        return float((a - b).norm() / (exact - exact.mean(0)).norm())

    errors = {f"solver, {name}": distance(x, exact) for name, x in solved.items()}
    for (name, n), run in students.items():
        with torch.no_grad():
            x = run.method.sample(z, Condition(None), 1, Rng(seed, "sample"))
        errors[f"network, {name}, N {n}"] = distance(x, solved[f"Heun, N {n}"])
        errors[f"total, {name}, N {n}"] = distance(x, exact)
    return errors
