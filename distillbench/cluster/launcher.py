"""One job's launcher on a login node: submit through submitit, wait, say how it ended. Imports no torch and little else, since hundreds
of launchers wait side by side.

A job is known by its name, a hash of the path of its folder `results/runs/<benchmark>/<arm>/<keys>.<stage>.slurm`: one job for
these cells of this checkout, however often it is asked for. The folder's lock is held by the one launcher that looks after it.
Whoever gets the lock looks in the queue for the name first and stays with the job it finds there. Killed launchers are therefore
no loss: jobs go on, records appear, and the same command finds both. An outcome that the job wrote is believed at once if it is
good; a bad one only when SLURM has ended the job.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from distillbench.cells.environment import BEGAN
from distillbench.cluster.job import (
    INTERRUPTED,
    OUTCOME,
    STARTED,
    Work,
    log_of,
    signal_delay,
    write,
)
from distillbench.cluster.queue import PATIENCE, PREFIX, Board, Queued, stuck
from distillbench.errors import UserError

POLL = 1.0
NOTICE = 10.0  # seconds after the end of a job in which its outcome may still appear on a shared file system,
COMPLETED_NOTICE = 60.0  # and after a good end, of which there always is one: NFS may keep a folder's listing for that long
CANCELLED, LOST = (
    "cancelled",
    "lost.json",
)  # files: `distillbench cancel` was here; why there is no record
LAST_LINES = 15
ABSENT = "no {} here: run on a login node of the cluster, or without it: snakemake --cores all"
STARVED = re.compile(r"^slurmstepd.*exceeded memory limit")
ATTEMPT = (
    "Starting with JobEnvironment"  # submitit's first words in the log of a job's every attempt
)
PROGRESS = re.compile(r": .*\d+%, \d+ s left$")
# What sbatch says of a request that no repetition mends, and what does.
REFUSED = {
    "invalid partition": "set `partition` in slurm/site.yaml to one that `sinfo` lists",
    "invalid account": "set `account` in slurm/site.yaml",
    "invalid qos": "set `qos` in slurm/site.yaml",
    "node configuration is not available": "ask for less in workflows/resources.yaml (gpus, cpus, memory_gb, nodes)",
    "more processors requested than permitted": "ask for fewer cpus or ranks in workflows/resources.yaml",
    "requested time limit is invalid": "lower `minutes` in workflows/resources.yaml",
    "unrecognized option": "mend `sbatch` in slurm/site.yaml",
    "invalid option": "mend `sbatch` in slurm/site.yaml",
    "invalid feature": "mend `constraint` in slurm/site.yaml",
}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def refuse(text: str) -> NoReturn:
    """A mistake of the user's: one line, exit code 2."""
    say(f"distillbench: {text}")
    sys.exit(2)


def name_of(folder: Path) -> str:
    """The job's name: the same for this folder alone, wherever another checkout lies."""
    return f"{PREFIX}{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:12]}"


def options(request: dict[str, Any]) -> dict[str, Any]:
    """sbatch's options for a request, in submitit's spelling."""
    r = request
    found = {
        "time": r["minutes"],
        "mem": f"{round(r['memory_gb'] * 1024)}MB",
        "nodes": r["nodes"],
        "ntasks_per_node": r["ranks"],
    }
    return (
        found | {"cpus_per_task": r["cpus"]} | ({"gpus_per_node": r["gpus"]} if r["gpus"] else {})
    )


def remedy(message: str) -> str | None:
    """What helps against a refusal by sbatch that is for good; None where trying again may."""
    return next((help_ for words, help_ in REFUSED.items() if words in message.lower()), None)


def read(path: Path) -> dict[str, Any]:
    """JSON that the job wrote, {} before it did."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


class Launcher:
    """Sees one job through. `request`: resources.Resources and `sbatch`'s options, as resources.request writes them."""

    def __init__(self, stamp: Path, words: list[str], request: dict[str, Any]):
        self.stamp, self.words, self.request = stamp.absolute(), words, request
        self.folder = Path(f"{self.stamp}.slurm")
        self.runs = self.stamp.parents[2]
        self.board = Board(self.runs)
        self.name = name_of(self.folder)
        self.what = " ".join(words)
        self.number: str | None = None  # of the job that is waited for

    def run(self) -> int:
        """Until the job has succeeded or was tried often enough; returns an exit code."""
        began = float(os.environ.get(BEGAN, time.time()))
        self.folder.mkdir(parents=True, exist_ok=True)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            return self.alone(began)
        except KeyboardInterrupt:
            job = f"job {self.number} goes on" if self.number else "nothing was submitted"
            say(
                f"{self.what}: {job}; the same command continues, `distillbench cancel` ends the jobs of a table"
            )
            return INTERRUPTED

    def alone(self, began: float) -> int:
        """The same, as the one launcher that looks after the job; `began`: seconds since the epoch, when the workflow did."""
        with open(self.folder / "lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"{self.what}: another launcher looks after this job; waiting for it")
                fcntl.flock(lock, fcntl.LOCK_EX)
            outcome = read(self.folder / OUTCOME)
            if outcome.get("code") == 0 and outcome["time"] >= began:
                return 0  # it was finished meanwhile
            if self.cancelled(began):
                return self.fail("cancelled before it was submitted")
            (self.folder / CANCELLED).unlink(missing_ok=True)
            return self.tries()

    def cancelled(self, since: float = 0.0) -> bool:
        """`distillbench cancel` was here, after the moment `since`."""
        path = self.folder / CANCELLED
        return path.exists() and path.stat().st_mtime >= since

    def tries(self) -> int:
        """Submit, and again where the machine lost the job."""
        for attempt in range(self.request["tries"]):
            self.number = None
            if attempt:
                pause = self.request["backoff_s"] * 2 ** (attempt - 1)
                say(
                    f"{self.what}: trying again in {pause:g} s ({attempt + 1} of {self.request['tries']})"
                )
                time.sleep(pause)
            try:
                found = self.board.since(time.time()).named(self.name)
                if self.cancelled():
                    return self.fail("cancelled before it was submitted")
                if (
                    found is not None
                    and found.state == "PENDING"
                    and not self.submitted(found.id).exists()
                ):
                    subprocess.run(
                        ["scancel", found.id], capture_output=True
                    )  # its launcher was killed while it submitted
                    found = None
                (self.folder / LOST).unlink(missing_ok=True)
                number = found.id if found is not None and found.active else self.submit()
            except RuntimeError as e:  # of sbatch or squeue
                self.fail(str(e))
                continue
            if found is not None and found.id == number:
                say(
                    f"{self.what}: job {number} is in the queue already ({found.state}): waiting for it"
                )
            self.number = number
            outcome = self.wait(number)
            if outcome.get("code") == 0:
                self.report(number)
                return 0
            if outcome.get("timeout"):
                return self.fail(f"{outcome['why']}: raise it there")
            state = outcome.get("state")
            if state == "OUT_OF_MEMORY" or (state == "FAILED" and self.starved(number)):
                return self.give_up(number)
            if self.settled():  # by another rank than the one that ended the job
                self.report(number)
                return 0
            self.fail(outcome["why"], f"job {number} lost: ")
            if self.cancelled():
                break
            self.tail(number)
            if outcome.get("final"):
                return 2
        return 1

    def submit(self) -> str:
        """The number of a new job; RuntimeError with sbatch's words where it may help to try again, else exit."""
        from submitit import SlurmExecutor
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        for name in (OUTCOME, STARTED, LOST):
            (self.folder / name).unlink(missing_ok=True)
        r = self.request
        executor = SlurmExecutor(
            folder=self.folder / "%j", max_num_timeout=10**6
        )  # our own count: Work.time_limits
        executor.update_parameters(
            **options(r),
            job_name=self.name,
            signal_delay_s=signal_delay(r["minutes"]),
            stderr_to_stdout=True,
            srun_args=["--kill-on-bad-exit=1"],
            additional_parameters={"requeue": True} | r["sbatch"],
        )
        work = Work(self.words, Path.cwd(), self.folder, r["minutes"], r["time_limits"])
        signals = {signal.SIGINT, signal.SIGTERM}
        signal.pthread_sigmask(
            signal.SIG_BLOCK, signals
        )  # a job that SLURM has must have its pickle
        try:
            number = executor.submit(work).job_id
            self.number = number
        except (FailedJobError, FailedSubmissionError, subprocess.SubprocessError, OSError) as e:
            message = " ".join(str(e).split())
            message = message.partition("sbatch: error: ")[2] or message
            if help_ := remedy(message):
                write(self.folder / LOST, {"why": f"sbatch refused: {message}: {help_}"})
                refuse(f"{self.what}: sbatch refused: {message}: {help_}")
            raise RuntimeError(f"sbatch refused: {message}") from None
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
        say(f"{self.what}: job {number} submitted")
        return number

    def wait(self, number: str) -> dict[str, Any]:
        """How the job ended: what it wrote itself, or {"why"} in SLURM's words."""
        began, missing, ended = time.time(), 0, 0.0
        last: Queued | None = None
        heard = time.monotonic()
        while True:
            outcome = read(self.folder / OUTCOME)
            own = outcome if outcome.get("job") == number else {}
            if own.get("code") == 0:
                return own
            if self.cancelled():
                subprocess.run(["scancel", number], capture_output=True)
                return {"why": "cancelled"}
            queue = self.board.look()
            if queue is None and time.monotonic() - heard > PATIENCE:
                say(
                    f"{self.what}: squeue has not answered for {PATIENCE:g} s; waiting for job {number}"
                )
            if queue is not None or time.monotonic() - heard > PATIENCE:
                heard = time.monotonic()
            if queue is not None and queue.time > began:
                now = queue.job(number, self.name)
                last = now or last
                missing = 0 if now else missing + 1
                if now is not None and now.state == "PENDING" and (help_ := stuck(now.reason)):
                    subprocess.run(["scancel", number], capture_output=True)
                    why = f"would never start ({now.reason}): {help_}"
                    write(self.folder / LOST, {"job": number, "why": why})
                    refuse(f"{self.what}: job {number} {why}")
                over = (now is not None and not now.active) or missing * POLL > NOTICE / 2
                ended = (ended or time.time()) if over else 0.0
                notice = {"CANCELLED": 0.0, "NODE_FAIL": 0.0, "COMPLETED": COMPLETED_NOTICE}.get(
                    last.state if last else "", NOTICE
                )
                if over and (own or time.time() - ended > notice):
                    state = {"state": last.state} if last is not None and not own else {}
                    return own | state | {"why": own.get("why") or self.why(number, last, own)}
            time.sleep(POLL)

    def why(self, number: str, last: Queued | None, own: dict[str, Any]) -> str:
        """A job's end that the command did not choose."""
        reason = f" ({last.reason})" if last is not None and last.reason not in ("None", "") else ""
        state = (
            "gone"
            if last is None
            else f"{'gone, last seen ' if last.active else ''}{last.state}{reason}"
        )
        if own:
            return f"its command ended with code {own['code']} on {own['node']}"
        if read(self.folder / STARTED).get("job") == number:
            return f"{state} after it had started on {read(self.folder / STARTED)['node']}"
        return (
            f"{state} before it could start: see that the nodes have {self.folder} and {sys.executable}, "
            f"e.g. srun ls {self.runs} {sys.executable}"
        )

    def submitted(self, number: str) -> Path:
        """What a job runs, as submitit names it."""
        return self.folder / number / f"{number}_submitted.pkl"

    def lines(self, number: str) -> list[str]:
        """Of the job's log."""
        try:
            return log_of(self.folder, number).read_text(errors="replace").splitlines()
        except OSError:
            return []

    def starved(self, number: str) -> bool:
        """SLURM's last words in the log, of the last attempt, are that it took too much memory: where it polls, no state says so."""
        lines = self.lines(number)
        last = max((i for i, line in enumerate(lines) if ATTEMPT in line), default=0)
        return any(STARVED.search(line) for line in lines[last:])

    def settled(self) -> bool:
        """Every cell that the job was to train has a record."""
        from distillbench.cells.work import at_hand

        return self.words[0] == "train" and at_hand(self.words) is None

    def fail(self, why: str, before: str = "") -> int:
        """Say why there is no record and keep it for `status` and the partial table."""
        say(f"{self.what}: {before}{why}")
        write(self.folder / LOST, {"why": why} | ({"job": self.number} if self.number else {}))
        return 1

    def report(self, number: str) -> None:
        """What the command said, less its progress."""
        for line in self.lines(number):
            if ": " in line and not line.startswith("submitit ") and not PROGRESS.search(line):
                say(f"{line}  [job {number}]")

    def tail(self, number: str) -> None:
        """The end of the job's log, and where it is."""
        for line in self.lines(number)[-LAST_LINES:]:
            say(f"  {line}")
        say(f"  log: {log_of(self.folder, number)}")

    def give_up(self, number: str) -> int:
        """Record that SLURM's limit of memory ended the cell at hand, and go on with the job's other cells."""
        from distillbench.cells.work import give_up

        reason = f"killed by SLURM for lack of memory ({self.request['memory_gb']:g} GB, workflows/resources.yaml)"
        if not give_up(
            self.words,
            "oom",
            reason,
            log_of(self.folder, number),
            read(self.folder / STARTED).get("node"),
        ):
            return self.fail(f"{reason}: raise it there")
        return self.tries()


def main(stamp: str, request: str, words: list[str]) -> int:
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    for program in ("sbatch", "squeue"):
        if shutil.which(program) is None:
            refuse(ABSENT.format(program))
    try:
        return Launcher(Path(stamp), words, json.loads(request)).run()
    except OSError as e:
        refuse(
            f"{' '.join(words)}: {e.strerror} ({e.filename}): make room or make it writable, then rerun; jobs go on"
        )
    except UserError as e:
        refuse(str(e))
