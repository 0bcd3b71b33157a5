"""What runs inside a SLURM job: one `distillbench` command, in as many attempts as preemption and time limits make of it.

SLURM ends an attempt in three ways. At the time limit and on preemption it sends SIGUSR2, on which submitit calls `checkpoint` and
requeues the job. `scontrol requeue` and preemption without that signal send SIGTERM, then SIGKILL, and start the job again by
themselves. Every process of the job gets these signals, the command among them: it saves a checkpoint and ends (distillbench/watch.py).
Its end is then nobody's failure: this process waits until SLURM ends it and leaves no outcome. Imports no torch.
"""

from __future__ import annotations

import json
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

OUTCOME, STARTED, MEETING = "outcome.json", "started.json", "meeting.json"
INTERRUPTED = 130
POLL = 0.1
LEAVE_SECONDS = 60.0  # for the command to save a checkpoint
TAKEN_SECONDS = 900.0  # for SLURM to take an attempt away that it has told to leave
SOMEBODY = {INTERRUPTED, -signal.SIGTERM, -signal.SIGUSR2, -signal.SIGINT}
EARLY = 65.0  # seconds that SLURM may warn too early: 60 by its documentation


def signal_delay(minutes: float) -> int:
    """Seconds before a time limit at which SLURM is to send SIGUSR2: not too many of a short one."""
    return int(min(90, minutes * 15))


def write(path: Path, value: dict[str, Any]) -> None:
    """JSON, atomically; on a file system shared with the launcher."""
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    temporary.write_text(json.dumps(value) + "\n")
    os.replace(temporary, path)


def packages() -> dict[str, str]:
    """What must be the same where a job is submitted and where it runs."""
    return {"python": ".".join(platform.python_version_tuple()[:2])} | {
        name: version(name) for name in ("torch", "numpy")
    }


def log_of(folder: Path, number: str) -> Path:
    """What rank 0 of a job wrote, as submitit names it."""
    return folder / number / f"{number}_0_log.out"


class Work:
    """A command line of distillbench in a job; submitit pickles it. `time_limits`: how many limits a cell may reach."""

    def __init__(
        self, words: list[str], root: Path, folder: Path, minutes: float, time_limits: int
    ):
        self.words, self.root, self.folder = words, root, folder
        self.minutes, self.time_limits = minutes, time_limits
        self.left, self.cell = (
            time_limits,
            "",
        )  # of the cell at hand; which one that was at the last limit
        self.packages = packages()
        self._child: subprocess.Popen | None = None
        self._began = 0.0

    def __call__(self) -> None:
        """Run the command; its outcome is written by rank 0 unless SLURM interrupts it."""
        from submitit import JobEnvironment

        job, self._began = JobEnvironment(), time.monotonic()
        first = job.global_rank == 0
        here = {
            "job": job.job_id,
            "node": job.hostname,
            "attempt": int(os.environ.get("SLURM_RESTART_COUNT", "0")),
            "time": time.time(),
        }
        if (found := packages()) != self.packages:
            differing = ", ".join(
                f"{k} {found[k]} instead of {v}" for k, v in self.packages.items() if found[k] != v
            )
            why = f"node {job.hostname} has {differing}: use one environment"
            write(self.folder / OUTCOME, here | {"code": 2, "final": True, "why": why})
            sys.exit(1)  # whatever the rank: srun then ends the others
        if first:
            (self.folder / OUTCOME).unlink(missing_ok=True)  # of an attempt that was taken away
            write(self.folder / STARTED, here)
        command = [sys.executable, "-m", "distillbench.cli", *self.words]
        environment = os.environ | self.place(job) | {LOG: os.path.relpath(self.log(), self.root)}
        self._child = child = subprocess.Popen(command, cwd=self.root, env=environment)
        while child.poll() is None:
            time.sleep(POLL)
        code = child.returncode
        if code in SOMEBODY:
            time.sleep(TAKEN_SECONDS)
        if first:
            write(self.folder / OUTCOME, here | {"code": code, "time": time.time()})
        if code:
            sys.exit(1)  # with several ranks srun then ends the others

    def place(self, job: Any) -> dict[str, str]:
        """The environment by which ranks find each other (`distillbench.ranks`); nothing for one."""
        if job.num_tasks == 1:
            return {}
        meeting = self.folder / MEETING
        attempt = f"{job.job_id}.{os.environ.get('SLURM_RESTART_COUNT', '0')}"
        if job.global_rank == 0:
            with socket.socket() as s:
                s.bind(("", 0))
                port = s.getsockname()[1]
            write(meeting, {"attempt": attempt, "address": job.hostname, "port": port})
        while True:
            try:
                found = json.loads(meeting.read_text())
                if found["attempt"] == attempt:
                    break
            except (OSError, ValueError):
                pass
            time.sleep(POLL)
        return {
            "WORLD_SIZE": str(job.num_tasks),
            "RANK": str(job.global_rank),
            "LOCAL_RANK": str(job.local_rank),
            "MASTER_ADDR": found["address"],
            "MASTER_PORT": str(found["port"]),
        }

    def checkpoint(self) -> Any:
        """submitit's hook on SIGUSR2, in rank 0: everything is on disk once the command has ended; the same work goes on in the next
        attempt. A cell that has reached too many time limits gets a record; None, for no further attempt, if nothing was being trained."""
        from submitit.helpers import DelayedSubmission

        child, self._child = self._child, None
        if child is not None and child.returncode is None:
            with suppress(ProcessLookupError, ChildProcessError):  # it has ended, and may be reaped
                os.kill(child.pid, signal.SIGUSR2)
                end = time.monotonic() + LEAVE_SECONDS
                while (
                    time.monotonic() < end
                    and os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None
                ):
                    time.sleep(POLL)
                os.kill(child.pid, signal.SIGKILL)
        if (
            time.monotonic() - self._began > 60 * self.minutes - signal_delay(self.minutes) - EARLY
        ):  # earlier it is preemption
            cell = self.at_hand()
            self.left, self.cell = (
                (self.left if cell in ("", self.cell) else self.time_limits) - 1,
                cell,
            )
        if self.left < 0 and not self.give_up():
            return None
        return DelayedSubmission(self)

    def at_hand(self) -> str:
        """The label of the cell that is being trained, "" where none is."""
        from distillbench.cells.work import at_hand

        os.chdir(self.root)
        return cell.label if (cell := at_hand(self.words)) else ""

    def log(self) -> Path:
        """Of this job, all its attempts."""
        return log_of(self.folder, os.environ["SLURM_JOB_ID"])

    def give_up(self) -> bool:
        """Record the cell at hand as timed out; the job's other cells have all their time limits yet."""
        from distillbench.cells.work import give_up

        why = f"not done in {self.time_limits + 1} jobs of {self.minutes:g} min (workflows/resources.yaml)"
        self.left = self.time_limits
        if give_up(self.words, "timeout", why, self.log()):
            return True
        here = {
            "job": os.environ["SLURM_JOB_ID"],
            "node": socket.gethostname(),
            "time": time.time(),
        }
        write(self.folder / OUTCOME, here | {"code": INTERRUPTED, "timeout": True, "why": why})
        return False
