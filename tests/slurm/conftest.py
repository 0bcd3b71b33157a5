"""One cluster for all tests of this folder, and checkouts whose commands reach it."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from distillbench.cells import journal
from distillbench.cluster.launcher import name_of
from tests.commands import Command
from tests.conftest import RING, Checkout
from tests.shim import CONSTANTS, JOBS
from tests.slurm.cluster import Cluster, missing

REQUIRED = "DISTILLBENCH_REQUIRE_SLURM"  # set where a skipped test is a failure
SLOW = RING.replace("tiny-ring", "slow-ring").replace("seeds: [0, 1]", "seeds: [0]")
SLOW += "stall_s: 3600\n"  # a step that is held is not hung
TINY = RING.replace("flops: 7.0e+9", "flops: 1.0e+9")
LONG = 600.0  # seconds after which what a test waits for does not come, on however busy a machine
# Seconds between looks, for the launchers of these tests: a local disk and SLURM of one's own.
SHORTER = {
    "distillbench.cluster.queue.SECONDS": 0.5,
    "distillbench.cluster.queue.POLL": 0.1,
    "distillbench.cluster.launcher.POLL": 0.2,
    "distillbench.cluster.launcher.NOTICE": 3.0,
}
HELD = """

import os
import signal
import time

quick = MeanFlow.train_step
made = []  # steps of this process
told = []  # signals that ask it to leave


def noting(handler):
    def noted(*arguments):
        told.append(arguments)
        handler(*arguments)

    return noted


def held_step(self, batch, step):
    if not made:
        for number in (signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, noting(signal.getsignal(number)))
    made.append(step)
    while len(made) > 20 and not told and os.path.exists("hold"):
        time.sleep(0.05)
    return quick(self, batch, step)


MeanFlow.train_step = held_step
"""
PACED = """

import os
import time

quick = MeanFlow.train_step


def paced_step(self, batch, step):
    time.sleep({seconds})
    return quick(self, batch, step)


MeanFlow.train_step = paced_step
"""


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if lacks := missing():
        message = (
            f"NOT TESTED: no real SLURM cluster, which needs {', '.join(lacks)} "
            "(Debian: slurmctld slurmd slurm-client munge)"
        )
        if os.environ.get(REQUIRED):
            pytest.fail(message)
        print(f"\n{'=' * 100}\n{message}\n{'=' * 100}", file=sys.__stderr__)
        pytest.skip(message)
    made = Cluster(tmp_path_factory.mktemp("slurm") / "cluster", kill_wait=60)
    yield made
    made.stop()


@pytest.fixture(scope="session")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Teachers of slow-ring, seeds 0 and 1, trained and evaluated: results/runs/slow-ring."""
    made = Checkout(tmp_path_factory.mktemp("teachers"))
    made.keep("meanflow")
    made.write("workflows/benchmarks/slow-ring.yaml", SLOW)
    for stage in ("train", "evaluate"):
        done = made.run("distillbench", stage, "slow-ring", "teacher", "--seeds", "0,1")
        assert done.returncode == 0, done.stderr
    return made.folder / "results/runs/slow-ring"


class Site(Checkout):
    """A checkout on the cluster's login node.

    Its jobs are real ones, whose commands the zygote runs (`real_jobs`: as SLURM starts them).
    """

    def __init__(self, folder: Path, cluster: Cluster, teachers: Path):
        super().__init__(folder)
        self.cluster = cluster
        self.environment |= {
            "SLURM_CONF": cluster.environment["SLURM_CONF"],
            "PATH": f"{self.environment['PATH']}:/usr/sbin",
            CONSTANTS: json.dumps(SHORTER),
            JOBS: "//",  # none is a real one
        }
        self.keep("meanflow", "dmd")
        self.table("small", ["meanflow", "dmd"])
        self.resources()
        self.write("workflows/benchmarks/tiny-ring.yaml", TINY)
        self.write("workflows/benchmarks/slow-ring.yaml", SLOW)
        shutil.copytree(teachers, self.folder / "results/runs/slow-ring")

    def real_jobs(self, folders: str = "/") -> None:
        """Have all processes of jobs below slurmstepd, whose memory it then sees.

        folders: a part of the paths of those jobs' folders.
        """
        self.environment[JOBS] = folders

    def table(
        self,
        name: str,
        methods: list[str],
        benchmark: str = "tiny-ring",
        seeds: list[int] | None = None,
    ) -> None:
        """A table of one benchmark; seeds: the benchmark's where none are given."""
        text = f"{{name: {name}, title: {name}, benchmarks: [{benchmark}], methods: {methods}"
        end = f", seeds: {seeds}}}\n" if seeds else "}\n"
        self.write(f"workflows/tables/{name}.yaml", text + end)

    def resources(self, **changes: object) -> None:
        """Resources of all jobs: small ones, less the changes."""
        values = {
            "nodes": 1,
            "ranks": 1,
            "gpus": 0,
            "cpus": 1,
            "memory_gb": 4,
            "minutes": 30,
            "time_limits": 5,
            "seeds": "null",
            "tries": 3,
            "backoff_s": 0,
        }
        values |= changes
        lines = [f"  {key}: {value}\n" for key, value in values.items()]
        self.write("workflows/resources.yaml", "defaults:\n" + "".join(lines))

    def method(self, name: str, code: str) -> None:
        """A copy of meanflow with more code."""
        source = self.folder / "methods/meanflow"
        self.write(f"methods/{name}/config.yaml", (source / "config.yaml").read_text())
        self.write(f"methods/{name}/method.py", (source / "method.py").read_text() + code)

    def held(self) -> None:
        """A method `slow`: each of its processes stays at a step until `release`, or told to go."""
        self.method("slow", HELD)
        self.write("hold", "")

    def release(self) -> None:
        """Let `slow` go on to its end."""
        (self.folder / "hold").unlink()

    def paced(self, seconds: float | str, name: str = "slow") -> None:
        """A method whose steps take longer, by a number of seconds or an expression of it."""
        self.method(name, PACED.format(seconds=seconds))

    def start(self, *command: str, new_session: bool = True, **more: str) -> Command:
        """A command in the background, in a process group of its own."""
        return super().start(*command, new_session=new_session, **more)

    def until(self, ready, what: str, seconds: float = LONG):
        """Wait for a value that is true."""
        end = time.monotonic() + seconds
        while not (found := ready()):
            assert time.monotonic() < end, (
                f"{what}: not in {seconds:g} s; jobs: {self.cluster.jobs()}"
            )
            time.sleep(0.1)
        return found

    def until_said(self, process: Command, words: str) -> None:
        """Wait until a command has said something; it must not have ended before."""

        def said() -> bool:
            ended = process.poll() is not None
            text = process.output()[1]
            assert words in text or not ended, text
            return words in text

        self.until(said, words)

    def lines(self, method: str) -> list[dict]:
        """Journals of a method's cells."""
        folders = sorted(self.folder.glob(f"results/runs/*/{method}/seed*"))
        return [line for folder in folders for line in journal.read(folder)]

    def training(self, method: str, process: int = 1) -> str:
        """Wait until a cell has trained some steps in its n-th process; the number of its job."""

        def well_on() -> bool:
            lines = self.lines(method)
            starts = [i for i, line in enumerate(lines) if "start" in line]
            return len(starts) >= process and len(lines) > starts[-1] + 8

        self.until(well_on, f"process {process} of {method} trains")
        (folder,) = self.folder.glob(f"results/runs/*/{method}/*.trained.slurm")
        ours = (
            "squeue",
            "--noheader",
            f"--name={name_of(folder)}",
            "--states=RUNNING",
            "--format=%i",
        )
        return self.until(lambda: self.cluster.run(*ours).stdout.split(), "a job runs")[0]

    def leave(self, method: str, number: str) -> None:
        """Wait until a job that was told to end has saved a checkpoint, then see it killed."""
        self.until(lambda: "checkpoint" in self.lines(method)[-1], f"job {number} saves")
        self.cluster.kill_job(number)


@pytest.fixture
def site(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cluster: Cluster, teachers: Path
) -> Iterator[Site]:
    (tmp_path / "checkout").mkdir()
    made = Site(tmp_path / "checkout", cluster, teachers)
    monkeypatch.chdir(made.folder)
    for name, value in SHORTER.items():
        monkeypatch.setattr(name, value)
    yield made
    cluster.run("scancel", "--me")
    made.until(cluster.is_empty_after_kills, "an empty queue")
