"""The whole chain through the real Snakemake on tiny cells: tables, failures, kill -9."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from distillbench.cells import journal
from distillbench.cells.checkpoint import CHECKPOINTS
from distillbench.cells.journal import NAME
from distillbench.registry import folders
from tests.commands import real_environment
from tests.conftest import Checkout
from tests.test_cells import BROKEN, edit


def rows(checkout: Checkout, table: str) -> dict[tuple[str, int | None], dict]:
    """Rows of results/<table>.json by (method, nfe), of arms without a variant."""
    found = json.loads((checkout.folder / f"results/{table}.json").read_text())["rows"]
    return {(r["method"], r["nfe"]): r for r in found if r["variant"] is None}


def test_a_table_of_images_end_to_end(checkout: Checkout):
    done = checkout.snakemake("results/tiny.md")
    assert done.returncode == 0, done.stderr
    found = rows(checkout, "tiny")
    assert {m for m, _ in found} == {
        "floor",
        "class_means",
        "class_gaussian",
        "mixup",
        "memoriser",
        "teacher",
        *folders.discover(),
    }
    for key, row in found.items():
        assert row["status"] == "done" and row["seeds"] == 2, key
        assert row["fid_mean"] > 0 and 0 <= row["recall_mean"] <= 1 and row["fid_sd"] is not None
    assert found["class_means", None]["gap_closed_mean"] == 0
    assert found["teacher", 8]["gap_closed_mean"] == pytest.approx(1)
    # The teacher against itself from other noise:
    # what a perfect student scores, below every student.
    assert (
        0
        < found["teacher", 8]["fid_teacher_mean"]
        < min(found["teacher", 1]["fid_teacher_mean"], found["dmd", 1]["fid_teacher_mean"])
    )
    assert found["meanflow", 1]["headline"] and not found["meanflow", 2]["headline"]
    # The budget is metered, not declared: both methods spent it to within one cycle.
    for method in ("dmd", "meanflow"):
        assert 0.97 * 1.5e9 < found[method, 1]["budget"] <= 1.5e9
    assert (checkout.folder / "results/tiny.png").read_bytes()[:4] == b"\x89PNG"

    again = checkout.snakemake("results/tiny.md")
    assert "Nothing to be done" in again.stderr
    # Deleting a cell's record is what makes it run again, and it reproduces the published metrics.
    (record,) = checkout.folder.glob("results/runs/tiny/dmd/seed1-*/result.json")
    shutil.rmtree(record.parent)
    redone = checkout.snakemake("results/tiny.md")
    # the teacher, and meanflow@x0.7, from which FSF-DMD starts
    every = 2 * (1 + len(folders.discover()) + 1)
    assert (
        redone.returncode == 0
        and f"{every} of {every} cells have exactly the metrics published before" in redone.stderr
    )
    assert "tiny/dmd seed 1: done" in redone.stderr and "tiny/dmd seed 0: done" not in redone.stderr


def test_a_method_from_outside_and_four_broken_ones(checkout: Checkout):
    """A copy of meanflow elsewhere adds its rows; four broken copies of dmd give failed rows."""
    checkout.keep("dmd", "meanflow")
    outside = checkout.folder.parent / "paper/myflow"
    shutil.copytree(checkout.folder / "methods/meanflow", outside)
    edit(checkout.folder / "distillbench.yaml", "[]", "[../paper/myflow]")
    four = ("noimport", "raises", "nan", "shape")
    for name in four:
        shutil.copytree(checkout.folder / "methods/dmd", checkout.folder / f"methods/{name}")
        edit(checkout.folder / f"methods/{name}/method.py", *BROKEN[name][:2])
    done = checkout.snakemake("results/tiny-ring.md")
    assert done.returncode == 0, done.stderr
    found = rows(checkout, "tiny-ring")
    for name in four:
        row = found[name, None]
        assert (
            row["status"].startswith(BROKEN[name][2].upper()) and BROKEN[name][3] in row["status"]
        )
        assert row["seeds"] == 0
    for nfe in (1, 2, 4):
        assert found["myflow", nfe]["sliced_w2_mean"] == found["meanflow", nfe]["sliced_w2_mean"], (
            "the name draws no random number"
        )
    page = (checkout.folder / "results/tiny-ring.md").read_text()
    assert page.count("FAILED: ") == 3 and page.count("DIVERGED: ") == 1
    assert found["dmd", 1]["status"] == "done"


def descendants(pid: int) -> list[int]:
    found = subprocess.run(
        ["ps", "-e", "-o", "pid=,ppid="], capture_output=True, text=True
    ).stdout.split()
    parents = dict(zip(map(int, found[::2]), map(int, found[1::2])))
    children = [p for p, parent in parents.items() if parent == pid]
    return children + [d for c in children for d in descendants(c)]


def test_a_workflow_killed_with_its_teacher_still_makes_the_table(checkout: Checkout):
    """Snakemake forces jobs that a kill left incomplete, and must not forget what hangs on them."""
    checkout.keep("dmd", "fsf_dmd", "meanflow")
    process = checkout.start("snakemake", "--cores", "2", "results/tiny-ring.md")
    while not list((checkout.folder / "results/runs").glob("tiny-ring/teacher/*/lock")):
        time.sleep(0.05)
        assert process.poll() is None
    process.kill()
    process.wait()
    done = checkout.snakemake("results/tiny-ring.md")
    assert done.returncode == 0, done.stderr
    assert (
        len(checkout.metrics()) == 2 * (1 + len(folders.discover()) + 1)
        and (checkout.folder / "results/tiny-ring.md").is_file()
    )


# a command is the watcher of the worker that it forks
VICTIMS = (
    "worker",
    "command",
    "snakemake",
    "group",
)
RUNS, KILLS = 4, 5  # kills in each run
KILLED = ("add", "dmd", "freeflow")  # with a discriminator, with pairs, with two networks


def longer(checkout: Checkout) -> Checkout:
    """With three methods, whose students train for some twenty seconds."""
    methods = ", ".join(KILLED)
    table = (
        f"{{name: tiny-ring, title: tiny-ring, benchmarks: [tiny-ring], methods: [{methods}]}}\n"
    )
    checkout.write("workflows/tables/tiny-ring.yaml", table)
    edit(checkout.folder / "workflows/benchmarks/tiny-ring.yaml", "flops: 7.0e+9", "flops: 6.0e+10")
    return checkout


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The metrics of a run that nobody disturbs."""
    made = longer(Checkout(tmp_path_factory.mktemp("uninterrupted")))
    assert made.snakemake("results/tiny-ring.md").returncode == 0
    assert all(repeated(folder) == (0, 0) for folder in cells_of(made))
    return made.metrics()


@pytest.mark.slow
def test_twenty_kills_at_random_moments_change_no_metric(
    checkout: Checkout, uninterrupted: dict[str, bytes]
):
    """Three methods, killed again and again, have the metrics of an uninterrupted run.

    Nothing is trained twice that a checkpoint holds. The first kill of a run falls into its
    start-up, the others from a student's first step on.
    """
    longer(checkout)
    resumes = 0
    for run in range(RUNS):
        log = killed_again_and_again(checkout, run)
        done = checkout.snakemake("results/tiny-ring.md")
        assert done.returncode == 0, done.stderr
        assert checkout.metrics() == uninterrupted and len(uninterrupted) == 2 * (1 + len(KILLED))
        counts = {
            f"{folder.parent.name}/{folder.name[:5]}": repeated(folder)
            for folder in cells_of(checkout)
        }
        print(
            f"run {run}: killed {', '.join(log)}; cells (resumes, updates trained again): {counts}"
        )
        resumes += sum(n for n, _ in counts.values())
        shutil.rmtree(checkout.folder / "results")
    assert resumes > 0  # or nothing was tested


def killed_again_and_again(checkout: Checkout, run: int) -> list[str]:
    """Start the workflow and kill a part of it, KILLS times; who and when."""
    chance, log = random.Random(run), []
    for kill in range(KILLS):
        began, victim = time.time(), VICTIMS[(run + kill) % len(VICTIMS)]
        process = subprocess.Popen(
            ["snakemake", "--cores", "2", "results/tiny-ring.md"],
            cwd=checkout.folder,
            env=real_environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        while kill and not any(student_trains(folder, began) for folder in cells_of(checkout)):
            assert process.poll() is None, "it ended before the kill"
            time.sleep(0.05)
        time.sleep(chance.uniform(0, 8))
        assert process.poll() is None, "it ended before the kill"
        if victim == "group":
            os.killpg(process.pid, signal.SIGKILL)
        elif victim == "snakemake":
            os.kill(process.pid, signal.SIGKILL)
        else:
            kill_one(process, victim)
            time.sleep(chance.uniform(0, 3))
            # it would retry by itself; the next kill shall meet another command
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=600)  # after SIGTERM it lets a job end that it had just started
        log.append(f"{victim} after {time.time() - began:.0f} s")
    return log


def student_trains(folder: Path, since: float) -> bool:
    path = folder / NAME
    return folder.parent.name != "teacher" and path.exists() and path.stat().st_mtime > since


def cells_of(checkout: Checkout) -> list[Path]:
    return sorted((checkout.folder / "results/runs").glob("*/*/seed*"))


def kill_one(process: subprocess.Popen, victim: str) -> None:
    """A command of a stage, or the worker it watches; waits for the first one."""
    while process.poll() is None:
        commands = [p for p in descendants(process.pid) if b"distillbench.cli" in words(p)]
        workers = [p for p in commands if any(p in descendants(other) for other in commands)]
        found = workers if victim == "worker" else [p for p in commands if p not in workers]
        for pid in found:
            with contextlib.suppress(ProcessLookupError):  # it has just ended: the next one
                return os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)
    raise AssertionError("it ended before the kill")


def words(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def repeated(folder: Path) -> tuple[int, int]:
    """Resumes of a cell and updates trained again, by its journal; no checkpoint had one of them.

    A process that begins at k trains k, k+1, ... alone. Its checkpoint of k updates may lack its
    line where the kill fell between the two; then it is the one after the last line.
    """
    lines, resumes, again, trained, saved = journal.read(folder), 0, 0, 0, 0
    every = max(1, lines[0]["steps"] // CHECKPOINTS)
    for line in lines:
        if "start" in line:
            assert line["start"] in (saved, min(saved + every, line["steps"])), line
            again += max(0, trained - line["start"])
            resumes, trained, saved = resumes + (line is not lines[0]), line["start"], line["start"]
        elif "step" in line:
            assert trained <= line["step"] < saved + every, line
            trained = line["step"] + 1
        elif "checkpoint" in line:
            trained = saved = line["checkpoint"]
    assert saved == lines[0]["steps"]
    return resumes, again


def test_updates_trained_twice_are_counted(tmp_path: Path):
    def of(*lines: dict) -> tuple[int, int]:
        (tmp_path / NAME).write_text("".join(json.dumps(line) + "\n" for line in lines))
        return repeated(tmp_path)

    start = {"start": 0, "steps": 40}  # a checkpoint every 2

    def step(i):
        return {"step": i}

    def rest(k):
        lines = []
        for i in range(k, 40, 2):
            lines += [step(i), step(i + 1), {"checkpoint": i + 2}]
        return lines

    killed = [start, step(0), step(1), {"checkpoint": 2}, step(2), step(3)]
    # The line of its last checkpoint was lost.
    assert of(*killed, start | {"start": 4}, *rest(4)) == (1, 0)
    assert of(*killed, start | {"start": 2}, *rest(2)) == (1, 2)
    for bad in (
        [*killed, start, *rest(0)],
        [*killed, start | {"start": 2}, step(1)],
        [*killed, step(4), step(5)],
        killed,
    ):
        with pytest.raises(AssertionError):
            of(*bad)
