"""One cell from its set-up to its record, whatever its method does."""

from __future__ import annotations

import errno
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import yaml

from distillbench.cells.blame import line_of, reason_of
from distillbench.cells.build import build, repeat_bytes, saved_network, weights_file
from distillbench.cells.cell import Cell
from distillbench.cells.checkpoint import write_tensors
from distillbench.cells.disk import (
    TRACEBACK,
    remove_leftovers,
    remove_progress,
    write_atomically,
)
from distillbench.cells.loop import train
from distillbench.cells.memory import is_out_of_memory, limit_memory
from distillbench.cells.progress import Report
from distillbench.cells.pulse import HUNG, TIMED_OUT, Hung, Pulse, TimedOut
from distillbench.cells.record import describe, finish
from distillbench.cells.sampling import all_samples
from distillbench.cells.setup import Plan, attach, price
from distillbench.errors import Diverged, OverBudget, Refused, UserError
from distillbench.meter import peak_memory_mb
from distillbench.seeds import ranks

RANK_SECONDS = 3.0  # that a rank waits for the first one's record of a failure that both had
LONGEST_REASON = 200  # characters of a failure's words in a table's row
# Errors of files and terminals, not of the code that meets them.
MACHINE = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EPIPE,
    errno.EIO,
    errno.EROFS,
    errno.ESTALE,
)
# Status of a cell by what ended it.
STATUSES: tuple[tuple[type[BaseException], str], ...] = (
    (OverBudget, "over_budget"),
    (Refused, "refused"),
    (Diverged, "diverged"),
    (FloatingPointError, "diverged"),
)


def run_cell(cell: Cell, report: Report, pulse: Pulse | None = None) -> dict[str, Any]:
    """Train and sample a cell and write its record, which is returned.

    What the method does wrong becomes the record's status. Of several ranks the first samples and
    writes; another one that fails writes the record in its place and raises UserError.
    """
    repeat_bytes()
    if not torch.cuda.is_available():
        limit_memory()
    pulse = pulse or Pulse()
    pulse.started = time.monotonic()
    plan: Plan | None = None
    rank = ranks()[0]
    record = describe(cell)
    if rank == 0:
        remove_leftovers(cell.folder)
    try:
        with pulse.limits():
            refuse_after_failure(cell)
            plan, made = price(cell, report, pulse)
            if rank == 0:
                freeze_recipe(cell, plan)
            run = attach(build(cell), made)
            train(run, plan, report, pulse)
            if rank:
                return record
            network = saved_network(run)
            samples = all_samples(run, report, pulse)
        write_tensors(cell.folder / weights_file(cell), network.state_dict(), key=cell.key)
        write_tensors(cell.folder / "samples.safetensors", samples, key=cell.key)
        record["nfe"] = list(run.needs.nfe)
        record["headline_nfe"] = run.needs.headline_nfe
        record["params"] = sum(p.numel() for p in network.parameters())
    except BaseException as e:  # a method may raise anything; that costs its own row and no other
        record["status"], record["reason"] = how_it_ended(e, cell, pulse)
        if rank == 0 and record["status"] in ("failed", "oom"):
            write_atomically(traceback_file(cell), traceback.format_exc().encode())
    cost = None if plan is None else plan.as_cost()
    if rank:
        time.sleep(RANK_SECONDS)
        if cell.result() is None:  # the first rank has not failed, and would wait for this one
            finish(cell, record, cost, pulse.seconds(), None)
        ending = f"{record['status']}: {record['reason']}"
        raise UserError(f"{cell.label}: rank {rank} ended: {ending}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    finish(cell, record, cost, pulse.seconds(), peak_memory_mb(device))
    if record["status"] == "done":
        remove_progress(cell.folder)
    return record


def traceback_file(cell: Cell) -> Path:
    """Where the traceback of a failed cell is kept."""
    return cell.folder / TRACEBACK


def refuse_after_failure(cell: Cell) -> None:
    """Raises Refused where what the cell needs did not end as done."""
    for needed in cell.needed:
        other = needed.result()
        if other is not None and other["status"] != "done":
            what = "teacher" if needed.arm is None else f"start {needed.arm_name}"
            raise Refused(f"its {what} ended as {other['status']}: {other['reason']}")


def freeze_recipe(cell: Cell, plan: Plan) -> None:
    """Write the cell's config.yaml: everything that determines its result, and its plan."""
    frozen = {
        "cell": cell.label,
        "key": cell.key,
        "plan": plan.as_cost(),
        "recipe": cell.recipe,
    }
    text = yaml.safe_dump(frozen, sort_keys=False)
    write_atomically(cell.folder / "config.yaml", text.encode())


def how_it_ended(error: BaseException, cell: Cell, pulse: Pulse) -> tuple[str, str]:
    """Status and reason of a cell that ended with `error`.

    Raises UserError or KeyboardInterrupt where the user or the machine ended it, not the method.
    """
    if isinstance(error, UserError):
        raise error
    # Whatever the method made of it; a KeyboardInterrupt of its own is a failure.
    if pulse.interrupted or pulse.leaving:
        raise KeyboardInterrupt from None
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    if any("torch/distributed/" in frame.f_code.co_filename for frame in frames):
        words = in_one_line(error, cell)
        raise UserError(
            f"{cell.label}: lost another rank ({words}); the same command continues"
        ) from None
    if isinstance(error, OSError) and error.errno in MACHINE:
        words = in_one_line(error, cell)
        raise UserError(f"{cell.label}: {words}: mend the disk or terminal, then rerun") from None
    if isinstance(error, (TimedOut, Hung)):
        cause = TIMED_OUT if isinstance(error, TimedOut) else HUNG
        return reason_of(cause, cell, pulse, line_of(error, cell))
    for kinds, status in STATUSES:
        if isinstance(error, kinds):
            return status, " ".join(str(error).split())
    no_memory = isinstance(error, torch.OutOfMemoryError) or is_out_of_memory(error)
    return "oom" if no_memory else "failed", in_one_line(error, cell)


def in_one_line(error: BaseException, cell: Cell) -> str:
    """Type, message and the innermost line of the method's code, for a table's row."""
    words = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return f"{words[:LONGEST_REASON]} ({line_of(error, cell)})"
