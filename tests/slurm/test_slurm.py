"""The workflow on a real cluster: nothing computed twice or lost, a dead cell explained."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest

from distillbench.cells import journal
from distillbench.cells.disk import write_json
from distillbench.cluster import job
from distillbench.cluster.job import Command
from distillbench.cluster.launcher import Launcher
from distillbench.cluster.messages import LOST, read
from distillbench.cluster.queue import SharedQueue
from distillbench.cluster.request import Request
from tests.conftest import Checkout
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import Site
from tests.test_cells import cell

LITERAL = ("snakemake", "--profile", "slurm")


def local_metrics(site: Site, folder: Path, table: str = "small") -> dict[str, bytes]:
    """What the same checkout gives without a cluster."""
    shutil.copytree(site.folder, folder)
    found = subprocess.run(
        ["snakemake", "--cores", "2", f"results/{table}.md"],
        cwd=folder,
        env=site.environment,
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr
    runs = folder / "results/runs"
    return {str(p.relative_to(runs)): p.read_bytes() for p in sorted(runs.rglob("metrics.json"))}


def submitted(text: str) -> list[str]:
    return re.findall(r"job (\d+) submitted", text)


def lines_of(site: Site, method: str) -> list[dict]:
    (folder,) = (site.folder / f"results/runs/slow-ring/{method}").glob("seed0-*")
    return journal.read(folder)


def repeated(lines: list[dict]) -> int:
    """Count of processes that began before the last checkpoint that the journal knows: none may."""
    saved, bad = 0, 0
    for line in lines:
        if "start" in line:
            bad += line["start"] < saved
        saved = line.get("checkpoint", saved)
    return bad


def result(site: Site, method: str) -> dict:
    (path,) = (site.folder / f"results/runs/slow-ring/{method}").glob("seed0-*/result.json")
    return json.loads(path.read_text())


def test_the_literal_command_gives_the_bytes_of_a_local_run(site: Site, tmp_path: Path):
    site.real_jobs()
    expected = local_metrics(site, tmp_path / "local")
    done = site.run(*LITERAL, "results/small.md")
    assert done.returncode == 0, done.stderr
    assert site.metrics() == expected and len(expected) == 6
    jobs = submitted(done.stderr)
    assert len(jobs) == len(set(jobs)) == 8  # two teachers and two arms, trained and evaluated
    again = site.run(*LITERAL, "results/small.md")
    assert again.returncode == 0 and not submitted(again.stderr)


CLAIM = """
  - id: {id}
    claim: It is better.
    where: Table 1
    kind: {kind}
    scale_free: false
    primary: true
    refuted_if: it is not
    arms: [{arms}]
    trials: {{tiny-ring: {{{metric}, seeds: 3}}}}
"""
TRIAL = """
name: trial
title: Trial
kind: audit
benchmarks: [tiny-ring]
methods: [meanflow]
seeds: [10, 11, 12]
"""
TOY = """BENCHMARK = 'tiny-ring'
METHODS = ('meanflow',)


def measure(seed):
    return {'near': 1.0 + seed / 100, 'far': 2.0 + seed / 100}
"""


def test_an_audit_runs_its_cells_and_experiments_on_the_cluster(site: Site):
    site.write("mechanisms/toy.py", TOY)
    mechanism = (
        CLAIM.format(id="X-2", kind="mechanism", arms="near, far", metric="metric: error")
        + "    experiment: toy\n"
    )
    for path in (site.folder / "methods").glob("*/claims.yaml"):
        path.unlink()  # a method need not have claims
    one = CLAIM.format(
        id="X-1", kind="comparative", arms="meanflow, meanflow@scratch", metric="metric: sliced_w2"
    )
    site.write("methods/meanflow/claims.yaml", "claims:" + one + mechanism)
    site.write("workflows/tables/trial.yaml", TRIAL)
    done = site.run(*LITERAL, "results/trial.md")
    assert done.returncode == 0, done.stderr
    for words in ("train tiny-ring meanflow", "evaluate tiny-ring meanflow@scratch", "measure toy"):
        assert re.search(rf"{words} --seeds 10,11,12: job \d+ submitted", done.stderr), done.stderr
    found = {q["id"]: q for q in json.loads((site.folder / "results/trial.json").read_text())}
    assert [len(values) for values in found["X-1"]["evidence"]["values"].values()] == [3, 3]
    assert found["X-2"]["evidence"]["values"] == {
        "near": [1.1, 1.11, 1.12],
        "far": [2.1, 2.11, 2.12],
    }
    assert {q["verdict"] for q in found.values()} == {
        "EDITED"
    }  # this checkout has no git: what stood before its runs is not known


def take_away(site: Site, how: str, number: str) -> None:
    """Take a running job off its node, in a way in which SLURM starts it again."""
    if how == "SIGUSR2":  # as before a time limit; the job then requeues itself
        site.cluster.run("scancel", "--signal=SIGUSR2", number)
        return
    if how == "preemption":  # by a job that wants all of both nodes
        site.cluster.run(
            "sbatch",
            "--partition=urgent",
            "--nodes=2",
            "--exclusive",
            "--output=/dev/null",
            "--wrap",
            "sleep 3",
        )
        return
    if how == "SIGTERM":  # whoever sends it requeues, as preemption does
        site.cluster.run("scancel", "--signal=SIGTERM", number)
    site.cluster.run("scontrol", "requeue", number)
    site.leave("slow", number)


@pytest.mark.parametrize(
    "ways",
    [
        ("requeue", "SIGUSR2"),
        *(pytest.param((how, how), marks=pytest.mark.slow) for how in ("SIGTERM", "preemption")),
    ],
    ids="-".join,
)
def test_a_job_that_is_taken_away_goes_on_from_its_last_step(site: Site, ways: tuple[str, str]):
    site.held()
    site.table("taken", ["slow"], "slow-ring")
    process = site.start(*LITERAL, "results/taken.md")
    for nth, how in enumerate(ways, 1):
        take_away(site, how, site.training("slow", nth))
    site.training("slow", 3)
    site.release()
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert "FAILED" not in errors and "lost" not in errors
    lines = lines_of(site, "slow")
    starts = [line["start"] for line in lines if "start" in line]
    assert len(starts) == 3 and 0 < starts[1] < starts[2] and repeated(lines) == 0
    assert len(submitted(errors)) == 2  # trained and evaluated: the same jobs went on


@pytest.mark.slow
def test_a_time_limit_is_a_pause_and_too_many_are_a_record(site: Site):
    site.paced(1.0)
    site.table("limited", ["slow"], "slow-ring")
    site.resources(minutes=1, time_limits=1)
    done = site.run(*LITERAL, "results/limited.md")
    assert done.returncode == 0, done.stderr  # a failure of the method is a row
    found = result(site, "slow")
    assert (
        found["status"] == "timeout"
        and found["reason"] == "not done in 2 jobs of 1 min (workflows/resources.yaml)"
    )
    starts = [line["start"] for line in lines_of(site, "slow") if "start" in line]
    assert len(starts) == 2 and starts[1] > 10
    assert "TIMEOUT: not done in 2 jobs" in (site.folder / "results/limited.md").read_text()


def test_launchers_are_killed_and_interrupted_and_two_and_the_job_is_one(site: Site):
    site.held()
    site.table("orphans", ["slow"], "slow-ring")
    killed = site.start(*LITERAL, "results/orphans.md")
    number = site.training("slow")
    os.killpg(killed.pid, signal.SIGKILL)  # Snakemake and its launchers
    killed.wait()
    assert site.cluster.jobs()[number] == "RUNNING"

    interrupted = site.start(*LITERAL, "results/orphans.md")
    site.until_said(interrupted, f"job {number} is in the queue already")
    os.killpg(interrupted.pid, signal.SIGINT)
    _, errors = interrupted.communicate()
    assert interrupted.returncode != 0
    assert f"job {number} goes on" in errors and "Traceback" not in errors
    assert site.cluster.jobs()[number] == "RUNNING"

    first = site.start(*LITERAL, "results/orphans.md")
    # Two that start in one moment remove the same outputs, and one of them finds a file neither
    # there nor missing.
    site.until_said(first, f"job {number} is in the queue already")
    second = site.start(*LITERAL, "results/orphans.md")
    site.until_said(second, "another launcher looks after this job")
    site.release()
    outputs = [p.communicate()[1] for p in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0), outputs
    for text in (errors, *outputs):
        assert "train slow-ring slow --seeds 0: " in text
        assert not re.search(r"train .* submitted", text)
    assert sum("start" in line for line in lines_of(site, "slow")) == 1


@pytest.mark.slow
def test_two_checkouts_do_not_see_each_other(site: Site, teachers: Path, tmp_path: Path):
    site.method("slow", "")
    site.table("mine", ["slow"], "slow-ring")
    (tmp_path / "other").mkdir()
    other = Site(tmp_path / "other", site.cluster, teachers)
    other.method("slow", "")
    other.table("mine", ["slow"], "slow-ring")
    both = [s.start(*LITERAL, "results/mine.md") for s in (site, other)]
    outputs = [p.communicate()[1] for p in both]
    assert [p.returncode for p in both] == [0, 0], outputs
    jobs = [submitted(text) for text in outputs]
    assert len(jobs[0]) == len(jobs[1]) == 2 and not set(jobs[0]) & set(jobs[1])
    assert site.metrics() == other.metrics()


def test_a_number_that_another_job_has_now_is_not_ours(site: Site, monkeypatch: pytest.MonkeyPatch):
    """Numbers begin anew when a controller loses its state; the name tells."""
    monkeypatch.setenv("SLURM_CONF", site.environment["SLURM_CONF"])
    site.cluster.run(
        "sbatch", "--job-name=distillbench-1", "--wrap", "sleep 60", "--output=/dev/null"
    )
    number = site.until(lambda: list(site.cluster.jobs()), "a job")[0]
    queue = SharedQueue(site.folder).since(time.time())
    assert queue.job(number, "distillbench-1") is not None
    assert queue.job(number, "distillbench-0") is None and queue.named("distillbench-0") is None


def test_a_lost_job_is_tried_again(site: Site):
    site.held()
    site.table("lost", ["slow"], "slow-ring")
    process = site.start(*LITERAL, "results/lost.md")
    number = site.training("slow")
    site.cluster.run("scancel", number)  # by hand
    site.leave("slow", number)
    site.until(lambda: [n for n in site.cluster.jobs() if n != number], "a second job")
    second = site.training("slow", 2)
    site.cluster.run("scancel", "--signal=KILL", "--full", second)  # the step and the batch script
    site.cluster.kill_job(second)
    site.training("slow", 3)
    site.release()
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert errors.count("trying again") == 2 and "CANCELLED" in errors
    assert repeated(lines_of(site, "slow")) == 0


def test_too_many_losses_end_the_command_and_say_what_is_missing(site: Site):
    site.held()
    site.table("lost", ["slow"], "slow-ring")
    site.resources(tries=1)
    process = site.start(*LITERAL, "results/lost.md")
    number = site.training("slow")
    site.cluster.run("scancel", number)
    site.leave("slow", number)
    _, errors = process.communicate()
    assert process.returncode == 1
    assert not list(site.folder.glob("results/runs/slow-ring/slow/seed0-*/result.json"))
    page = (site.folder / "results/lost.partial.md").read_text()
    assert "| slow-ring/slow seed 0 | lost | CANCELLED" in page
    assert "lost.partial.md says what is missing" in errors
    site.release()
    done = site.run(*LITERAL, "results/lost.md")
    assert done.returncode == 0 and not (site.folder / "results/lost.partial.md").exists()
    assert repeated(lines_of(site, "slow")) == 0


@pytest.mark.slow
def test_a_node_that_dies_costs_an_attempt(site: Site):
    site.held()
    site.table("node", ["slow"], "slow-ring")
    process = site.start(*LITERAL, "results/node.md")
    number = site.training("slow")
    node = site.cluster.run(
        "squeue", "--noheader", f"--jobs={number}", "--format=%N"
    ).stdout.strip()
    site.cluster.lose(node)
    try:
        site.training("slow", 2)
        site.release()
        _, errors = process.communicate()
    finally:
        site.cluster.start_node(node)
        site.cluster.run("scontrol", "update", f"nodename={node}", "state=resume")
    assert process.returncode == 0, errors
    lines = lines_of(site, "slow")
    assert (
        result(site, "slow")["status"] == "done"
        and repeated(lines) == 0
        and sum("start" in line for line in lines) == 2
    )


FAULTS = {
    "raises": ("raise ValueError('bad method')", "failed", "ValueError: bad method"),
    "hangs": ("time.sleep(1000)", "hung", "nothing ended for 2 s"),
    "dies": ("os._exit(3)", "failed", "the process died 2 times"),
    "greedy": ("raise torch.OutOfMemoryError('no room')", "oom", "OutOfMemoryError: no room"),
    "eats": (
        "held = torch.ones(3 << 28); time.sleep(60)",
        "oom",
        "killed by SLURM for lack of memory (3 GB, workflows/resources.yaml)",
    ),
}


FAULT = """

import os
import time

import torch


def fault(*step):
    {code}


MeanFlow.train_step = fault
"""
FAULT_OF_A_RANK = """

import os

quick = MeanFlow.train_step


def fault(*step):
    if os.environ.get("RANK") == "1":
        raise ValueError("rank one fell over")
    return quick(*step)


MeanFlow.train_step = fault
"""


def test_what_a_method_does_is_a_row(site: Site):
    site.real_jobs("/eats/")
    for name, (code, *_) in FAULTS.items():
        site.method(name, FAULT.format(code=code))
    site.table("hung", ["hangs"], "slow-ring")
    site.table("faults", [*FAULTS, "meanflow"], "slow-ring")
    site.resources(memory_gb=3)
    # The others are not to be hung where the machine is busy.
    path = site.folder / "workflows/benchmarks/slow-ring.yaml"
    patient = path.read_text()
    path.write_text(patient.replace("stall_s: 3600", "stall_s: 2"))
    hung = site.run(*LITERAL, "results/hung.md")
    assert hung.returncode == 0, hung.stderr
    path.write_text(patient)
    done = site.run(*LITERAL, "results/faults.md")
    assert done.returncode == 0, done.stderr
    said = hung.stderr + done.stderr
    page = (site.folder / "results/faults.md").read_text()
    print(
        "\n".join(
            line
            for line in [*said.splitlines(), *page.splitlines()]
            if any(s in line for s in ("FAILED", "HUNG", "OOM"))
        )
    )
    for name, (_, status, reason) in FAULTS.items():
        found = result(site, name)
        assert (found["status"], reason in found["reason"]) == (status, True), found["reason"]
        whose = "" if name == "eats" else r".*\[job \d+\]"  # it could not say so itself
        assert re.search(rf"slow-ring/{name} seed 0: {status.upper()}: {whose}", said), said
        assert (site.folder / found["log"]).is_file(), found
        assert status.upper() in page
    assert result(site, "meanflow")["status"] == "done"


def test_two_nodes_train_a_cell(site: Site):
    site.resources(nodes=2, seeds=1, gpus=1)
    site.table("wide", ["meanflow"], "slow-ring")
    site.environment |= {"GLOO_SOCKET_IFNAME": "lo"}
    done = site.run(*LITERAL, "results/wide.md")
    assert done.returncode == 0, done.stderr
    (path,) = site.folder.glob("results/runs/slow-ring/meanflow/seed0-*/result.json")
    assert json.loads(path.read_text())["status"] == "done"
    (log,) = site.folder.glob("results/runs/slow-ring/meanflow/*.trained.slurm/*/*_1_log.out")
    assert "global_rank=1(2)" in log.read_text()
    status = site.run("distillbench", "status", "wide", "--profile", "slurm").stdout
    assert "GPU-hours" in status


def test_a_failing_rank_is_a_row(site: Site):
    """The first rank sees only that it is alone; the job ends badly and is not submitted again."""
    site.method("slow", FAULT_OF_A_RANK)
    site.resources(ranks=2, seeds=1)
    site.table("wide", ["slow"], "slow-ring")
    site.environment |= {"GLOO_SOCKET_IFNAME": "lo"}
    done = site.run(*LITERAL, "results/wide.md")
    found = result(site, "slow")
    assert done.returncode == 0 and "trying again" not in done.stderr, done.stderr
    assert found["status"] == "failed" and "rank one fell over" in found["reason"]


@pytest.mark.slow
def test_a_job_on_two_nodes_survives_the_loss_of_one(site: Site):
    site.held()
    site.resources(nodes=2, seeds=1)
    site.table("wide", ["slow"], "slow-ring")
    site.environment |= {"GLOO_SOCKET_IFNAME": "lo"}
    process = site.start(*LITERAL, "results/wide.md")
    site.training("slow")
    site.cluster.lose("n2")
    site.until(lambda: site.cluster.states()["n2"].startswith("down"), "a node is down")
    site.cluster.start_node("n2")
    site.cluster.run("scontrol", "update", "nodename=n2", "state=resume")
    site.training("slow", 2)
    site.release()
    _, errors = process.communicate()
    lines = lines_of(site, "slow")
    assert process.returncode == 0 and result(site, "slow")["status"] == "done", errors
    assert repeated(lines) == 0 and sum("start" in line for line in lines) == 2


def test_time_limits_are_counted_for_each_cell(checkout: Checkout, monkeypatch: pytest.MonkeyPatch):
    """A cell that follows one that took long has all of its own, whatever other jobs do."""
    given_up: list[str] = []
    monkeypatch.setattr(
        "distillbench.cells.work.give_up", lambda words, status, why, log: not given_up.append(why)
    )
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    folder = checkout.folder / "results/runs/tiny-ring/meanflow/0.trained.slurm"
    work = Command(
        ["train", "tiny-ring", "meanflow", "--seeds", "0,1"], checkout.folder, folder, 60, 1
    )
    work._began = -1e9

    def limits(count: int) -> int:
        for _ in range(count):
            assert work.checkpoint() is not None
        return len(given_up)

    def finish(seed: int) -> None:
        record = cell("tiny-ring", "meanflow", seed).record
        record.parent.mkdir(parents=True)
        write_json(record, {"status": "done"})

    assert limits(1) == 0
    finish(7)  # not of this job
    assert limits(1) == 1 and given_up == [
        "not done in 2 jobs of 60 min (workflows/resources.yaml)"
    ]
    finish(0)
    assert limits(1) == 1 and limits(1) == 2


def test_status_plan_and_cancel(site: Site):
    site.held()
    site.resources(gpus=1, seeds=1)
    site.table("seen", ["slow"], "slow-ring", [0, 1])
    plan = site.run("distillbench", "plan", "seen", "--profile", "slurm").stdout
    assert "slow-ring/slow: seeds 0" in plan and "1 GPUs" in plan and "GPU-hours" in plan
    process = site.start(*LITERAL, "--cores", "1", "results/seen.md")
    number = site.training("slow")
    status = site.run("distillbench", "status", "seen", "--long").stdout
    assert re.search(
        rf"slow-ring/slow seed \d: \d+%.* left, n\d, .*steps/s, job {number}", status
    ), status
    cancelled = site.run("distillbench", "cancel", "seen")
    assert cancelled.returncode == 0 and number in cancelled.stdout
    site.leave("slow", number)
    _, errors = process.communicate()
    assert process.returncode == 1 and "lost: cancelled" in errors and "trying again" not in errors
    assert (
        len(re.findall(r"train slow-ring slow --seeds \d: job \d+ submitted", errors)) == 1
    )  # not the other seed
    assert errors.count("cancelled before it was submitted") >= 1
    site.until(lambda: not site.cluster.jobs(), "an empty queue")
    assert "lost: slow-ring/slow: cancelled" in site.run("distillbench", "status", "seen").stdout


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("partition: nowhere", "invalid partition specified: nowhere"),
        ("sbatch: {constraint: unheard-of}", "mend `constraint` in slurm/site.yaml"),
        ("partitio: gpu", "unknown key 'partitio', did you mean 'partition'?"),
    ],
)
def test_a_mistake_in_the_site_file_is_one_line_before_any_work(site: Site, text: str, words: str):
    site.write("slurm/site.yaml", text + "\n")
    done = site.run(*LITERAL, "results/small.md")
    ours = [line for line in done.stderr.splitlines() if line.startswith("distillbench: ")]
    assert done.returncode == 2 and len(ours) == 1 and words in ours[0], done.stderr
    assert not list(site.folder.glob("results/runs/**/*.slurm")) and "Traceback" not in done.stderr


def test_a_job_that_would_wait_for_ever_is_taken_back(site: Site):
    site.write(
        "slurm/site.yaml", "partition: short\n"
    )  # its limit is two minutes; sbatch takes the job all the same
    done = site.run(*LITERAL, "results/small.md")
    assert (
        done.returncode == 1
        and "would never start (PartitionTimeLimit): lower `minutes` in workflows/resources.yaml"
        in done.stderr
    )
    assert not site.cluster.jobs()


def test_more_than_the_cluster_has_is_refused(site: Site):
    site.resources(gpus=9)
    done = site.run(*LITERAL, "results/small.md")
    assert done.returncode == 2 and "ask for less in workflows/resources.yaml" in done.stderr, (
        done.stderr
    )
    site.resources(nodes=2)
    done = site.run(*LITERAL, "results/small.md")
    assert done.returncode == 2 and "several ranks train one cell: set seeds: 1" in done.stderr, (
        done.stderr
    )


def test_no_slurm_here_is_one_line(site: Site):
    folder = site.folder / "bin"
    folder.mkdir()
    for name in ("snakemake", "python", "bash", "env", "cat", "uname", "git"):
        found = Path(sys.executable).parent / name
        os.symlink(found if found.exists() else shutil.which(name), folder / name)
    site.environment["PATH"] = str(folder)
    done = site.run(*LITERAL, "results/small.md")
    assert (
        done.returncode == 2 and "no sbatch here: run on a login node of the cluster" in done.stderr
    ), done.stderr


def test_a_job_that_cannot_start_says_what_to_look_at(site: Site, cluster: Cluster):
    """Its Python is not there when it starts, as on a node with another file system."""
    python = site.folder / "python"
    os.symlink(os.path.realpath(sys.executable), python)
    site.environment["PYTHONPATH"] += (
        f":{sysconfig.get_path('purelib')}"  # it knows nothing of the environment
    )
    request = json.dumps(
        {
            "nodes": 1,
            "ranks": 1,
            "gpus": 0,
            "cpus": 1,
            "memory_gb": 1,
            "minutes": 5,
            "time_limits": 1,
            "tries": 1,
            "backoff_s": 0,
            "sbatch": {"hold": True},
        }
    )
    process = site.start(
        str(python),
        "-c",
        "import sys; from distillbench.cluster import dispatch, launcher, queue; "
        "queue.SECONDS = 0.5; launcher.NOTICE = 3.0; sys.exit(dispatch.main(sys.argv[1:]))",
        "slurm",
        "results/runs/tiny-ring/teacher/0.trained",
        request,
        "train",
        "tiny-ring",
        "teacher",
        "--seeds",
        "0",
    )
    number = site.until(lambda: list(cluster.jobs()), "a job")[0]
    python.unlink()
    cluster.run("scontrol", "release", number)
    _, errors = process.communicate()
    assert process.returncode == 1
    assert "before it could start: see that the nodes have" in errors and str(python) in errors, (
        errors
    )


def test_a_node_with_other_packages_is_named(site: Site, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SLURM_CONF", site.environment["SLURM_CONF"])
    monkeypatch.setenv("PATH", site.environment["PATH"])
    monkeypatch.setattr(job, "packages", lambda: {"python": "2.7", "torch": "0.1"})
    request = {
        "nodes": 1,
        "ranks": 1,
        "gpus": 0,
        "cpus": 1,
        "memory_gb": 1,
        "minutes": 5,
        "time_limits": 1,
        "tries": 2,
        "backoff_s": 0,
        "sbatch": {},
    }
    one = Launcher(
        site.folder / "results/runs/tiny-ring/teacher/0.trained",
        ["train", "tiny-ring", "teacher", "--seeds", "0"],
        Request(**request),
    )
    assert one.run() == 2
    assert (
        "has python 3." in read(one.folder / LOST)["why"]
        and "instead of 2.7" in read(one.folder / LOST)["why"]
    )


def test_launchers_share_their_questions(site: Site):
    """At most one squeue in a time, however many ask."""
    log = site.folder / "questions"
    real = shutil.which("squeue")
    site.write("bin/squeue", f'#!/bin/sh\necho >> {log}\nexec {real} "$@"\n').chmod(0o755)
    site.environment["PATH"] = f"{site.folder}/bin:{site.environment['PATH']}"
    seconds = 1.0
    code = (
        "import pathlib, time; from distillbench.cluster import queue\n"
        f"queue.SECONDS = {seconds}; shared = queue.SharedQueue(pathlib.Path('.')); seen = set()\n"
        "while len(seen) < 4: time.sleep(0.05); seen.add(getattr(shared.recent(), 'time', None))"
    )
    began = time.time()
    asking = [site.start(sys.executable, "-c", code) for _ in range(8)]
    assert [p.wait() for p in asking] == [0] * 8
    questions = log.read_text().count("\n")
    assert 2 <= questions <= (time.time() - began) / seconds + 1
