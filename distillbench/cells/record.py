"""The record of a cell, `result.json`: what is known before it runs, and how it ended.

Imports no torch.
"""

from __future__ import annotations

import os
from typing import Any

from distillbench.cells.cell import Cell
from distillbench.cells.disk import TRACEBACK, write_json
from distillbench.cells.environment import LOG
from distillbench.cells.provenance import circumstances
from distillbench.config import root

FORMAT = 1
HASHES = ("ground", "data", "method", "teacher")  # of a cell's recipe, stated as its provenance


def describe(cell: Cell) -> dict[str, Any]:
    """A record of what is known of a cell before it runs, with status `done`.

    Labels such as its fidelity are not facts of the run (`Arm.labels`).
    """
    arm = cell.arm
    method, _, variant = cell.arm_name.partition("@")
    # Teacher, data and evaluator cannot be others, so a share of the budget alone opens it.
    closed = arm is None or arm.share == 1
    record: dict[str, Any] = {
        "format": FORMAT,
        "benchmark": cell.benchmark.name,
        "method": method,
        "variant": variant or None,
        "seed": cell.seed,
        "key": cell.key,
        "status": "done",
        "reason": None,
        "group": arm.attribute("group") if arm else "teacher",
        "division": "closed" if closed else "open",
        "params": None,
        "nfe": [],
        "headline_nfe": None,
    }
    if arm is not None and arm.share != 1:
        record["budget_share"] = arm.share
    if cell.start is not None:
        record["start"] = cell.start.arm_name
    return record


def provenance(cell: Cell) -> dict[str, Any]:
    """Where a result comes from: commit, hashes, versions, hardware."""
    recipe = cell.recipe
    return circumstances({name: recipe[name] for name in HASHES if name in recipe})


def finish(
    cell: Cell,
    record: dict[str, Any],
    plan: dict[str, Any] | None,
    seconds: float,
    memory_mb: float | None,
    hardware: str | None = None,
) -> dict[str, Any]:
    """Complete and write a cell's record, which is returned: from here on the cell is fresh.

    plan: the first entries of its `cost`; seconds and memory_mb, the peak, follow. hardware: where
    it was trained, if not here. A failure's `log` says where to read more, relative to the
    checkout: its traceback, or the log of its job on a cluster.
    """
    if record["status"] != "done" and "log" not in record:
        trace = cell.folder / TRACEBACK
        known = trace.is_file()
        record["log"] = os.path.relpath(trace, root()) if known else os.environ.get(LOG)
    record["cost"] = {
        **(plan or {}),
        "seconds": round(seconds, 1),
        "peak_memory_mb": None if memory_mb is None else round(memory_mb),
    }
    record["provenance"] = provenance(cell)
    if hardware:
        record["provenance"]["hardware"] = hardware
    write_json(cell.record, record)
    return record
