"""Files by which a job, its launcher and the command line tell each other what happened.

They lie in the job's folder, on a file system that the nodes share. Imports no torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from distillbench.cells.disk import replace_file

OUTCOME = "outcome.json"  # how the job's command ended
STARTED = "started.json"  # where and when an attempt began
MEETING = "meeting.json"  # where its ranks find each other
LOST = "lost.json"  # why there is no record
CANCELLED = "cancelled"  # `distillbench cancel` was here


def write(path: Path, value: dict[str, Any]) -> None:
    """Write a line of JSON, atomically; OSError on a full or read-only disk."""
    replace_file(path, (json.dumps(value) + "\n").encode())


def read(path: Path) -> dict[str, Any]:
    """JSON that another process wrote, {} before it did."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def log_of(folder: Path, number: str) -> Path:
    """What rank 0 of a job wrote, as submitit names it."""
    return folder / number / f"{number}_0_log.out"
