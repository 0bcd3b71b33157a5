"""Where a measurement comes from: commit, versions, processor. Imports no torch."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from distillbench.config import root

GIT_SECONDS = 30  # that git may take to answer
# Changes of these do not make a checkout dirty: the suite itself writes them.
NOT_DIRTY = (":!results", ":!methods/*/tuning.json")


def circumstances(hashes: dict[str, Any]) -> dict[str, Any]:
    """A measurement's commit, versions, hardware and threads, as records state them.

    hashes: of its sources, by name; they are stated as they are given.
    """
    versions = {"python": platform.python_version()}
    for package in ("torch", "numpy"):
        versions[package] = version(package)
    return {
        "commit": git("rev-parse", "HEAD") or None,
        "dirty": bool(git("status", "--porcelain", "--", ".", *NOT_DIRTY)),
        "hashes": hashes,
        "versions": versions,
        "hardware": hardware(),
        "threads": int(os.environ.get("OMP_NUM_THREADS", 0)) or os.cpu_count(),
    }


def git(*args: str) -> str:
    """Output of a git command in this checkout, stripped; '' where git is missing or fails."""
    command = ["git", "-C", str(root()), *args]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=GIT_SECONDS)
    except (OSError, subprocess.TimeoutExpired):  # not installed, or a disk that does not answer
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


@lru_cache
def hardware() -> str:
    """Architecture and processor of this machine, as records name it."""
    return f"{platform.machine()} {_processor()}"


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor()
    for line in text.splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor()
