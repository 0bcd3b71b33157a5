"""One job's launcher on a login node: submit through submitit, wait, say how it ended.

A job is known by its name, a hash of the path of its folder
`results/runs/<benchmark>/<arm>/<keys>.<stage>.slurm`: one job for these cells of this checkout,
however often it is asked for. The folder's lock is held by the one launcher that looks after it.
Whoever gets the lock looks in the queue for the name first and stays with the job it finds there.
Killed launchers are therefore no loss: jobs go on, records appear, and the same command finds both.
An outcome that the job wrote is believed at once if it is good; a bad one only when SLURM has ended
the job.

Imports no torch and little else, since hundreds of launchers wait side by side.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from distillbench.cells.environment import BEGAN
from distillbench.cluster import messages
from distillbench.cluster.job import INTERRUPTED, Command, signal_delay
from distillbench.cluster.messages import CANCELLED, LOST, OUTCOME, STARTED, log_of
from distillbench.cluster.queue import PATIENCE, PREFIX, Queue, Queued, SharedQueue, stuck
from distillbench.cluster.request import Request, remedy
from distillbench.errors import UserError

POLL = 1.0
# Seconds after the end of a job in which its outcome may still appear on a shared file system.
# After a good end there always is one, and NFS may keep a folder's listing for that long.
NOTICE = 10.0
NOTICE_AFTER = {"CANCELLED": 0.0, "NODE_FAIL": 0.0, "COMPLETED": 60.0}
LAST_LINES = 15  # of a log, that are shown of a job that failed
NAME_DIGITS = 12
ABSENT = "no {} here: run on a login node of the cluster, or without it: snakemake --cores all"
CANCELLED_BEFORE = "cancelled before it was submitted"
STARVED = re.compile(r"^slurmstepd.*exceeded memory limit")
# submitit's first words in the log of a job's every attempt.
ATTEMPT = "Starting with JobEnvironment"
PROGRESS = re.compile(r": .*\d+%, \d+ s left$")


def say(text: str) -> None:
    """Print a line to stderr."""
    print(text, file=sys.stderr, flush=True)


def refuse(text: str) -> NoReturn:
    """Exit with one line and code 2, for a mistake of the user's."""
    say(f"distillbench: {text}")
    sys.exit(2)


def name_of(folder: Path) -> str:
    """Name of the job of a folder: the same for no other one, wherever another checkout lies."""
    digits = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()
    return f"{PREFIX}{digits[:NAME_DIGITS]}"


def scancel(number: str) -> None:
    """Tell SLURM to end a job; whether it does shows in the queue."""
    subprocess.run(["scancel", number], capture_output=True)


@dataclass(frozen=True)
class Ending:
    """How a job ended, by its own word or, where it left none, by SLURM's."""

    why: str = ""
    code: int | None = None  # exit code of its command, by its own word
    state: str = ""  # SLURM's word
    timeout: bool = False  # whether it reached its time limits while no cell was at hand
    final: bool = False  # whether another try would end the same


@dataclass
class Sighting:
    """What a launcher has seen in the queue of the job that it waits for."""

    began: float = field(default_factory=time.time)  # seconds since the epoch
    heard: float = field(default_factory=time.monotonic)  # when the controller last answered
    last: Queued | None = None  # the job as it was last seen
    missing: int = 0  # looks in a row that did not find it
    ended: float = 0.0  # seconds since the epoch when its end was first seen

    def note(self, now: Queued | None) -> None:
        """Note what one look at the queue has found."""
        self.last = now or self.last
        self.missing = 0 if now else self.missing + 1
        if (now is not None and not now.active) or self.missing * POLL > NOTICE / 2:
            self.ended = self.ended or time.time()
        else:
            self.ended = 0.0

    @property
    def notice_is_over(self) -> bool:
        """Whether an outcome of a job that has ended would have appeared by now."""
        notice = NOTICE if self.last is None else NOTICE_AFTER.get(self.last.state, NOTICE)
        return time.time() - self.ended > notice


class Launcher:
    """Sees one job through.

    stamp: the workflow's output, beside which the job has its folder; words: the command line.
    """

    def __init__(self, stamp: Path, words: list[str], request: Request):
        self.stamp = stamp.absolute()
        self.words = words
        self.request = request
        self.folder = Path(f"{self.stamp}.slurm")
        self.runs = self.stamp.parents[2]
        self.queue = SharedQueue(self.runs)
        self.name = name_of(self.folder)
        self.what = " ".join(words)
        self.number: str | None = None  # of the job that is waited for

    def run(self) -> int:
        """Stay until the job has succeeded or was tried often enough; returns an exit code."""
        began = float(os.environ.get(BEGAN, time.time()))
        self.folder.mkdir(parents=True, exist_ok=True)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            return self.run_alone(began)
        except KeyboardInterrupt:
            job = f"job {self.number} goes on" if self.number else "nothing was submitted"
            say(
                f"{self.what}: {job}; the same command continues, "
                "`distillbench cancel` ends the jobs of a table"
            )
            return INTERRUPTED

    def run_alone(self, began: float) -> int:
        """Do what `run` does once no other launcher looks after the job.

        began: seconds since the epoch, when the workflow did.
        """
        with open(self.folder / "lock", "w", encoding="utf-8") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"{self.what}: another launcher looks after this job; waiting for it")
                fcntl.flock(lock, fcntl.LOCK_EX)
            outcome = messages.read(self.folder / OUTCOME)
            if outcome.get("code") == 0 and outcome["time"] >= began:
                return 0  # it was finished meanwhile
            if self.cancelled(began):
                return self.fail(CANCELLED_BEFORE)
            (self.folder / CANCELLED).unlink(missing_ok=True)
            return self.try_often()

    def cancelled(self, since: float = 0.0) -> bool:
        """Whether `distillbench cancel` was here after the moment `since`, in epoch seconds."""
        path = self.folder / CANCELLED
        return path.exists() and path.stat().st_mtime >= since

    def try_often(self) -> int:
        """Submit the job, and again where the machine lost it; returns an exit code."""
        for attempt in range(self.request.tries):
            self.number = None
            if attempt:
                self.pause(attempt)
            try:
                number = self.find_or_submit()
            except RuntimeError as e:  # of sbatch or squeue
                self.fail(str(e))
                continue
            if number is None:
                return self.fail(CANCELLED_BEFORE)
            self.number = number
            code = self.see_through(number)
            if code is not None:
                return code
        return 1

    def pause(self, attempt: int) -> None:
        """Wait before another attempt, each time twice as long."""
        seconds = self.request.backoff_s * 2 ** (attempt - 1)
        count = f"{attempt + 1} of {self.request.tries}"
        say(f"{self.what}: trying again in {seconds:g} s ({count})")
        time.sleep(seconds)

    def find_or_submit(self) -> str | None:
        """Number of the job that is in the queue, or of a new one; None where it was cancelled.

        RuntimeError where squeue or sbatch does not do it but later may.
        """
        found = self.queue.since(time.time()).named(self.name)
        if self.cancelled():
            return None
        if found is not None and self.is_orphan(found):
            scancel(found.id)
            found = None
        (self.folder / LOST).unlink(missing_ok=True)
        if found is None or not found.active:
            return self.submit()
        say(f"{self.what}: job {found.id} is in the queue already ({found.state}): waiting for it")
        return found.id

    def is_orphan(self, job: Queued) -> bool:
        """Whether the launcher of a job that waits was killed before it could write what to run."""
        return job.state == "PENDING" and not self.submitted(job.id).exists()

    def see_through(self, number: str) -> int | None:
        """Stay with a job to its end; an exit code, or None where another try may help."""
        ending = self.wait(number)
        if ending.code == 0:
            self.report(number)
            return 0
        if ending.timeout:
            return self.fail(f"{ending.why}: raise it there")
        out_of_memory = ending.state == "OUT_OF_MEMORY"
        if out_of_memory or (ending.state == "FAILED" and self.starved(number)):
            return self.give_up(number)
        if self.settled():  # by another rank than the one that ended the job
            self.report(number)
            return 0
        self.fail(ending.why, f"job {number} lost: ")
        if self.cancelled():
            return 1
        self.tail(number)
        return 2 if ending.final else None

    def submit(self) -> str:
        """Number of a new job.

        RuntimeError with sbatch's words where it may help to try again, else exits.
        """
        from submitit import SlurmExecutor
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        for name in (OUTCOME, STARTED, LOST):
            (self.folder / name).unlink(missing_ok=True)
        r = self.request
        # Time limits are counted for each cell, by `Command.time_limits`.
        executor = SlurmExecutor(folder=self.folder / "%j", max_num_timeout=10**6)
        executor.update_parameters(
            **r.options(),
            job_name=self.name,
            signal_delay_s=signal_delay(r.minutes),
            stderr_to_stdout=True,
            srun_args=["--kill-on-bad-exit=1"],
            additional_parameters={"requeue": True} | r.sbatch,
        )
        command = Command(self.words, Path.cwd(), self.folder, r.minutes, r.time_limits)
        # A job that SLURM has must have its pickle.
        signals = {signal.SIGINT, signal.SIGTERM}
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        try:
            number = executor.submit(command).job_id
            self.number = number
        except (FailedJobError, FailedSubmissionError, subprocess.SubprocessError, OSError) as e:
            words = " ".join(str(e).split())
            message = words.partition("sbatch: error: ")[2] or words
            help_ = remedy(message)
            if help_ is not None:
                why = f"sbatch refused: {message}: {help_}"
                messages.write(self.folder / LOST, {"why": why})
                refuse(f"{self.what}: {why}")
            raise RuntimeError(f"sbatch refused: {message}") from None
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
        say(f"{self.what}: job {number} submitted")
        return number

    def wait(self, number: str) -> Ending:
        """Wait until a job has ended, by its own word or by the queue's.

        Exits where it would never start.
        """
        seen = Sighting()
        while True:
            outcome = messages.read(self.folder / OUTCOME)
            own = outcome if outcome.get("job") == number else {}
            if own.get("code") == 0:
                return Ending(code=0)
            if self.cancelled():
                scancel(number)
                return Ending("cancelled")
            queue = self.queue.recent()
            self.listen(queue, seen, number)
            if queue is not None and queue.time > seen.began:
                now = queue.job(number, self.name)
                if now is not None and now.state == "PENDING":
                    self.refuse_stuck(now)
                seen.note(now)
                if seen.ended and (own or seen.notice_is_over):
                    return self.ending(number, seen.last, own)
            time.sleep(POLL)

    def listen(self, queue: Queue | None, seen: Sighting, number: str) -> None:
        """Say every PATIENCE seconds that the controller does not answer."""
        long_ago = time.monotonic() - seen.heard > PATIENCE
        if queue is None and long_ago:
            say(
                f"{self.what}: squeue has not answered for {PATIENCE:g} s; waiting for job {number}"
            )
        if queue is not None or long_ago:
            seen.heard = time.monotonic()

    def refuse_stuck(self, job: Queued) -> None:
        """Cancel a job that will never start by itself, and exit with what helps."""
        help_ = stuck(job.reason)
        if help_ is None:
            return
        scancel(job.id)
        why = f"would never start ({job.reason}): {help_}"
        messages.write(self.folder / LOST, {"job": job.id, "why": why})
        refuse(f"{self.what}: job {job.id} {why}")

    def ending(self, number: str, last: Queued | None, own: dict[str, Any]) -> Ending:
        """How a job ended; own: the outcome that it wrote, if any, last: as it was last seen."""
        return Ending(
            why=own.get("why") or self.why(number, last, own),
            code=own.get("code"),
            state=last.state if last is not None and not own else "",
            timeout=own.get("timeout", False),
            final=own.get("final", False),
        )

    def why(self, number: str, last: Queued | None, own: dict[str, Any]) -> str:
        """Words for an end of a job that its command did not choose; arguments as of `ending`."""
        if own:
            return f"its command ended with code {own['code']} on {own['node']}"
        state = "gone"
        if last is not None:
            reason = "" if last.reason in ("None", "") else f" ({last.reason})"
            gone = "gone, last seen " if last.active else ""
            state = f"{gone}{last.state}{reason}"
        started = messages.read(self.folder / STARTED)
        if started.get("job") == number:
            return f"{state} after it had started on {started['node']}"
        return (
            f"{state} before it could start: "
            f"see that the nodes have {self.folder} and {sys.executable}, "
            f"e.g. srun ls {self.runs} {sys.executable}"
        )

    def submitted(self, number: str) -> Path:
        """File of what a job runs, as submitit names it."""
        return self.folder / number / f"{number}_submitted.pkl"

    def lines(self, number: str) -> list[str]:
        """Lines of the job's log; none where there is no log."""
        try:
            text = log_of(self.folder, number).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return []
        return text.splitlines()

    def starved(self, number: str) -> bool:
        """Whether SLURM says in the log of the last attempt that it took too much memory.

        Where SLURM polls for that, no state says so.
        """
        last_attempt: list[str] = []
        for line in self.lines(number):
            if ATTEMPT in line:
                last_attempt = []
            last_attempt.append(line)
        return any(STARVED.search(line) for line in last_attempt)

    def settled(self) -> bool:
        """Whether every cell that the job was to train has a record."""
        from distillbench.cells.work import first_unfinished

        return self.words[0] == "train" and first_unfinished(self.words) is None

    def fail(self, why: str, before: str = "") -> int:
        """Say why there is no record, and keep it for `status` and the partial table.

        Returns exit code 1. before: words before `why` on the screen.
        """
        say(f"{self.what}: {before}{why}")
        note = {"why": why}
        if self.number:
            note["job"] = self.number
        messages.write(self.folder / LOST, note)
        return 1

    def report(self, number: str) -> None:
        """Print what the command said, less its progress."""
        for line in self.lines(number):
            if ": " in line and not line.startswith("submitit ") and not PROGRESS.search(line):
                say(f"{line}  [job {number}]")

    def tail(self, number: str) -> None:
        """Print the end of the job's log, and where it is."""
        for line in self.lines(number)[-LAST_LINES:]:
            say(f"  {line}")
        say(f"  log: {log_of(self.folder, number)}")

    def give_up(self, number: str) -> int:
        """Record that SLURM's limit of memory ended the cell at hand; go on with the others.

        Returns an exit code.
        """
        from distillbench.cells.work import give_up

        gigabytes = f"{self.request.memory_gb:g} GB"
        reason = f"killed by SLURM for lack of memory ({gigabytes}, workflows/resources.yaml)"
        node = messages.read(self.folder / STARTED).get("node")
        if not give_up(self.words, "oom", reason, log_of(self.folder, number), node):
            return self.fail(f"{reason}: raise it there")
        return self.try_often()


def main(stamp: str, request: str, words: list[str]) -> int:
    """Launch the job of a stamp and stay with it; returns an exit code."""
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    for program in ("sbatch", "squeue"):
        if shutil.which(program) is None:
            refuse(ABSENT.format(program))
    try:
        return Launcher(Path(stamp), words, Request.parse(request)).run()
    except OSError as e:
        refuse(
            f"{' '.join(words)}: {e.strerror} ({e.filename}): "
            "make room or make it writable, then rerun; jobs go on"
        )
    except UserError as e:
        refuse(str(e))
