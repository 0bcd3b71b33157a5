"""A table of twelve cells; jobs, nodes, launchers and Snakemake are taken away twenty times."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress

import psutil
import pytest

from distillbench.cells import journal
from distillbench.cluster.launcher import name_of
from tests.slurm.conftest import Site
from tests.slurm.test_slurm import LITERAL, local_metrics, repeated

ARMS, SEEDS, EVENTS = [f"slow{i}" for i in range(4)], [0, 1, 2], 20
# Seconds of every step, through the environment, so that the undisturbed run has the same methods.
PAUSE = "CHAOS_SECONDS"


class Chaos:
    """Random events for a table that is being made; the seed fixes their kinds alone."""

    def __init__(self, site: Site, seed: int):
        self.site, self.random, self.done = site, random.Random(seed), Counter[str]()
        self.process = self.start()
        self.errors: list[str] = []

    def start(self) -> subprocess.Popen[str]:
        with open(self.site.folder / "chaos.log", "a") as log:
            return subprocess.Popen(
                [*LITERAL, "results/chaos.md"],
                cwd=self.site.folder,
                env=self.site.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def again(self) -> None:
        """The same command, where it ended."""
        if self.process.poll() is not None:
            assert self.process.returncode != 0, (
                f"the table was made after {self.done}, before the last event"
            )
            self.process = self.start()

    def running(self) -> list[str]:
        """Jobs that run, only those that train a student where there are any."""
        students = {
            name_of(p)
            for p in self.site.folder.glob("results/runs/slow-ring/slow*/*.trained.slurm")
        }
        lines = self.site.cluster.run(
            "squeue", "--noheader", "--states=RUNNING", "--format=%i %j"
        ).stdout.splitlines()
        found = dict(line.split() for line in lines)
        return [number for number, name in found.items() if name in students] or (
            list(found) if self.random.random() < 0.1 else []
        )

    def ours(self, words: str) -> list[psutil.Process]:
        """Processes of this checkout whose command line has these words."""
        found = []
        for one in psutil.process_iter(["cmdline"]):
            try:
                if words in " ".join(one.info["cmdline"] or []) and one.cwd() == str(
                    self.site.folder
                ):
                    found.append(one)
            except psutil.Error:
                continue
        return found

    # Each returns whether it met something.

    def requeue(self, number: str) -> bool:
        return self.site.cluster.run("scontrol", "requeue", number).returncode == 0

    def preempt(self, number: str) -> bool:
        return self.site.cluster.run("scancel", "--signal=USR2", number).returncode == 0

    def cancel(self, number: str) -> bool:
        return self.site.cluster.run("scancel", number).returncode == 0

    def kill_step(self, number: str) -> bool:
        return self.site.cluster.run("scancel", "--signal=KILL", number).returncode == 0

    def kill_worker(self, _: str) -> bool:
        """The processes that train or evaluate, as an administrator would."""
        return self.kill(self.ours("distillbench.cli")[:2])

    def kill_launcher(self, _: str) -> bool:
        return self.kill(self.ours("distillbench.cluster.dispatch slurm")[:1])

    def kill(self, processes: list[psutil.Process]) -> bool:
        met = 0
        for one in processes:
            with suppress(psutil.Error):
                one.kill()
                met += 1
        return met > 0

    def kill_snakemake(self, _: str) -> bool:
        """Its launchers live on."""
        self.process.kill()
        return self.process.wait() == -signal.SIGKILL

    def kill_everything(self, _: str) -> bool:
        """A login node that is lost."""
        os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait() == -signal.SIGKILL

    def lose_node(self, number: str) -> bool:
        """slurmd and everything that the node runs; it comes back some seconds later."""
        cluster = self.site.cluster
        node = cluster.run("squeue", "--noheader", f"--jobs={number}", "--format=%N").stdout.strip()
        if node not in cluster.names:
            return False
        cluster.lose(node)
        time.sleep(3)
        cluster.start_node(node)
        cluster.run("scontrol", "update", f"nodename={node}", "state=resume")
        return True

    def restart_controller(self, _: str) -> bool:
        self.site.cluster.kill("slurmctld")
        self.site.cluster.start_controller()
        return True

    def event(self) -> None:
        """One of them, while a job runs."""
        time.sleep(self.random.uniform(3, 9))
        number = self.random.choice(
            self.site.until(lambda: self.again() or self.running(), "a job runs")
        )
        kinds: list[Callable[[str], bool]] = [
            self.requeue,
            self.preempt,
            self.cancel,
            self.kill_step,
            self.kill_worker,
            self.kill_snakemake,
            self.kill_everything,
            self.kill_launcher,
            self.lose_node,
            self.restart_controller,
        ]
        kind = (
            kinds[sum(self.done.values())]
            if sum(self.done.values()) < len(kinds)
            else self.random.choice(kinds)
        )
        if kind(number):
            self.done[kind.__name__] += 1


def made_twice(lines: list[dict]) -> int:
    """Count of steps that a process made although an earlier one had made them."""
    seen = twice = 0
    for line in lines:
        if "start" in line:
            twice += max(seen - line["start"], 0)
        seen = max(seen, line.get("step", -1) + 1)
    return twice


@pytest.mark.slow
def test_twenty_random_events_change_nothing(site: Site):
    site.real_jobs()
    for name in ARMS:
        site.paced(f"float(os.environ.get('{PAUSE}', 0))", name)
    site.table("chaos", ARMS, "slow-ring", SEEDS)
    site.resources(seeds=1, tries=9)
    expected = local_metrics(site, site.folder.parent / "local", "chaos")
    page = (site.folder.parent / "local/results/chaos.md").read_bytes()
    assert len(expected) == (len(ARMS) + 1) * len(SEEDS)

    site.environment[PAUSE] = "0.15"
    began, chaos = time.monotonic(), Chaos(site, seed=0)
    while sum(chaos.done.values()) < EVENTS:
        chaos.event()
    disturbed = time.monotonic() - began
    for _ in range(5):  # what the last events ended
        if chaos.process.wait(timeout=900) == 0:
            break
        chaos.again()
    log = (site.folder / "chaos.log").read_text()
    assert chaos.process.returncode == 0, log[-5000:]
    assert site.metrics() == expected and (site.folder / "results/chaos.md").read_bytes() == page
    journals = [
        journal.read(p)
        for arm in ARMS
        for p in site.folder.glob(f"results/runs/slow-ring/{arm}/seed*")
    ]
    assert len(journals) == len(ARMS) * len(SEEDS) and [repeated(lines) for lines in journals] == [
        0
    ] * len(journals)
    starts = sum("start" in line for lines in journals for line in lines)
    twice = sum(map(made_twice, journals))
    assert starts > len(journals) + EVENTS // 4, "the events met too little work"
    lasted = f"{disturbed:.0f} s of {time.monotonic() - began:.0f}"
    print(
        f"\n{dict(chaos.done)} in {lasted}; "
        f"{len(journals)} cells in {starts} processes, {twice} steps made twice;"
    )
    print(
        f"{log.count(' submitted')} jobs submitted, "
        f"{log.count(' is in the queue already')} times found in the queue"
    )
