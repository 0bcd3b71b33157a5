"""What matching costs with a fake network and without one (FSF-DMD, arXiv 2605.19256, abstract: an auxiliary network to hold and update).

Every arm is built as it is trained and moved through one cycle of its updates, on batches of one size and with two steps in the
simulation; nothing here is a time. Per arm:

    memory   MB of the weights that its players move and of their optimisers' moments; without gradients, averages, activations
             and the frozen teacher, which all arms have
    flops    GFLOP by the meter for one update of the student, with those of the fake network that come between two of them

`Eq. 12` is FSF-DMD, `explicit fake` the same with a critic and five of its updates to one, `DMD2` is DMD2 without its classifier, as
a flow model is distilled by it, and `flow map` the flow-map loss alone, which the first two contain.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from distillbench import config
from distillbench.audits import mechanism
from distillbench.cells.build import Run, build
from distillbench.cells.cell import Cell
from distillbench.cells.steps import one_step
from distillbench.registry import folders

BENCHMARK = "gaussians-ring"
METHODS = ("fsf_dmd", "dmd2", "meanflow")
BATCH, SHARE = 256, "x0.1"
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "Eq. 12": ("fsf_dmd", {}),
    "explicit fake": ("fsf_dmd@explicit-fake", {}),
    "DMD2": ("dmd2@no-gan", {"steps": 2, "input_time": 1.0}),
    "flow map": ("fsf_dmd@flow-map-only", {}),
}


def moved(arm: str, changes: dict[str, Any], seed: int) -> Run:
    """An arm after one cycle of updates, which was metered."""
    wanted = Cell(
        config.benchmark(BENCHMARK),
        replace(folders.arm(f"{arm}@{SHARE}"), changes=changes | {"batch": BATCH}),
        seed,
    )
    for one in wanted.needed:
        mechanism.finished(BENCHMARK, one.arm_name, seed)
    run = build(wanted)
    with run.meter.measured():
        for i in range(run.needs.cycle):
            one_step(run, i, run.needs.cycle)
    return run


def held(run: Run) -> int:
    """Bytes of all players' weights and moments."""
    tensors = []
    for player in run.task.players.values():
        tensors += [
            *player.parameters,
            *(m for p in player.parameters for m in player.optimizer.state[p].values() if m.dim()),
        ]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def measure(seed: int) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, (arm, changes) in ARMS.items():
        run = moved(arm, changes, seed)
        found[f"memory, {name}"] = held(run) / 1e6
        found[f"flops, {name}"] = run.meter.flops / run.task.players["student"].updates / 1e9
    return found
