"""A cluster as the command line sees it: would it take the jobs, which are in its queue, what did it lose; and an end to all of them."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distillbench.cells.jobs import Job
from distillbench.cluster.launcher import ABSENT, CANCELLED, LOST, name_of, options, read, remedy
from distillbench.cluster.queue import Board, Queued
from distillbench.config import root
from distillbench.errors import UserError
from distillbench.registry import resources

SECONDS = 30
STAGES = ("trained", "evaluated")


@dataclass(frozen=True)
class Place:
    """Where a cell's job is: in the queue as `queued`, or lost for the reason `why`; `evaluates` rather than trains."""

    queued: Queued | None = None
    why: str = ""
    evaluates: bool = False


def flags(request: dict[str, Any]) -> list[str]:
    """sbatch's options for a request (`distillbench.resources.request`), as submitit writes them into its script."""
    found = {key.replace("_", "-"): value for key, value in options(request).items()} | request[
        "sbatch"
    ]
    return [f"--{key}" if value is True else f"--{key}={value}" for key, value in found.items()]


def check(requests: Iterable[str]) -> None:
    """Ask sbatch about every distinct request without submitting anything; UserError with its words and the remedy."""
    for program in ("sbatch", "srun", "squeue"):
        if shutil.which(program) is None:
            raise UserError(ABSENT.format(program))
    for request in sorted(set(requests)):
        command = ["sbatch", "--test-only", *flags(json.loads(request)), "--wrap", "true"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
        except subprocess.TimeoutExpired:
            raise UserError(
                f"sbatch has not answered for {SECONDS} s: see that `sinfo` works, then rerun"
            ) from None
        if done.returncode:
            message = (
                " ".join(done.stderr.split())
                .replace("sbatch: error: ", "")
                .replace("allocation failure: ", "")
            )
            help_ = remedy(message) or "see slurm/site.yaml and workflows/resources.yaml"
            raise UserError(f"sbatch refuses the jobs: {message}: {help_}")


def folders(jobs: Iterable[Job]) -> Iterator[tuple[Job, str, Path]]:
    """(job, stage, folder) of those that were ever launched on a cluster."""
    for job in jobs:
        for stage in STAGES:
            if (folder := root() / f"{job.stamp(stage)}.slurm").is_dir():
                yield job, stage, folder


def places(jobs: list[Job]) -> dict[str, Place]:
    """By the key of a cell; empty where no cluster was used. Asks squeue as rarely as the launchers do."""
    launched = list(folders(jobs))
    if not launched:
        return {}
    queue = Board(root() / "results/runs").look() if shutil.which("squeue") else None
    found: dict[str, Place] = {}
    for job, stage, folder in launched:
        queued = queue.named(name_of(folder)) if queue is not None else None
        if (why := read(folder / LOST).get("why")) is not None:
            found |= {cell.key: Place(why=why) for cell in job.cells}
        elif queued is not None and queued.active:
            found |= {cell.key: Place(queued, evaluates=stage == "evaluated") for cell in job.cells}
    return found


def cancel(jobs: list[Job]) -> list[str]:
    """End the active jobs of these cells; their launchers do not try again, and those still to come do not submit. Job numbers."""
    if shutil.which("scancel") is None:
        raise UserError("no scancel here: run on a login node of the cluster")
    for stamp in (root() / job.stamp(stage) for job in jobs for stage in STAGES):
        if not stamp.exists():
            (folder := Path(f"{stamp}.slurm")).mkdir(parents=True, exist_ok=True)
            (folder / CANCELLED).touch()
    launched = list(folders(jobs))
    try:
        queue = Board(root() / "results/runs").since(time.time())
    except RuntimeError as e:
        raise UserError(str(e)) from None
    active = [
        q.id
        for *_, folder in launched
        if (q := queue.named(name_of(folder))) is not None and q.active
    ]
    if active:
        done = subprocess.run(["scancel", *active], capture_output=True, text=True, timeout=SECONDS)
        if done.returncode:
            raise UserError(f"scancel: {' '.join(done.stderr.split())}")
    return active


def hours(job: Job, seconds: float) -> tuple[float, float]:
    """(GPU-hours, core-hours) of so many seconds of a job."""
    r = resources.of(job.benchmark, job.arm)
    return r.nodes * r.gpus * seconds / 3600, r.nodes * r.ranks * r.cpus * seconds / 3600
