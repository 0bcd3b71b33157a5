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

from distillbench.slurm_job import INTERRUPTED, OUTCOME, STARTED, Work, signal_delay, write
from distillbench.squeue import STUCK, Board, Queued

POLL = 1.0
NOTICE = 10.0  # seconds after the end of a job in which its outcome may still appear on a shared file system
BEGAN = "DISTILLBENCH_BEGAN"  # when the workflow did: a variable of the environment, set in the Snakefile
CANCELLED, LOST = "cancelled", "lost.json"  # files: `distillbench cancel` was here; why there is no record
LAST_LINES = 15
STARVED = re.compile(r"^slurmstepd.*(exceeded memory limit|oom.kill)", re.IGNORECASE)  # in a job's log, where the state does not say it
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
    return f"distillbench-{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:12]}"


def options(request: dict[str, Any]) -> dict[str, Any]:
    """sbatch's options for a request, in submitit's spelling."""
    r = request
    found = {"time": r["minutes"], "mem": f"{round(r['memory_gb'] * 1024)}MB", "nodes": r["nodes"], "ntasks_per_node": r["ranks"]}
    return found | {"cpus_per_task": r["cpus"]} | ({"gpus_per_node": r["gpus"]} if r["gpus"] else {})


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
            say(f"{self.what}: {job}; the same command continues, `distillbench cancel` ends the jobs of a table")
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
                say(f"{self.what}: cancelled before it was submitted")
                return 1
            (self.folder / CANCELLED).unlink(missing_ok=True)
            return self.tries()

    def cancelled(self, since: float = 0.0) -> bool:
        """`distillbench cancel` was here, after the moment `since`."""
        path = self.folder / CANCELLED
        return path.exists() and path.stat().st_mtime >= since

    def tries(self) -> int:
        """Submit, and again where the machine lost the job."""
        for attempt in range(self.request["tries"]):
            if attempt:
                pause = self.request["backoff_s"] * 2 ** (attempt - 1)
                say(f"{self.what}: trying again in {pause:g} s ({attempt + 1} of {self.request['tries']})")
                time.sleep(pause)
            try:
                found = self.board.since(time.time()).named(self.name)
                if self.cancelled():
                    return 1
                (self.folder / LOST).unlink(missing_ok=True)
                number = found.id if found is not None and found.active else self.submit()
            except RuntimeError as e:  # of sbatch or squeue
                say(f"{self.what}: {e}")
                write(self.folder / LOST, {"why": str(e)})
                continue
            if found is not None and found.id == number:
                say(f"{self.what}: job {number} is in the queue already ({found.state}): waiting for it")
            self.number = number
            outcome = self.wait(number)
            self.number = None
            if outcome.get("code") == 0:
                self.report(number)
                return 0
            if outcome.get("timeout"):
                say(f"{self.what}: {outcome['why']}: raise it there")
                return 1
            if outcome.get("state") == "OUT_OF_MEMORY" or (not outcome.get("code") and any(map(STARVED.search, self.lines(number)))):
                return self.give_up()
            say(f"{self.what}: job {number} lost: {outcome['why']}")
            write(self.folder / LOST, {"job": number, "why": outcome["why"], "log": str(self.log(number))})
            if self.cancelled():
                break
            self.tail(number)
            if outcome.get("final"):
                return 2
        return 1

    def submit(self) -> str:
        """The number of a new job; RuntimeError with sbatch's words where it may help to try again, else exit."""
        from submitit import SlurmExecutor  # here, since most launchers find their job in the queue or wait for its end
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        for name in (OUTCOME, STARTED, LOST):
            (self.folder / name).unlink(missing_ok=True)
        r = self.request
        if shutil.which("sbatch") is None:
            refuse("no sbatch here: run on a login node of the cluster, or without it: snakemake --cores all")
        executor = SlurmExecutor(folder=self.folder / "%j", max_num_timeout=10**6)  # our own count: Work.time_limits
        executor.update_parameters(
            **options(r), job_name=self.name, signal_delay_s=signal_delay(r["minutes"]), stderr_to_stdout=True,
            srun_args=["--kill-on-bad-exit=1"], additional_parameters={"requeue": True} | r["sbatch"],
        )  # fmt: skip
        work = Work(self.words, Path.cwd(), self.folder, r["minutes"], r["time_limits"])
        try:
            number = executor.submit(work).job_id
        except (FailedJobError, FailedSubmissionError, subprocess.SubprocessError, OSError) as e:
            message = " ".join(str(e).split())
            message = message.partition("sbatch: error: ")[2] or message
            if help_ := remedy(message):
                write(self.folder / LOST, {"why": f"sbatch refused: {message}: {help_}"})
                refuse(f"{self.what}: sbatch refused: {message}: {help_}")
            raise RuntimeError(f"sbatch refused: {message}") from None
        say(f"{self.what}: job {number} submitted")
        return number

    def wait(self, number: str) -> dict[str, Any]:
        """How the job ended: what it wrote itself, or {"why"} in SLURM's words."""
        began, missing, ended = time.time(), 0, 0.0
        last: Queued | None = None
        warned = ""
        while True:
            outcome = read(self.folder / OUTCOME)
            own = outcome if outcome.get("job") == number else {}
            if own.get("code") == 0:
                return own
            if self.cancelled():
                subprocess.run(["scancel", number], capture_output=True)
                return {"why": "cancelled"}
            queue = self.board.look()
            if queue is not None and queue.time > began:
                now = queue.job(number, self.name)
                last = now or last
                missing = 0 if now else missing + 1
                if now is not None and now.reason != warned and now.reason in STUCK and now.state == "PENDING":
                    subprocess.run(["scancel", number], capture_output=True)
                    write(self.folder / LOST, {"job": number, "why": f"would never start ({now.reason}): {STUCK[now.reason]}"})
                    refuse(f"{self.what}: job {number} would never start ({now.reason}): {STUCK[now.reason]}")
                over = (now is not None and not now.active) or missing * POLL > NOTICE / 2
                ended = (ended or time.time()) if over else 0.0
                if over and (own or time.time() - ended > NOTICE or (last is not None and last.state in ("CANCELLED", "NODE_FAIL"))):
                    state = {"state": last.state} if last is not None and not own else {}
                    return own | state | {"why": own.get("why") or self.why(number, last, own)}
            time.sleep(POLL)

    def why(self, number: str, last: Queued | None, own: dict[str, Any]) -> str:
        """A job's end that the command did not choose."""
        state = f"{last.state} ({last.reason})" if last is not None and last.reason not in ("None", "") else last.state if last else "gone"
        if own:
            return f"its command ended with code {own['code']} on {own['node']}"
        if read(self.folder / STARTED).get("job") == number:
            return f"{state} after it had started on {read(self.folder / STARTED)['node']}"
        return (
            f"{state} before it could start: see that the nodes have {self.folder} and {sys.executable}, "
            f"e.g. srun ls {self.runs} {sys.executable}"
        )

    def log(self, number: str) -> Path:
        return self.folder / number / f"{number}_0_log.out"

    def lines(self, number: str) -> list[str]:
        try:
            return self.log(number).read_text(errors="replace").splitlines()
        except OSError:
            return []

    def report(self, number: str) -> None:
        """What the command said, less its progress."""
        for line in self.lines(number):
            if ": " in line and not line.startswith("submitit ") and not PROGRESS.search(line):
                say(f"{line}  [job {number}]")

    def tail(self, number: str) -> None:
        """The end of the job's log, and where it is."""
        for line in self.lines(number)[-LAST_LINES:]:
            say(f"  {line}")
        say(f"  log: {self.log(number)}")

    def give_up(self) -> int:
        """Record that SLURM's limit of memory ended the cell at hand, and go on with the job's other cells."""
        from distillbench.work import give_up

        reason = f"killed by SLURM for lack of memory ({self.request['memory_gb']:g} GB, workflows/resources.yaml)"
        if not give_up(self.words, "oom", reason, node=read(self.folder / STARTED).get("node")):
            say(f"{self.what}: {reason}: raise it there")
            return 1
        return self.tries()


def main(stamp: str, request: str, words: list[str]) -> int:
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    return Launcher(Path(stamp), words, json.loads(request)).run()
