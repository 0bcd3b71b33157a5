"""A cell is (benchmark, arm, seed): its key, its folder, its record. Imports no torch.

The key is a hash of everything that determines the result. If the record stands in the keyed folder the cell is fresh;
nothing else decides.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from distillbench.config import Benchmark, canonical, digest, root
from distillbench.errors import UserError
from distillbench.registry import Arm

# The modules whose code determines numbers; the command line, progress, dispatch and records are not among them.
NUMERICAL = (
    "paths", "times", "matching", "jvp", "samplers", "networks", "teachers", "data", "method", "players", "meter",
    "seeds", "train",
)  # fmt: skip


@lru_cache
def ground_hash() -> str:
    """Of the numerical modules of distillbench."""
    here = Path(__file__).parent
    return digest(b"".join(name.encode() + b"\0" + (here / f"{name}.py").read_bytes() for name in NUMERICAL))


@dataclass(frozen=True)
class Cell:
    """arm=None is the teacher of that seed."""

    benchmark: Benchmark
    arm: Arm | None
    seed: int

    @property
    def arm_name(self) -> str:
        return "teacher" if self.arm is None else self.arm.name

    @property
    def label(self) -> str:
        return f"{self.benchmark.name}/{self.arm_name} seed {self.seed}"

    @property
    def teacher(self) -> Cell:
        """Seed k of a method is paired with teacher k."""
        return Cell(self.benchmark, None, self.seed)

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """Everything that determines the result, as JSON."""
        b = self.benchmark
        common = {
            "seed": self.seed,
            "ground": ground_hash(),
            "data": b.data.fingerprint(),
            "benchmark": b.model_dump(mode="json", include={"data", "network", "teacher", "sampling", "guidance"}),
        }
        if self.arm is None:
            return common
        return common | {
            "budget": b.budget.model_dump(mode="json"),
            "teacher": self.teacher.key,
            "group": self.arm.attribute("group"),
            "method": self.arm.folder.code_hash(),
            "config": self.arm.settings(b),
        }

    @cached_property
    def key(self) -> str:
        return digest(canonical(self.recipe))[:12]

    @cached_property
    def folder(self) -> Path:
        return root() / "results/runs" / self.benchmark.name / self.arm_name / f"seed{self.seed}-{self.key}"

    @property
    def record(self) -> Path:
        return self.folder / "result.json"

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.json"

    def result(self) -> dict[str, Any] | None:
        """The record, or None while the cell is not fresh."""
        return json.loads(self.record.read_text()) if self.record.is_file() else None

    def labels(self) -> dict[str, Any]:
        """What a table says about the cell's arm besides its numbers."""
        teacher: dict[str, Any] = {"title": "Teacher", "fidelity": None, "adaptation": False, "reported": []}
        return teacher if self.arm is None else self.arm.labels()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One process at a time works on a cell; a second one waits and then finds the record."""
        with lock(self.folder / "lock"):
            yield


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold the file `path` for this process alone; says so when it has to wait."""
    make_folder(path.parent)
    with open(path, "w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process to release {path}", file=sys.stderr, flush=True)
            fcntl.flock(f, fcntl.LOCK_EX)
        yield


def make_folder(folder: Path) -> None:
    """Create a results folder; UserError where that is not allowed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as e:
        raise UserError(f"{folder}: cannot write there ({e.strerror}): make it writable or free space, then rerun") from None


def write_atomically(path: Path, data: bytes) -> None:
    """All of the file or nothing of it; UserError on a full or read-only disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as e:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({e.strerror}): make room or make it writable, then rerun") from None


def write_json(path: Path, value: Any) -> None:
    """Indented JSON with a final newline, atomically."""
    write_atomically(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def provenance(cell: Cell) -> dict[str, Any]:
    """Where a result comes from: commit, hashes, versions, hardware."""

    def git(*args: str) -> str:
        done = subprocess.run(["git", "-C", str(root()), *args], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    recipe = cell.recipe
    return {
        "commit": git("rev-parse", "HEAD") or None,
        "dirty": bool(git("status", "--porcelain", "--", ".", ":!results")),
        "hashes": {k: recipe[k] for k in ("ground", "data", "method", "teacher") if k in recipe},
        "versions": {"python": platform.python_version()} | {p: version(p) for p in ("torch", "numpy")},
        "hardware": f"{platform.machine()} {_processor()}",
        "threads": int(os.environ.get("OMP_NUM_THREADS", 0)) or os.cpu_count(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
