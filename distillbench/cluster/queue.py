"""SLURM's queue, asked at most every five seconds by all launchers of a checkout together.

The answer lies in `results/runs/squeue.json`; whoever finds it too old asks anew, the others read.
It works without accounting (sacct). Imports no torch.
"""

from __future__ import annotations

import fcntl
import json
import subprocess
import time
from dataclasses import astuple, dataclass
from pathlib import Path

from distillbench.cells.disk import replace_file

SECONDS = 5.0  # between two questions
TIMEOUT = 60.0  # of one question
PATIENCE = 300.0  # with a controller that does not answer
POLL = 0.5
PREFIX = "distillbench-"  # of the suite's job names; a user's other jobs are not kept
COMMAND = ("squeue", "--me", "--noheader", "--array", "--states=all", "--format=%i|%T|%j|%M|%r|%N")
FIELDS = 6  # that COMMAND asks for
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
    "launch failed requeued held": (
        "the node cannot start jobs: exclude it in slurm/site.yaml (sbatch: {exclude: NODE})"
    ),
}
PER_JOB = "ask for less in workflows/resources.yaml"  # reasons like QOSMaxWallDurationPerJobLimit


def stuck(reason: str) -> str | None:
    """What helps a job that will never start by itself; None for one that may."""
    if reason in STUCK:
        return STUCK[reason]
    return PER_JOB if "PerJob" in reason else None


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
        """Whether it waits or runs."""
        return self.state not in ENDED


@dataclass(frozen=True)
class Queue:
    """All distillbench jobs of this user, as seen at `time` (seconds since the epoch)."""

    time: float
    jobs: tuple[Queued, ...]

    def named(self, name: str) -> Queued | None:
        """The job of this name: the one that is active, or else the latest."""

        def rank(job: Queued) -> tuple[bool, int]:
            return job.active, int(job.id.split("_")[0])

        return max((job for job in self.jobs if job.name == name), key=rank, default=None)

    def job(self, number: str, name: str) -> Queued | None:
        """The job of this id and name: ids begin anew after a controller lost its state."""
        for job in self.jobs:
            if job.id == number and job.name == name:
                return job
        return None


def parse(text: str) -> tuple[Queued, ...]:
    """Jobs that stand in lines of COMMAND's output."""
    lines = [line.strip().split("|", FIELDS - 1) for line in text.splitlines()]
    return tuple(Queued(*fields) for fields in lines if len(fields) == FIELDS)


class SharedQueue:
    """The answer of squeue that the launchers of a checkout share.

    folder: results/runs of the checkout.
    """

    def __init__(self, folder: Path):
        self.path = folder / "squeue.json"
        self.lock = folder / "squeue.lock"
        self.failed = folder / "squeue.failed"

    def last(self) -> Queue | None:
        """The last answer, however old; None before the first."""
        try:
            answer = json.loads(self.path.read_text(encoding="utf-8"))
            return Queue(answer["time"], tuple(Queued(*job) for job in answer["jobs"]))
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def recent(self) -> Queue | None:
        """An answer that is at most about SECONDS old; None where the controller gives none.

        While another process asks it is the answer before.
        """
        with open(self.lock, "w", encoding="utf-8") as f:
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return self.last()
            last = self.last()
            if last is not None and 0 <= time.time() - last.time < SECONDS:
                return last
            if time.time() - _modified(self.failed) < SECONDS:
                return None
            return self._ask()

    def _ask(self) -> Queue | None:
        """Ask squeue and keep its answer; None, and a note of that, where it gives none."""
        asked = time.time()
        text = _squeue()
        if text is None:
            self.failed.touch()
            return None
        jobs = tuple(job for job in parse(text) if job.name.startswith(PREFIX))
        answer = {"time": asked, "jobs": [astuple(job) for job in jobs]}
        replace_file(self.path, json.dumps(answer).encode())
        return Queue(asked, jobs)

    def since(self, moment: float) -> Queue:
        """An answer asked for after `moment`, in seconds since the epoch.

        RuntimeError where the controller gives none for PATIENCE.
        """
        end = time.monotonic() + PATIENCE
        while True:
            queue = self.recent()
            if queue is not None and queue.time >= moment:
                return queue
            if time.monotonic() > end:
                raise RuntimeError(
                    f"squeue has not answered for {PATIENCE:g} s: see that `squeue --me` works"
                )
            time.sleep(POLL)


def _squeue() -> str | None:
    """COMMAND's output; None where it fails, does not answer or is not installed."""
    try:
        done = subprocess.run(COMMAND, capture_output=True, text=True, timeout=TIMEOUT)
    except (subprocess.TimeoutExpired, OSError):
        return None
    return None if done.returncode else done.stdout


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
