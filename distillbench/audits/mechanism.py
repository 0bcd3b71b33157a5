"""What experiments in `mechanisms/` are made of: trained cells, and cells ready to be trained.

An experiment is a file `mechanisms/<name>.py` with

    BENCHMARK = "gaussians-ring"      whose data it uses
    METHODS = ("freeflow",)           folders whose code or settings it uses
    def measure(seed: int) -> dict[str, float]

Its results are kept by the hash of these. `measure` returns positive, finite quantities by name,
the same ones for every seed and the same numbers for one seed. Claims of `kind: mechanism` compare
them. It imports `distillbench` and torch; methods come through `registry.folders.load`.
"""

from __future__ import annotations

import torch

from distillbench import config
from distillbench.cells.build import Run, build, restore
from distillbench.cells.cell import Cell
from distillbench.cells.progress import silent
from distillbench.cells.setup import attach, price
from distillbench.cells.train import run_cell
from distillbench.registry import folders


def cell(benchmark: str, arm: str, seed: int) -> Cell:
    """The cell of an arm, such as method@variant@x0.1, or of the 'teacher'."""
    found = None if arm == "teacher" else folders.arm(arm)
    return Cell(config.benchmark(benchmark), found, seed)


def finished(benchmark: str, arm: str, seed: int) -> Run:
    """A finished cell, ready to sample; trained now where it has no record.

    Raises ValueError where it, or a cell that it needs, did not end as done.
    """
    wanted = cell(benchmark, arm, seed)
    for one in (*wanted.needed, wanted):
        with one.locked(), torch.enable_grad():  # an experiment may measure without gradients
            record = one.result() or run_cell(one, silent)
        if record["status"] != "done":
            raise ValueError(f"{one.label} ended as {record['status']}: {record['reason']}")
    return restore(wanted)


def ready(benchmark: str, arm: str, seed: int) -> tuple[Run, int]:
    """A cell built for training, and the steps that its budget buys.

    An experiment loops `one_step(run, i, steps)` of `cells.steps`.
    """
    wanted = cell(benchmark, arm, seed)
    for one in wanted.needed:
        finished(benchmark, one.arm_name, seed)
    plan, made = price(wanted, silent)
    run = attach(build(wanted), made)
    for name, player in run.task.players.items():
        player.total_updates = plan.updates[name]
    return run, plan.steps
