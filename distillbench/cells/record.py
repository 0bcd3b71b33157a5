"""The record of a cell, `result.json`: what is known before it runs, where it comes from, how it ended. Imports no torch."""

from __future__ import annotations

import os
from typing import Any

from distillbench.cells.cell import Cell
from distillbench.cells.disk import write_json
from distillbench.cells.environment import LOG
from distillbench.cells.provenance import circumstances
from distillbench.config import root


def describe(cell: Cell) -> dict[str, Any]:
    """What is known of a cell before it runs; labels such as its fidelity are not facts of the run (`Arm.labels`)."""
    arm = cell.arm
    return {
        "format": 1,
        "benchmark": cell.benchmark.name,
        "method": cell.arm_name.partition("@")[0],
        "variant": cell.arm_name.partition("@")[2] or None,
        "seed": cell.seed,
        "key": cell.key,
        "status": "done",
        "reason": None,
        "group": arm.attribute("group") if arm else "teacher",
        "division": "closed"
        if arm is None or arm.share == 1
        else "open",  # teacher, data and evaluator cannot be others
        "params": None,
        "nfe": [],
        "headline_nfe": None,
        **({"budget_share": arm.share} if arm and arm.share != 1 else {}),
        **({"start": cell.start.arm_name} if cell.start else {}),
    }


def provenance(cell: Cell) -> dict[str, Any]:
    """Where a result comes from: commit, hashes, versions, hardware."""
    recipe = cell.recipe
    return circumstances(
        {k: recipe[k] for k in ("ground", "data", "method", "teacher") if k in recipe}
    )


def finish(
    cell: Cell,
    record: dict[str, Any],
    plan: dict[str, Any] | None,
    seconds: float,
    memory_mb: float | None,
    hardware: str | None = None,
) -> dict[str, Any]:
    """Complete and write a cell's record: from here on the cell is fresh. `hardware`: where it was trained, if not here.

    A failure's `log` says where to read more, relative to the checkout: its traceback, or the log of its job on a cluster.
    """
    if record["status"] != "done":
        trace = cell.folder / "traceback.txt"
        record.setdefault(
            "log", os.path.relpath(trace, root()) if trace.is_file() else os.environ.get(LOG)
        )
    cost = {
        "seconds": round(seconds, 1),
        "peak_memory_mb": None if memory_mb is None else round(memory_mb),
    }
    record |= {
        "cost": (plan or {}) | cost,
        "provenance": provenance(cell) | ({"hardware": hardware} if hardware else {}),
    }
    write_json(cell.record, record)
    return record
