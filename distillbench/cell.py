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
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

from distillbench.config import Benchmark, canonical, digest, root
from distillbench.errors import UserError
from distillbench.registry import Arm

# The modules whose code determines numbers; the command line, progress, dispatch and records are not among them.
NUMERICAL = (
    "paths", "times", "matching", "flowmaps", "adversarial", "jvp", "samplers", "networks", "features", "teachers", "data", "method",
    "players", "meter", "seeds", "build", "train",
)  # fmt: skip
GIT_SECONDS = 30
LAST, PREVIOUS = "checkpoint.safetensors", "checkpoint.previous.safetensors"  # of a cell in training


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
    def start(self) -> Cell | None:
        """The cell whose student this one starts from, of the same seed and teacher."""
        arm = None if self.arm is None else self.arm.start
        return None if arm is None else Cell(self.benchmark, arm, self.seed)

    @property
    def needed(self) -> list[Cell]:
        """What has to be trained before it."""
        return [c for c in (None if self.arm is None else self.teacher, self.start) if c is not None]

    @property
    def budget(self) -> float:
        """FLOPs it may spend, of its start and its own; from scratch the teacher's come on top."""
        assert self.arm is not None
        return self.benchmark.budget.flops * self.arm.share

    @property
    def own_budget(self) -> float:
        """What of it is left when its start has been paid for."""
        return self.budget - (self.start.budget if self.start else 0)

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
            "budget": {"flops": self.budget},
            "teacher": self.teacher.key,
            "group": self.arm.attribute("group"),
            "method": self.arm.folder.code_hash(),
            "config": self.arm.settings(b),
            **({} if self.start is None else {"start": self.start.key}),
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
        return read_record(self.record)

    def labels(self) -> dict[str, Any]:
        """What a table says about the cell's arm besides its numbers."""
        teacher: dict[str, Any] = {"title": "Teacher", "fidelity": None, "adaptation": False, "trajectory": False, "reported": []}
        return teacher if self.arm is None else self.arm.labels()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One process at a time works on a cell; a second one waits and then finds the record."""
        with lock(self.folder / "lock"):
            yield


def read_record(path: Path) -> dict[str, Any] | None:
    """A result.json, or None where there is none; UserError where it is damaged."""
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text())
        found["status"]
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{path}: not valid JSON of a record: delete it and rerun") from None
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror}): make it readable, then rerun") from None
    return found


_held: set[IO[str]] = set()
# A lock lives as long as any copy of its file is open: a process that a method forks must not keep it.
os.register_at_fork(after_in_child=lambda: [f.close() for f in _held])


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold the file `path` for this process alone; says so when it has to wait."""
    make_folder(path.parent)
    with writing(path):
        f = open(path, "w")  # noqa: SIM115
    with f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with suppress(OSError):
                print(f"waiting for another process to release {path}", file=sys.stderr, flush=True)
            fcntl.flock(f, fcntl.LOCK_EX)
        _held.add(f)
        try:
            yield
        finally:
            _held.discard(f)


def is_locked(path: Path) -> bool:
    """Some process holds the lock now; a lock file alone says nothing."""
    try:
        with open(path) as f:
            fcntl.flock(f, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """An error of the file system in this block is a UserError that names `path` and the remedy."""
    try:
        yield
    except OSError as e:
        raise UserError(f"{path}: cannot be written ({e.strerror}): make room or make it writable, then rerun") from None


def make_folder(folder: Path) -> None:
    """Create a results folder; UserError where that is not allowed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as e:
        raise UserError(f"{folder}: cannot write there ({e.strerror}): make it writable or free space, then rerun") from None


def write_atomically(path: Path, data: bytes, previous: Path | None = None) -> None:
    """All of the file or nothing of it; UserError on a full or read-only disk. The old file becomes `previous`, if that is given."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with writing(path):
        try:
            with open(temporary, "wb") as f:
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
            if previous is not None and path.is_file():
                os.replace(path, previous)
            os.replace(temporary, path)
        except BaseException:  # a full disk, and Ctrl-C in the middle
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


def remove_leftovers(folder: Path) -> None:
    """Files that an earlier process left half written, and its traceback."""
    _remove([*folder.glob(".*"), *folder.glob("traceback.txt")])


def remove_progress(folder: Path) -> None:
    """A finished cell needs no checkpoint."""
    _remove([*folder.glob(LAST), *folder.glob(PREVIOUS)])


def _remove(paths: list[Path]) -> None:
    for path in paths:
        with writing(path):
            path.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Indented JSON with a final newline, atomically."""
    write_atomically(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


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
        "division": "closed" if arm is None or arm.share == 1 else "open",  # teacher, data and evaluator cannot be others
        "params": None,
        "nfe": [],
        "headline_nfe": None,
        **({"budget_share": arm.share} if arm and arm.share != 1 else {}),
        **({"start": cell.start.arm_name} if cell.start else {}),
    }


def provenance(cell: Cell) -> dict[str, Any]:
    """Where a result comes from: commit, hashes, versions, hardware."""
    recipe = cell.recipe
    return circumstances({k: recipe[k] for k in ("ground", "data", "method", "teacher") if k in recipe})


def circumstances(hashes: dict[str, Any]) -> dict[str, Any]:
    """The same of any measurement, whose sources have these hashes."""
    return {
        "commit": git("rev-parse", "HEAD") or None,
        "dirty": bool(git("status", "--porcelain", "--", ".", ":!results", ":!methods/*/tuning.json")),
        "hashes": hashes,
        "versions": {"python": platform.python_version()} | {p: version(p) for p in ("torch", "numpy")},
        "hardware": hardware(),
        "threads": int(os.environ.get("OMP_NUM_THREADS", 0)) or os.cpu_count(),
    }


def git(*args: str) -> str:
    """What git says of this checkout; nothing where it cannot."""
    try:
        done = subprocess.run(["git", "-C", str(root()), *args], capture_output=True, text=True, timeout=GIT_SECONDS)
    except (OSError, subprocess.TimeoutExpired):  # no git here, or a file system that does not answer
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


@lru_cache
def hardware() -> str:
    """Architecture and processor of this machine, as records name it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        processor = platform.processor()
    return f"{platform.machine()} {processor}"
