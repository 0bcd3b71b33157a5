"""Full and read-only disks: one line, nothing lost, and it goes on when there is room."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from distillbench.cells import journal
from distillbench.cells.disk import LAST, PREVIOUS
from distillbench.cells.journal import NAME
from tests.conftest import BIN, ROOT, Checkout
from tests.test_cells import cell


@pytest.fixture
def small_disk(checkout: Checkout) -> Iterator[tuple[Checkout, Path]]:
    """results/ on a file system of its own, which a remount fills up or makes read-only."""
    results = checkout.folder / "results"
    results.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(results)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting is not permitted here")
    yield checkout, results
    subprocess.run(["umount", "-l", str(results)], check=True)


def remount(folder: Path, option: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{option}", str(folder)], check=True)


TRAIN = ("distillbench", "train", "tiny-ring", "meanflow", "--seeds", "0")


def contents(folder: Path) -> dict[str, bytes]:
    return {n: (folder / n).read_bytes() for n in ("student.safetensors", "samples.safetensors")}


def test_a_full_disk_stops_with_one_line_and_continues_with_room(small_disk, tmp_path: Path):
    checkout, results = small_disk
    assert checkout.run(*TRAIN).returncode == 0
    made = cell(arm="meanflow")
    expected = contents(made.folder)
    shutil.rmtree(made.folder)
    messages = set()
    # KiB: the lock, the configuration, a checkpoint, another, the samples do not fit
    for room in (
        0,
        40,
        120,
        200,
        300,
    ):
        filler = results / "filler"
        free = os.statvfs(results)
        filler.write_bytes(bytes(max(0, free.f_bavail * free.f_frsize - room * 1024)))
        had = (made.folder / LAST).read_bytes() if (made.folder / LAST).is_file() else None
        done = checkout.run(*TRAIN)
        filler.unlink()
        lines = done.stderr.strip().splitlines()
        assert done.returncode == 2 and len(lines) == 1, done.stderr
        assert re.search(
            rf"{results}/\S+: cannot (be written|write there) \(No space left on device\): make",
            lines[0],
        ), lines
        messages.add(lines[0].split(":")[1].split("/")[-1])
        assert not made.record.exists() and not list(made.folder.glob(".*"))
        kept = [p for p in (made.folder / LAST, made.folder / PREVIOUS) if p.is_file()]
        assert had is None or kept, "the checkpoint of before is intact"
    assert len(messages) > 1, messages  # not always the same file
    assert checkout.run(*TRAIN).returncode == 0
    assert contents(made.folder) == expected
    starts = [line["start"] for line in journal.read(made.folder) if "start" in line]
    assert starts == sorted(starts) and starts[-1] > 0, "it continued"


def test_a_read_only_disk_stops_with_one_line_and_continues_when_writable(small_disk):
    checkout, results = small_disk
    assert checkout.run(*TRAIN).returncode == 0
    made = cell(arm="meanflow")
    expected = contents(made.folder)
    made.record.unlink()
    remount(results, "ro")
    for command in (TRAIN, ("snakemake", "--cores", "1", "results/tiny-ring.md")):
        done = checkout.run(*command)
        lines = [
            line for line in done.stderr.strip().splitlines() if line.startswith("distillbench: ")
        ]
        assert done.returncode == 2 and len(lines) == 1 and "Traceback" not in done.stderr, (
            done.stderr
        )
        assert re.search(rf"{results}/\S+: cannot (be written|write there) \(", lines[0])
    assert checkout.run("distillbench", "status", "tiny-ring").returncode == 0
    assert checkout.run("distillbench", "logs", "tiny-ring/meanflow/0").returncode == 0
    remount(results, "rw")
    assert checkout.run(*TRAIN).returncode == 0 and contents(made.folder) == expected


def test_a_journal_line_is_whole_or_not_there(tmp_path: Path):
    """A limit on the size of a file stands for a full disk, for those who may not mount."""
    code = f"""
from pathlib import Path
from distillbench.cells.journal import Journal
from distillbench.errors import UserError
j = Journal(Path({str(tmp_path)!r}))
try:
    while True: j.add(step=1, text="x" * 40)
except UserError as e: print(e)
"""
    done = subprocess.run(
        [
            "bash",
            "-c",
            f"trap '' XFSZ; ulimit -f 2; exec {BIN}/python -c '{code.replace(chr(39), chr(34))}'",
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert "train.jsonl: cannot be written (File too large)" in done.stdout, done.stderr
    text = (tmp_path / NAME).read_text()
    assert (
        len(text) > 1500
        and text.endswith("\n")
        and all(json.loads(line) for line in text.splitlines())
    )
