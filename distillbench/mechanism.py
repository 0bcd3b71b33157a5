"""What experiments in `mechanisms/` are made of: cells that are trained, and cells that are ready to be trained step by step.

An experiment is a file `mechanisms/<name>.py` with

    BENCHMARK = "gaussians-ring"      whose data it uses
    METHODS = ("freeflow",)           folders whose code or settings it uses: its results are kept by their hash
    def measure(seed: int) -> dict[str, float]

`measure` returns positive, finite quantities by name, the same ones for every seed and the same numbers for one seed. Claims of
`kind: mechanism` compare them. It imports `distillbench` and torch; methods come through `distillbench.registry.load`.
"""

from __future__ import annotations

import torch

from distillbench import config, registry, train
from distillbench.build import Run, build, restore
from distillbench.cell import Cell
from distillbench.watch import Pulse


def silent(_what: str, _done: int, _total: int) -> None:
    """Progress that nobody watches."""


def cell(benchmark: str, arm: str, seed: int) -> Cell:
    """arm: method@variant@x0.1, or 'teacher'."""
    return Cell(config.benchmark(benchmark), None if arm == "teacher" else registry.arm(arm), seed)


def finished(benchmark: str, arm: str, seed: int) -> Run:
    """A finished cell, ready to sample; trained now where it has no record, as `distillbench train` does."""
    wanted = cell(benchmark, arm, seed)
    for one in (*wanted.needed, wanted):
        with one.locked(), torch.enable_grad():  # an experiment may measure without gradients
            record = one.result() or train.run_cell(one, silent)
        if record["status"] != "done":
            raise ValueError(f"{one.label} ended as {record['status']}: {record['reason']}")
    return restore(wanted)


def ready(benchmark: str, arm: str, seed: int) -> tuple[Run, int]:
    """A cell built for training and the steps that its budget buys: loop `train.one_step(run, i, steps)`."""
    wanted = cell(benchmark, arm, seed)
    for one in wanted.needed:
        finished(benchmark, one.arm_name, seed)
    plan, made = train.price(wanted, silent, Pulse())
    run = train.furnish(build(wanted), made)
    for name, player in run.task.players.items():
        player.total_updates = plan["updates"][name]
    return run, plan["steps"]
