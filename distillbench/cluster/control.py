"""A cluster as the command line sees it: would it take the jobs, which has it, and an end to them.

Imports no torch.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from distillbench.cells.jobs import Job
from distillbench.cluster import messages
from distillbench.cluster.launcher import ABSENT, name_of
from distillbench.cluster.messages import CANCELLED, LOST
from distillbench.cluster.queue import Queue, Queued, SharedQueue
from distillbench.cluster.request import Request, remedy
from distillbench.config import root
from distillbench.errors import UserError
from distillbench.registry import resources

SECONDS = 30  # that sbatch and scancel may take to answer
STAGES = ("trained", "evaluated")
HOUR = 3600


@dataclass(frozen=True)
class JobState:
    """Where a cell's job on a cluster is: in the queue, lost, or (by default) nowhere."""

    queued: Queued | None = None
    why: str = ""  # it was lost
    evaluates: bool = False  # rather than trains


def check_requests(requests: Iterable[str]) -> None:
    """Ask sbatch about every distinct request, in JSON, without submitting anything.

    UserError with its words and the remedy where it refuses one.
    """
    for program in ("sbatch", "srun", "squeue"):
        if shutil.which(program) is None:
            raise UserError(ABSENT.format(program))
    for request in sorted(set(requests)):
        _check(Request.parse(request))


def _check(request: Request) -> None:
    command = ["sbatch", "--test-only", *request.flags(), "--wrap", "true"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        raise UserError(
            f"sbatch has not answered for {SECONDS} s: see that `sinfo` works, then rerun"
        ) from None
    if done.returncode:
        message = " ".join(done.stderr.split())
        for words in ("sbatch: error: ", "allocation failure: "):
            message = message.replace(words, "")
        help_ = remedy(message) or "see slurm/site.yaml and workflows/resources.yaml"
        raise UserError(f"sbatch refuses the jobs: {message}: {help_}")


def launched(jobs: Iterable[Job]) -> Iterator[tuple[Job, str, Path]]:
    """(job, stage, folder) of the jobs that were ever launched on a cluster."""
    for job in jobs:
        for stage in STAGES:
            folder = root() / f"{job.stamp(stage)}.slurm"
            if folder.is_dir():
                yield job, stage, folder


def job_states(jobs: list[Job]) -> dict[str, JobState]:
    """States of jobs by the keys of their cells; empty where no cluster was used.

    Asks squeue as rarely as the launchers do.
    """
    found = list(launched(jobs))
    if not found:
        return {}
    queue = _shared_queue().recent() if shutil.which("squeue") else None
    states: dict[str, JobState] = {}
    for job, stage, folder in found:
        state = _state(folder, stage, queue)
        if state is not None:
            states |= {cell.key: state for cell in job.cells}
    return states


def _state(folder: Path, stage: str, queue: Queue | None) -> JobState | None:
    """State of the job of a folder; None where it is neither lost nor in the queue."""
    why = messages.read(folder / LOST).get("why")
    if why is not None:
        return JobState(why=why)
    queued = None if queue is None else queue.named(name_of(folder))
    if queued is None or not queued.active:
        return None
    return JobState(queued, evaluates=stage == "evaluated")


def _shared_queue() -> SharedQueue:
    return SharedQueue(root() / "results/runs")


def cancel(jobs: list[Job]) -> list[str]:
    """End the active jobs of these cells; returns their numbers.

    Their launchers do not try again, and those still to come do not submit.
    """
    if shutil.which("scancel") is None:
        raise UserError("no scancel here: run on a login node of the cluster")
    for job in jobs:
        for stage in STAGES:
            _mark_cancelled(root() / job.stamp(stage))
    found = list(launched(jobs))
    try:
        queue = _shared_queue().since(time.time())
    except RuntimeError as e:
        raise UserError(str(e)) from None
    active = []
    for _, _, folder in found:
        queued = queue.named(name_of(folder))
        if queued is not None and queued.active:
            active.append(queued.id)
    if active:
        done = subprocess.run(["scancel", *active], capture_output=True, text=True, timeout=SECONDS)
        if done.returncode:
            raise UserError(f"scancel: {' '.join(done.stderr.split())}")
    return active


def _mark_cancelled(stamp: Path) -> None:
    """Tell the launchers of an unfinished stage, present and future, to submit nothing."""
    if stamp.exists():
        return
    folder = Path(f"{stamp}.slurm")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CANCELLED).touch()


def hours(job: Job, seconds: float) -> tuple[float, float]:
    """(GPU-hours, core-hours) of so many seconds of a job."""
    r = resources.of(job.benchmark, job.arm)
    gpus = r.nodes * r.gpus
    cores = r.nodes * r.ranks * r.cpus
    return gpus * seconds / HOUR, cores * seconds / HOUR
