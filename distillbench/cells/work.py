"""Training of cells under supervision: what `distillbench train` and `distillbench tune` do.

Imports no torch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from distillbench import config
from distillbench.cells import ranks
from distillbench.cells.cell import Cell
from distillbench.cells.disk import LAST, remove_progress
from distillbench.cells.progress import reporter, say, silent
from distillbench.cells.pulse import Pulse
from distillbench.cells.record import describe, finish
from distillbench.cells.supervisor import supervise
from distillbench.cells.validate import validate_here
from distillbench.registry import folders


def train_cells(cells: list[Cell]) -> None:
    """Give every cell of one arm its record, each after its teacher and its start.

    What has a record is left as it is. Raises what `supervise` does.
    """
    order: list[Cell] = []
    for cell in cells:
        order += [*cell.needed, cell]
    for cell in order:
        record = cell.result()
        if record is None:
            continue
        if record["status"] == "done":
            remove_progress(cell.folder)  # where a process was killed between its record and this
        else:
            print(
                f"{cell.label}: {record['status']} before; to try again delete {cell.record}",
                file=sys.stderr,
            )
    supervise(order, partial(_work, order, cells))


def _work(order: list[Cell], own: list[Cell], pulse: Pulse) -> None:
    """Give every cell of `order` its record, in a process of its own; `own`: those of the arm."""
    # Imports torch, before any cell begins: that this fails is no cell's doing.
    from distillbench.cells.train import run_cell

    _validate(order, own[0], pulse)
    with ranks.joined():
        for index, cell in enumerate(order):
            with cell.locked() if ranks.leads() else nullcontext():
                pulse.enter(index)
                ranks.barrier()  # the first one has the lock
                if cell.result() is None:
                    _train(run_cell, cell, pulse)
                ranks.barrier()  # the record is there for all


def _validate(order: list[Cell], own: Cell, pulse: Pulse) -> None:
    """Print a warning where the arm's method does not import, as a part of its first cell's time.

    Raises UserError on a mistake in its files.
    """
    for index, cell in enumerate(order):
        if cell.arm is not own.arm or cell.result() is not None:
            continue
        pulse.enter(index)
        with pulse.limits():
            warning = None if own.arm is None else validate_here(own.benchmark, own.arm)
        if warning:
            say(f"distillbench: {warning}")
        return


def _train(run_cell: Callable[..., dict[str, Any]], cell: Cell, pulse: Pulse) -> None:
    """Train a cell, and say how it ended unless another rank does."""
    if not ranks.leads():
        run_cell(cell, silent, pulse)
        return
    record = run_cell(cell, reporter(cell.label), pulse)
    ending = "done"
    if record["status"] != "done":
        ending = f"{record['status'].upper()}: {record['reason']}"
    say(f"{cell.label}: {ending} in {record['cost']['seconds']:g} s{retry_advice(cell)}")


def retry_advice(cell: Cell) -> str:
    """What to delete before another try, where what the cell needs failed; '' where it did not.

    A student is refused for the sake of its teacher or start, and its key does not tell how they
    ended.
    """
    failed = []
    for needed in cell.needed:
        record = needed.result()
        if record is not None and record["status"] != "done":
            failed.append(needed.record)
    if not failed:
        return ""
    return f"; to try again delete {' and '.join(map(str, [*failed, cell.record]))}"


def seconds_saved(cell: Cell) -> float:
    """Training seconds up to the last checkpoint, summed over processes; 0 without one."""
    try:
        with safe_open(cell.folder / LAST, framework="numpy") as f:
            return float(f.metadata()["seconds"])
    except (OSError, SafetensorError, KeyError, TypeError):
        return 0.0


def first_unfinished(words: list[str]) -> Cell | None:
    """The first cell of `train BENCHMARK ARM --seeds ...` without a record.

    None where all have one, or where the words train nothing.
    """
    if words[0] != "train":
        return None
    _, benchmark_name, arm_name, _, seeds = words
    benchmark = config.benchmark(benchmark_name)
    arm = None if arm_name == "teacher" else folders.arm(arm_name)
    for seed in seeds.split(","):
        cell = Cell(benchmark, arm, int(seed))
        if cell.result() is None:
            return cell
    return None


def give_up(words: list[str], status: str, reason: str, log: Path, node: str | None = None) -> bool:
    """Write the record of the cell at which SLURM ended a job's command for good.

    False where it was at none. log: of the job; node: where it ran, if not here.
    """
    cell = first_unfinished(words)
    if cell is None:
        return False
    with cell.locked():
        if cell.result() is None:
            record = describe(cell)
            record["status"] = status
            record["reason"] = reason
            record["log"] = os.path.relpath(log, config.root())
            hardware = f"node {node}" if node else None
            finish(cell, record, None, seconds_saved(cell), None, hardware)
            say(f"{cell.label}: {status.upper()}: {reason}")
    return True
