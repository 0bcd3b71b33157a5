"""What runs inside a SLURM job: one `distillbench` command, in as many attempts as it takes.

SLURM ends an attempt in three ways. At the time limit and on preemption it sends SIGUSR2, on which
submitit calls `checkpoint` and requeues the job. `scontrol requeue` and preemption without that
signal send SIGTERM, then SIGKILL, and start the job again by themselves. Every process of the job
gets these signals, the command among them: it saves a checkpoint and ends (cells/supervisor.py).
Its end is then nobody's failure: this process waits until SLURM ends it and leaves no outcome.
Imports no torch.
"""

from __future__ import annotations

import os
import platform
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from distillbench.cells.environment import LOG
from distillbench.cluster import messages
from distillbench.cluster.messages import MEETING, OUTCOME, STARTED, log_of

INTERRUPTED = 130
POLL = 0.1
LEAVE_SECONDS = 60.0  # for the command to save a checkpoint
TAKEN_SECONDS = 900.0  # for SLURM to take an attempt away that it has told to leave
# Exit codes of a command that somebody has ended.
SOMEBODY = {INTERRUPTED, -signal.SIGTERM, -signal.SIGUSR2, -signal.SIGINT}
EARLY = 65.0  # seconds that SLURM may warn too early: 60 by its documentation


def signal_delay(minutes: float) -> int:
    """Seconds before a time limit at which SLURM is to send SIGUSR2; few of a short limit."""
    return int(min(90, minutes * 15))


def packages() -> dict[str, str]:
    """Versions that must be the same where a job is submitted and where it runs."""
    versions = {"python": ".".join(platform.python_version_tuple()[:2])}
    for name in ("torch", "numpy"):
        versions[name] = version(name)
    return versions


class Command:
    """A command line of distillbench in a job; submitit pickles it between attempts.

    root: of the checkout; folder: of the job; minutes: its time limit; time_limits: how many of
    them a cell may reach.
    """

    def __init__(
        self, words: list[str], root: Path, folder: Path, minutes: float, time_limits: int
    ):
        self.words = words
        self.root = root
        self.folder = folder
        self.minutes = minutes
        self.time_limits = time_limits
        self.left = time_limits  # that the cell at hand may still reach
        self.cell = ""  # label of the cell that was at hand at the last limit
        self.packages = packages()
        self._child: subprocess.Popen | None = None
        self._began = 0.0

    def __call__(self) -> None:
        """Run the command; its outcome is written by rank 0 unless SLURM interrupts it."""
        from submitit import JobEnvironment

        job = JobEnvironment()
        self._began = time.monotonic()
        first = job.global_rank == 0
        here = {
            "job": job.job_id,
            "node": job.hostname,
            "attempt": _restarts(),
            "time": time.time(),
        }
        self._compare_packages(here)
        if first:
            (self.folder / OUTCOME).unlink(missing_ok=True)  # of an attempt that was taken away
            messages.write(self.folder / STARTED, here)
        command = [sys.executable, "-m", "distillbench.cli", *self.words]
        environment = {
            **os.environ,
            **self.rank_environment(job),
            LOG: os.path.relpath(self.log(), self.root),
        }
        child = subprocess.Popen(command, cwd=self.root, env=environment)
        self._child = child  # `checkpoint`, which a signal calls, takes it away
        while child.poll() is None:
            time.sleep(POLL)
        code = child.returncode
        if code in SOMEBODY:
            time.sleep(TAKEN_SECONDS)
        if first:
            messages.write(self.folder / OUTCOME, here | {"code": code, "time": time.time()})
        if code:
            sys.exit(1)  # with several ranks srun then ends the others

    def _compare_packages(self, here: dict[str, Any]) -> None:
        """Exit with an outcome where this node has other versions than the login node."""
        found = packages()
        if found == self.packages:
            return
        differing = ", ".join(
            f"{name} {found[name]} instead of {wanted}"
            for name, wanted in self.packages.items()
            if found[name] != wanted
        )
        why = f"node {here['node']} has {differing}: use one environment"
        messages.write(self.folder / OUTCOME, here | {"code": 2, "final": True, "why": why})
        sys.exit(1)  # whatever the rank: srun then ends the others

    def rank_environment(self, job: Any) -> dict[str, str]:
        """Variables by which ranks find each other (cells/ranks.py); none for one rank.

        job: submitit's JobEnvironment. Rank 0 says where, the others wait for its word.
        """
        if job.num_tasks == 1:
            return {}
        meeting = self.folder / MEETING
        attempt = f"{job.job_id}.{_restarts()}"
        if job.global_rank == 0:
            message = {"attempt": attempt, "address": job.hostname, "port": _free_port()}
            messages.write(meeting, message)
        found = messages.read(meeting)
        while found.get("attempt") != attempt:
            time.sleep(POLL)
            found = messages.read(meeting)
        return {
            "WORLD_SIZE": str(job.num_tasks),
            "RANK": str(job.global_rank),
            "LOCAL_RANK": str(job.local_rank),
            "MASTER_ADDR": found["address"],
            "MASTER_PORT": str(found["port"]),
        }

    def checkpoint(self) -> Any:
        """submitit's hook on SIGUSR2, in rank 0: the command to go on with in the next attempt.

        Everything is on disk once the command has ended. A cell that has reached too many time
        limits gets a record; None, for no further attempt, if nothing was being trained.
        """
        from submitit.helpers import DelayedSubmission

        child = self._child
        self._child = None
        if child is not None and child.returncode is None:
            _let_leave(child)
        # Earlier it is preemption.
        at_limit = 60 * self.minutes - signal_delay(self.minutes) - EARLY
        if time.monotonic() - self._began > at_limit:
            cell = self.at_hand()
            if cell not in ("", self.cell):
                self.left = self.time_limits
            self.left -= 1
            self.cell = cell
        if self.left < 0 and not self.give_up():
            return None
        return DelayedSubmission(self)

    def at_hand(self) -> str:
        """Label of the cell that is being trained, '' where none is."""
        from distillbench.cells.work import first_unfinished

        os.chdir(self.root)
        cell = first_unfinished(self.words)
        return "" if cell is None else cell.label

    def log(self) -> Path:
        """Log of this job, of all its attempts."""
        return log_of(self.folder, os.environ["SLURM_JOB_ID"])

    def give_up(self) -> bool:
        """Record the cell at hand as timed out; False, with an outcome, where none is.

        The job's other cells have all their time limits yet.
        """
        from distillbench.cells.work import give_up

        jobs = self.time_limits + 1
        why = f"not done in {jobs} jobs of {self.minutes:g} min (workflows/resources.yaml)"
        self.left = self.time_limits
        if give_up(self.words, "timeout", why, self.log()):
            return True
        outcome = {
            "job": os.environ["SLURM_JOB_ID"],
            "node": socket.gethostname(),
            "time": time.time(),
            "code": INTERRUPTED,
            "timeout": True,
            "why": why,
        }
        messages.write(self.folder / OUTCOME, outcome)
        return False


def _restarts() -> int:
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("", 0))
        return s.getsockname()[1]


def _let_leave(child: subprocess.Popen) -> None:
    """Ask a command to save a checkpoint and end; kill one that has not after LEAVE_SECONDS.

    It is not reaped here: `Popen.poll`, which a signal may have interrupted, does that.
    """
    still_there = os.WEXITED | os.WNOWAIT | os.WNOHANG
    with suppress(ProcessLookupError, ChildProcessError):  # it has ended, and may be reaped
        os.kill(child.pid, signal.SIGUSR2)
        end = time.monotonic() + LEAVE_SECONDS
        while time.monotonic() < end and os.waitid(os.P_PID, child.pid, still_there) is None:
            time.sleep(POLL)
        os.kill(child.pid, signal.SIGKILL)
