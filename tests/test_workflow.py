"""The whole chain through the real Snakemake on tiny cells: a table, failures, outside methods, kill -9."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.conftest import Checkout
from tests.test_cells import BROKEN, edit


def rows(checkout: Checkout, table: str) -> dict[tuple[str, int | None], dict]:
    """Rows of results/<table>.json by (method, nfe)."""
    found = json.loads((checkout.folder / f"results/{table}.json").read_text())["rows"]
    return {(r["method"], r["nfe"]): r for r in found}


def test_a_table_of_images_end_to_end(checkout: Checkout):
    done = checkout.snakemake("results/tiny.md")
    assert done.returncode == 0, done.stderr
    found = rows(checkout, "tiny")
    assert {m for m, _ in found} == {"floor", "class_means", "class_gaussian", "mixup", "memoriser", "teacher", "dmd", "meanflow"}
    for key, row in found.items():
        assert row["status"] == "done" and row["seeds"] == 2, key
        assert row["fid_mean"] > 0 and 0 <= row["recall_mean"] <= 1 and row["fid_sd"] is not None
    assert found["class_means", None]["gap_closed_mean"] == 0
    assert found["teacher", 8]["gap_closed_mean"] == pytest.approx(1)
    # The teacher against itself from other noise: what a perfect student scores, below every student.
    assert 0 < found["teacher", 8]["fid_teacher_mean"] < min(found["teacher", 1]["fid_teacher_mean"], found["dmd", 1]["fid_teacher_mean"])
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
    assert redone.returncode == 0 and "6 of 6 cells have exactly the metrics published before" in redone.stderr
    assert "tiny/dmd seed 1: done" in redone.stderr and "tiny/dmd seed 0: done" not in redone.stderr


def test_a_method_from_outside_and_four_broken_ones(checkout: Checkout):
    """A copy of meanflow elsewhere adds its rows; copies of dmd broken in four ways give four failed rows."""
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
        assert row["status"].startswith(BROKEN[name][2].upper()) and BROKEN[name][3] in row["status"]
        assert row["seeds"] == 0
    for nfe in (1, 2, 4):
        assert found["myflow", nfe]["sliced_w2_mean"] == found["meanflow", nfe]["sliced_w2_mean"], "the name draws no random number"
    page = (checkout.folder / "results/tiny-ring.md").read_text()
    assert page.count("FAILED: ") == 3 and page.count("DIVERGED: ") == 1
    assert found["dmd", 1]["status"] == "done"


def descendants(pid: int) -> list[int]:
    found = subprocess.run(["ps", "-e", "-o", "pid=,ppid="], capture_output=True, text=True).stdout.split()
    parents = dict(zip(map(int, found[::2]), map(int, found[1::2])))
    children = [p for p, parent in parents.items() if parent == pid]
    return children + [d for c in children for d in descendants(c)]


def test_a_workflow_killed_with_its_teacher_still_makes_the_table(checkout: Checkout):
    """Snakemake forces jobs that a kill left incomplete, and must not forget what hangs on them."""
    process = subprocess.Popen(
        ["snakemake", "--cores", "2", "results/tiny-ring.md"],
        cwd=checkout.folder, env=checkout.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while not list((checkout.folder / "results/runs").glob("tiny-ring/teacher/*/lock")):
        time.sleep(0.05)
        assert process.poll() is None
    process.kill()
    process.wait()
    done = checkout.snakemake("results/tiny-ring.md")
    assert done.returncode == 0, done.stderr
    assert len(checkout.metrics()) == 6 and (checkout.folder / "results/tiny-ring.md").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("target", ["worker", "snakemake", "group"])
@pytest.mark.parametrize("attempt", range(3))
def test_kill_9_at_a_random_moment_changes_no_metric(checkout: Checkout, target: str, attempt: int):
    """Kill, then the same command: it continues and every metrics.json equals the uninterrupted one."""
    edit(checkout.folder / "workflows/benchmarks/tiny-ring.yaml", "flops: 7.0e+9", "flops: 1.5e+10")
    assert checkout.snakemake("results/tiny-ring.md").returncode == 0
    expected = checkout.metrics()
    assert len(expected) == 6
    shutil.rmtree(checkout.folder / "results")

    command = ["snakemake", "--cores", "2", "results/tiny-ring.md"]
    process = subprocess.Popen(
        command, cwd=checkout.folder, env=checkout.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    moment = random.Random(f"{target} {attempt}").uniform(3, 25)
    time.sleep(moment)
    workers: list[int] = []
    while target == "worker" and not workers:
        assert process.poll() is None, "it ended before the kill"
        workers = [p for p in descendants(process.pid) if b"distillbench.cli" in Path(f"/proc/{p}/cmdline").read_bytes()]
    assert process.poll() is None, "it ended before the kill"
    if target == "worker":
        os.kill(workers[0], signal.SIGKILL)
        process.wait(timeout=300)
    elif target == "group":
        os.killpg(process.pid, signal.SIGKILL)
    else:
        os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = checkout.snakemake("results/tiny-ring.md")
    assert done.returncode == 0, done.stderr
    assert checkout.metrics() == expected
