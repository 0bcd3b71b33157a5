"""What the derivative costs: FLOPs of one update, over those of flow matching.

Network and batch are the same. MeanFlow (arXiv 2505.13447, section 4.1 and App. B.4) puts it below
20 % of an update's time, with 25 % of the rows at s < t. TVM (arXiv 2511.19797, Figure 10)
differentiates through its derivative, and reports 0.95 s an update, 0.69 s with the derivative
detached and 0.81 s for MeanFlow. Operations are counted, not timed, so that the numbers repeat:
matrix products, as budgets count them.

    meanflow          from scratch, tangent on 25 % of the rows
    meanflow_all      from scratch, tangent on every row
    distilled         MeanFlow with a teacher, tangent on every row
    tvm               with a teacher
    tvm_detached      with a teacher, no gradient through du/ds
    tvm_scratch       the paper's own objective
"""

from __future__ import annotations

from distillbench.audits.mechanism import ready
from distillbench.cells.build import Run
from distillbench.cells.steps import batch_of, one_step
from distillbench.method import Step
from distillbench.paths import noised

BENCHMARK = "gaussians-ring"
METHODS = ("meanflow", "tvm")
ARMS = {
    "meanflow": "meanflow@scratch",
    "meanflow_all": "meanflow@scratch-diagonal-0",
    "distilled": "meanflow@diagonal-0",
    "tvm": "tvm",
    "tvm_detached": "tvm@detached-jvp",
    "tvm_scratch": "tvm@scratch",
}


def flow_matching(run: Run, steps: int) -> None:
    """One update on |u(x_t, t, t) - (e - x)|^2."""
    step = Step(1, steps, run.cell.seed, run.device)
    player = run.task.players["student"]
    x = batch_of(run, step).x
    assert x is not None
    e = step.rng("e").normal(*x.shape)
    t = step.rng("t").uniform(len(x))
    u = player.networks[0](noised(x, e, t), t, s=t)
    player.update((u - (e - x)).square().mean())


def measure(seed: int) -> dict[str, float]:
    """FLOPs of every arm's update in units of flow matching's."""
    ratios = {}
    for name, arm in ARMS.items():
        run, steps = ready(BENCHMARK, arm, seed)
        with run.meter.measured():
            one_step(run, 0, steps)
        own = run.meter.flops
        with run.meter.measured():
            flow_matching(run, steps)
        ratios[name] = own / (run.meter.flops - own)
    return ratios
