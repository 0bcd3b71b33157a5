"""A cell is (benchmark, arm, seed): its key, its folder, its record. Imports no torch.

The key is a hash of everything that determines the result. If the record stands in the keyed folder the cell is fresh;
nothing else decides.
"""

from __future__ import annotations

import os
import platform
import subprocess
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from distillbench.config import root

GIT_SECONDS = 30


def circumstances(hashes: dict[str, Any]) -> dict[str, Any]:
    """The same of any measurement, whose sources have these hashes."""
    return {
        "commit": git("rev-parse", "HEAD") or None,
        "dirty": bool(
            git("status", "--porcelain", "--", ".", ":!results", ":!methods/*/tuning.json")
        ),
        "hashes": hashes,
        "versions": {"python": platform.python_version()}
        | {p: version(p) for p in ("torch", "numpy")},
        "hardware": hardware(),
        "threads": int(os.environ.get("OMP_NUM_THREADS", 0)) or os.cpu_count(),
    }


def git(*args: str) -> str:
    """What git says of this checkout; nothing where it cannot."""
    try:
        done = subprocess.run(
            ["git", "-C", str(root()), *args], capture_output=True, text=True, timeout=GIT_SECONDS
        )
    except (
        OSError,
        subprocess.TimeoutExpired,
    ):  # no git here, or a file system that does not answer
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


@lru_cache
def hardware() -> str:
    """Architecture and processor of this machine, as records name it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(
            line.split(":")[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        processor = platform.processor()
    return f"{platform.machine()} {processor}"
