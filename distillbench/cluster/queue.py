"""SLURM's queue, asked at most every five seconds by all launchers of a checkout together. Imports no torch.

The answer lies in `results/runs/squeue.json`; whoever finds it too old asks anew, the others read. It works without accounting (sacct).
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

SECONDS = 5.0  # between two questions
TIMEOUT = 60.0  # of one question
PATIENCE = 300.0  # with a controller that does not answer
PREFIX = "distillbench-"  # of our jobs' names; a user's others are not kept
COMMAND = ("squeue", "--me", "--noheader", "--array", "--states=all", "--format=%i|%T|%j|%M|%r|%N")
ENDED = frozenset(
    {
        "BOOT_FAIL",
        "CANCELLED",
        "COMPLETED",
        "DEADLINE",
        "FAILED",
        "NODE_FAIL",
        "OUT_OF_MEMORY",
        "PREEMPTED",
        "REVOKED",
        "TIMEOUT",
    }
)
# Reasons of a job that will never start by itself, and what helps.
STUCK = {
    "PartitionTimeLimit": "lower `minutes` in workflows/resources.yaml",
    "PartitionNodeLimit": "lower `nodes` in workflows/resources.yaml",
    "BadConstraints": "mend `sbatch` in slurm/site.yaml",
    "AccountNotAllowed": "mend `account` in slurm/site.yaml",
    "QOSNotAllowed": "mend `qos` in slurm/site.yaml",
    "InvalidAccount": "mend `account` in slurm/site.yaml",
    "InvalidQOS": "mend `qos` in slurm/site.yaml",
    "DependencyNeverSatisfied": "mend `sbatch` in slurm/site.yaml",
    "launch failed requeued held": "the node cannot start jobs: exclude it in slurm/site.yaml (sbatch: {exclude: NODE})",
}
PER_JOB = "ask for less in workflows/resources.yaml"  # reasons like QOSMaxWallDurationPerJobLimit


def stuck(reason: str) -> str | None:
    """What helps a job that will never start by itself; None for one that may."""
    return STUCK.get(reason) or (PER_JOB if "PerJob" in reason else None)


@dataclass(frozen=True)
class Queued:
    """A job as squeue shows it."""

    id: str
    state: str
    name: str
    elapsed: str  # [days-]hours:minutes:seconds
    reason: str
    nodes: str

    @property
    def active(self) -> bool:
        return self.state not in ENDED


@dataclass(frozen=True)
class Queue:
    """All distillbench jobs of this user, as seen at `time` (seconds since the epoch)."""

    time: float
    jobs: tuple[Queued, ...]

    def named(self, name: str) -> Queued | None:
        """The job of this name: the one that is active, or else the latest."""
        found = [job for job in self.jobs if job.name == name]
        return max(found, key=lambda job: (job.active, int(job.id.split("_")[0])), default=None)

    def job(self, number: str, name: str) -> Queued | None:
        """The job of this id and name: ids begin anew after a controller lost its state."""
        return next((job for job in self.jobs if job.id == number and job.name == name), None)


def parse(text: str) -> tuple[Queued, ...]:
    """Lines of COMMAND."""
    return tuple(
        Queued(*fields)
        for line in text.splitlines()
        if len(fields := line.strip().split("|", 5)) == 6
    )


class Board:
    """The answer that the launchers of a checkout share, in its folder results/runs."""

    def __init__(self, folder: Path):
        self.path, self.lock = folder / "squeue.json", folder / "squeue.lock"

    def read(self) -> Queue | None:
        """The last answer, however old; None before the first."""
        try:
            found = json.loads(self.path.read_text())
            return Queue(found["time"], tuple(Queued(*job) for job in found["jobs"]))
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def look(self) -> Queue | None:
        """An answer that is at most about SECONDS old, while somebody asks the one before; None where the controller does not answer."""
        with open(self.lock, "w") as f:
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:  # somebody asks just now
                return self.read()
            last = self.read()
            if last is not None and 0 <= time.time() - last.time < SECONDS:
                return last
            if time.time() - _mtime(self.path.with_suffix(".failed")) < SECONDS:
                return None
            asked = time.time()
            try:
                done = subprocess.run(COMMAND, capture_output=True, text=True, timeout=TIMEOUT)
            except (subprocess.TimeoutExpired, OSError):  # no squeue here
                done = None
            if done is None or done.returncode:
                self.path.with_suffix(".failed").touch()
                os.utime(self.path.with_suffix(".failed"))
                return None
            found = Queue(
                asked, tuple(job for job in parse(done.stdout) if job.name.startswith(PREFIX))
            )
            temporary = self.path.with_suffix(f".{os.getpid()}")
            temporary.write_text(
                json.dumps(
                    {"time": asked, "jobs": [list(vars(job).values()) for job in found.jobs]}
                )
            )
            os.replace(temporary, self.path)
            return found

    def since(self, moment: float) -> Queue:
        """An answer asked for after `moment`; RuntimeError where the controller gives none for PATIENCE."""
        end = time.monotonic() + PATIENCE
        while (found := self.look()) is None or found.time < moment:
            if time.monotonic() > end:
                raise RuntimeError(
                    f"squeue has not answered for {PATIENCE:g} s: see that `squeue --me` works"
                )
            time.sleep(0.5)
        return found


def _mtime(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
