"""Training of cells under supervision: what `distillbench train` and `distillbench tune` do. Imports no torch."""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from pathlib import Path

from safetensors import SafetensorError, safe_open

from distillbench import config
from distillbench.cells import ranks, validate
from distillbench.cells.cell import Cell
from distillbench.cells.disk import LAST, remove_progress
from distillbench.cells.jobs import Job
from distillbench.cells.progress import reporter, say, silent
from distillbench.cells.pulse import Pulse
from distillbench.cells.record import describe, finish
from distillbench.cells.supervisor import supervise
from distillbench.registry import folders


def again(cell: Cell) -> str:
    """What to delete where a student was refused for the sake of its teacher or start: its key does not tell how they ended."""
    failed = [
        c.record for c in cell.needed if (r := c.result()) is not None and r["status"] != "done"
    ]
    return (
        f"; to try again delete {' and '.join(map(str, [*failed, cell.record]))}" if failed else ""
    )


def train_cells(cells: list[Cell]) -> None:
    """Give every cell of one arm its record, each after its teacher and its start; what has a record is left as it is."""
    order = [one for cell in cells for one in (*cell.needed, cell)]
    for one in order:
        if (record := one.result()) is not None and record["status"] != "done":
            print(
                f"{one.label}: {record['status']} before; to try again delete {one.record}",
                file=sys.stderr,
            )
        elif record is not None:
            remove_progress(one.folder)  # where a process was killed between its record and this

    def work(pulse: Pulse) -> None:
        """Give every cell its record, in a process of its own."""
        from distillbench.cells.train import run_cell

        if (
            first := next(
                (
                    i
                    for i, one in enumerate(order)
                    if one.arm is cells[0].arm and one.result() is None
                ),
                None,
            )
        ) is not None:
            pulse.enter(first)
            with pulse.limits():
                warning = validate.check(Job(tuple(cells)))
            if warning:
                say(f"distillbench: {warning}")
        with ranks.joined():
            for index, one in enumerate(order):
                with one.locked() if ranks.leads() else nullcontext():
                    pulse.enter(index)
                    ranks.meet()  # the first one has the lock
                    if one.result() is None:
                        record = run_cell(
                            one, reporter(one.label) if ranks.leads() else silent, pulse
                        )
                        if ranks.leads():
                            text = (
                                "done"
                                if record["status"] == "done"
                                else f"{record['status'].upper()}: {record['reason']}"
                            )
                            say(
                                f"{one.label}: {text} in {record['cost']['seconds']:g} s{again(one)}"
                            )
                    ranks.meet()  # the record is there for all

    supervise(order, work)


def seconds_saved(cell: Cell) -> float:
    """That the steps up to the last checkpoint took, in all processes; 0 without one."""
    try:
        with safe_open(cell.folder / LAST, framework="numpy") as f:
            return float(f.metadata()["seconds"])
    except (OSError, SafetensorError, KeyError, TypeError):
        return 0.0


def at_hand(words: list[str]) -> Cell | None:
    """The first cell of `train BENCHMARK ARM --seeds ...` without a record; None where all have one, or the words train nothing."""
    if words[0] != "train":
        return None
    _, benchmark, arm, _, seeds = words
    b, found = config.benchmark(benchmark), None if arm == "teacher" else folders.arm(arm)
    return next(
        (
            cell
            for cell in (Cell(b, found, int(seed)) for seed in seeds.split(","))
            if cell.result() is None
        ),
        None,
    )


def give_up(words: list[str], status: str, reason: str, log: Path, node: str | None = None) -> bool:
    """Write the record of the cell at which SLURM ended a job's command for good; False where it was at none.

    `log`: of the job; `node`: where it ran, if not here.
    """
    cell = at_hand(words)
    if cell is None:
        return False
    with cell.locked():
        if cell.result() is None:
            record = describe(cell) | {
                "status": status,
                "reason": reason,
                "log": os.path.relpath(log, config.root()),
            }
            finish(cell, record, None, seconds_saved(cell), None, node and f"node {node}")
            say(f"{cell.label}: {status.upper()}: {reason}")
    return True
