"""`distillbench status` and `distillbench logs`."""

from __future__ import annotations

import json
import os
import re

import pytest

from distillbench import config
from distillbench.cells.cell import Cell
from distillbench.cells.disk import LAST, is_locked
from distillbench.cli.evaluate import known_metrics
from distillbench.registry import folders
from distillbench.tables import contents
from tests.conftest import Checkout
from tests.test_cells import cell, edit
from tests.test_resilience import AT, FIRST, TRIGGER, before, until_end, wait_for


def test_status_shows_a_matrix(checkout: Checkout):
    first = checkout.run("distillbench", "status", "tiny-ring")
    assert first.returncode == 0, first.stderr
    rows = {
        line.split()[0]: line.split(maxsplit=1)[1].rstrip()
        for line in first.stdout.splitlines()
        if "/" in line
    }
    assert list(rows) == [
        "tiny-ring/teacher",
        *(f"tiny-ring/{m}" for m in [*sorted(folders.discover()), "meanflow@x0.7"]),
    ]
    assert rows["tiny-ring/teacher"].split() == ["to", "do", "to", "do"] and rows[
        "tiny-ring/dmd"
    ].split() == ["waiting", "waiting"]
    assert f"0 of {2 * len(rows)} cells done, time left unknown" in first.stdout

    edit(
        checkout.folder / "methods/dmd/method.py",
        *before(FIRST, TRIGGER + "raise ValueError('seven')"),
    )
    slow = before(FIRST, "import time; time.sleep(0.5)")
    edit(checkout.folder / "methods/meanflow/method.py", *slow)
    assert checkout.run("distillbench", "train", "tiny-ring", "dmd", "--seeds", "0").returncode == 0
    command = ("distillbench", "train", "tiny-ring", "meanflow", "--seeds", "0")
    process = checkout.start(*command, new_session=True)
    with until_end(process):
        wait_for(cell(arm="meanflow").folder / LAST)
        running = checkout.run("distillbench", "status", "tiny-ring").stdout
        story = checkout.run("distillbench", "logs", "tiny-ring/meanflow/0").stdout
    stopped = checkout.run("distillbench", "status", "tiny-ring").stdout
    found = re.search(r"tiny-ring/meanflow +(\d+)% \d+ (s|min) left +waiting", running)
    assert found and 0 < int(found[1]) < 100, running
    assert re.search(r"tiny-ring/dmd +FAILED +waiting", running) and "1 failed" in running
    # its lock file is still there
    assert re.search(r"tiny-ring/meanflow +interrupted at \d+% +waiting", stopped), stopped
    assert (cell(arm="meanflow").folder / "lock").is_file() and not is_locked(
        cell(arm="meanflow").folder / "lock"
    )
    assert (
        re.search(r"seed0-[0-9a-f]{12}: running, \d+%", story)
        and "start at step 0 of" in story
        and "residual_s<t" in story
    )

    long = checkout.run("distillbench", "status", "tiny-ring", "--long").stdout
    assert (
        "tiny-ring/dmd seed 0: FAILED: ValueError: seven (method.py:" in long
        and "results/runs/tiny-ring/dmd/seed0-" in long
    )
    failed = checkout.run("distillbench", "logs", "tiny-ring/dmd/seed0").stdout
    assert (
        "FAILED: ValueError: seven" in failed
        and "traceback.txt:" in failed
        and f"\n {AT - 1} " in failed
    )
    assert checkout.run("distillbench", "logs", str(cell(arm="dmd").folder)).stdout == failed


def test_time_left_comes_from_cells_that_are_done_on_this_machine(
    checkout: Checkout, monkeypatch: pytest.MonkeyPatch
):
    from distillbench.tables import overview

    jobs = contents.jobs(config.table("tiny-ring"), known_metrics)
    arms = [a for a in sorted(folders.discover()) if a != "dmd"]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)

    def write(made: Cell, seconds: float, hardware: str) -> None:
        made.folder.mkdir(parents=True)
        made.record.write_text(
            json.dumps(
                {
                    "status": "done",
                    "cost": {"seconds": seconds, "flops": 3.5e9},
                    "provenance": {"hardware": hardware},
                }
            )
        )

    write(cell(arm=None), 30, overview.hardware())
    write(cell(arm="dmd"), 20, overview.hardware())
    states = [(c, overview.state_of(c, lambda _: True)) for j in jobs for c in j.cells]
    # Teacher 1: 30 s as teacher 0; dmd 1: 20 s as dmd 0;
    # both seeds of the others: 7e9 / 3.5e9 * 20 s, of which FSF-DMD's start has 0.7.
    left = sorted(s for s in overview.seconds_left(states) if s is not None)
    assert left == pytest.approx(sorted([30, 20, 12, 12, 28, 28] + [40] * 2 * (len(arms) - 1)))
    duration = overview.duration(sum(left) / 2)
    assert (
        overview.summary(states)
        == f"2 of {len(states)} cells done, about {duration} left on 2 cores"
    )
    trained = [(c, overview.state_of(c, lambda _: False)) for c, _ in states]
    assert overview.summary(trained).startswith(
        f"0 of {len(states)} cells done, 2 trained but not evaluated, about "
    )
    monkeypatch.setattr(overview, "hardware", lambda: "another")
    assert None in overview.seconds_left(states)


def test_what_time_is_called():
    from distillbench.tables.overview import duration

    assert [duration(s) for s in (0.4, 35, 700, 36000)] == ["0 s", "35 s", "12 min", "10.0 h"]


LOGS = [
    ("tiny-rong/dmd/0", "unknown benchmark 'tiny-rong', did you mean 'tiny-ring'?"),
    ("tiny-ring/dmb/0", "unknown method 'dmb', did you mean 'dmd'?"),
    ("tiny-ring/dmd/x", "'x' is no seed, known: 0, 1"),
    ("tiny-ring/dmd", "give benchmark/method/seed, e.g. digits/dmd/0"),
    ("tiny-ring/dmd/1", "nothing has happened yet in results/runs/tiny-ring/dmd/seed1-"),
]


@pytest.mark.parametrize("name,message", LOGS)
def test_a_mistyped_cell_is_one_line(checkout: Checkout, name: str, message: str):
    done = checkout.run("distillbench", "logs", name)
    assert (
        done.returncode == 2
        and message in done.stderr
        and len(done.stderr.strip().splitlines()) == 1
    )


def test_help_teaches_status_and_logs(checkout: Checkout):
    assert "interrupted at 41%" in checkout.run("distillbench", "status", "--help").stdout
    assert "distillbench logs digits/dmd/0" in checkout.run("distillbench", "logs", "--help").stdout
