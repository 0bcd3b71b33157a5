"""What matching costs with a fake network and without one.

FSF-DMD (arXiv 2605.19256, abstract) speaks of an auxiliary network to hold and update. Every arm is
built as it is trained and moved through one cycle of its updates, on batches of one size and with
two steps in the simulation; nothing here is a time. Per arm:

    memory   MB of the weights that its players move and of their optimisers' moments; without
             gradients, averages, activations and the frozen teacher, which all arms have
    flops    GFLOP by the meter for one update of the student, with those of the fake network that
             come between two of them

`Eq. 12` is FSF-DMD, `explicit fake` the same with a critic and five of its updates to one, `DMD2`
is DMD2 without its classifier, as a flow model is distilled by it, and `flow map` the flow-map loss
alone, which the first two contain.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from distillbench import config
from distillbench.audits import mechanism
from distillbench.cells.build import Run, build
from distillbench.cells.cell import Cell
from distillbench.cells.steps import one_step
from distillbench.registry import folders

BENCHMARK = "gaussians-ring"
METHODS = ("fsf_dmd", "dmd2", "meanflow")
BATCH = 256
SHARE = "x0.1"
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "Eq. 12": ("fsf_dmd", {}),
    "explicit fake": ("fsf_dmd@explicit-fake", {}),
    "DMD2": ("dmd2@no-gan", {"steps": 2, "input_time": 1.0}),
    "flow map": ("fsf_dmd@flow-map-only", {}),
}


def moved(arm: str, changes: dict[str, Any], seed: int) -> Run:
    """An arm after one cycle of updates, which was metered."""
    changed = replace(folders.arm(f"{arm}@{SHARE}"), changes=changes | {"batch": BATCH})
    cell = Cell(config.benchmark(BENCHMARK), changed, seed)
    for needed in cell.needed:
        mechanism.finished(BENCHMARK, needed.arm_name, seed)
    run = build(cell)
    with run.meter.measured():
        for i in range(run.needs.cycle):
            one_step(run, i, run.needs.cycle)
    return run


def held(run: Run) -> int:
    """Bytes of all players' weights and of their optimisers' moments."""
    tensors: list[Tensor] = []
    for player in run.task.players.values():
        tensors += player.parameters
        for parameter in player.parameters:
            state = player.optimizer.state[parameter].values()
            tensors += [moment for moment in state if moment.dim()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def measure(seed: int) -> dict[str, float]:
    """Memory and FLOPs of every arm."""
    quantities: dict[str, float] = {}
    for name, (arm, changes) in ARMS.items():
        run = moved(arm, changes, seed)
        updates = run.task.players["student"].updates
        quantities[f"memory, {name}"] = held(run) / 1e6
        quantities[f"flops, {name}"] = run.meter.flops / updates / 1e9
    return quantities
