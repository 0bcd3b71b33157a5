"""One cluster for all tests of this folder, and checkouts whose commands reach it."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from distillbench.cells import journal
from distillbench.cluster.launcher import name_of
from tests.commands import Command
from tests.conftest import RING, Checkout
from tests.slurm.cluster import Cluster, missing

REQUIRED = "DISTILLBENCH_REQUIRE_SLURM"  # set where a skipped test is a failure
SLOW = RING.replace("tiny-ring", "slow-ring").replace("seeds: [0, 1]", "seeds: [0]")


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if lacks := missing():
        message = f"NOT TESTED: no real SLURM cluster, which needs {', '.join(lacks)} (Debian: slurmctld slurmd slurm-client munge)"
        if os.environ.get(REQUIRED):
            pytest.fail(message)
        print(f"\n{'=' * 100}\n{message}\n{'=' * 100}", file=sys.__stderr__)
        pytest.skip(message)
    made = Cluster(tmp_path_factory.mktemp("slurm") / "cluster")
    yield made
    made.stop()


class Site(Checkout):
    """A checkout on the cluster's login node."""

    def __init__(self, folder: Path, cluster: Cluster):
        super().__init__(folder)
        self.cluster = cluster
        self.environment |= {
            "SLURM_CONF": cluster.environment["SLURM_CONF"],
            "PATH": f"{self.environment['PATH']}:/usr/sbin",
        }
        self.table("small", ["meanflow", "dmd"])
        self.resources()
        self.write("workflows/benchmarks/slow-ring.yaml", SLOW)

    def table(
        self,
        name: str,
        methods: list[str],
        benchmark: str = "tiny-ring",
        seeds: list[int] | None = None,
    ) -> None:
        text = f"{{name: {name}, title: {name}, benchmarks: [{benchmark}], methods: {methods}"
        self.write(
            f"workflows/tables/{name}.yaml", text + (f", seeds: {seeds}}}\n" if seeds else "}\n")
        )

    def resources(self, **changes: object) -> None:
        values = {
            "nodes": 1,
            "ranks": 1,
            "gpus": 0,
            "cpus": 1,
            "memory_gb": 4,
            "minutes": 10,
            "time_limits": 5,
            "seeds": "null",
        }
        values |= {"tries": 3, "backoff_s": 1} | changes
        lines = [f"  {key}: {value}\n" for key, value in values.items()]
        self.write("workflows/resources.yaml", "defaults:\n" + "".join(lines))

    def slow(self, seconds: float | str = 0.05, name: str = "slow") -> None:
        """A copy of meanflow whose steps take longer, by a number of seconds or an expression of it."""
        for file in ("method.py", "config.yaml"):
            self.write(
                f"methods/{name}/{file}", (self.folder / "methods/meanflow" / file).read_text()
            )
        with open(self.folder / f"methods/{name}/method.py", "a") as f:
            f.write(
                "\n\nquick = MeanFlow.train_step\n"
                f"MeanFlow.train_step = lambda *step: (__import__('time').sleep({seconds}), quick(*step))[1]\n"
            )

    def start(self, *command: str, new_session: bool = True, **more: str) -> Command:
        """A command in the background, in a process group of its own."""
        return super().start(*command, new_session=new_session, **more)

    def until(self, ready, what: str, seconds: float = 300):
        """Wait for a value that is true."""
        end = time.monotonic() + seconds
        while not (found := ready()):
            assert time.monotonic() < end, (
                f"{what}: not in {seconds:g} s; jobs: {self.cluster.jobs()}"
            )
            time.sleep(0.2)
        return found

    def training(self, method: str, process: int = 1) -> str:
        """Wait until a cell of `method` has trained some steps in its n-th process; the number of the job that runs."""

        def well_on() -> bool:
            lines = [
                line
                for p in self.folder.glob(f"results/runs/*/{method}/seed*")
                for line in journal.read(p)
            ]
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


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cluster: Cluster) -> Iterator[Site]:
    (tmp_path / "checkout").mkdir()
    made = Site(tmp_path / "checkout", cluster)
    monkeypatch.chdir(made.folder)
    yield made
    cluster.run("scancel", "--me")
    made.until(lambda: not cluster.jobs(), "an empty queue", 60)
