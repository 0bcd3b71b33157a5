"""Re-keying: new keys only where cells that are trained again give the same numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import RING
from tests.test_keys import Tree, replacing

PLAYERS = "distillbench/players.py"
TABLE = """
name: tiny
title: Tiny
benchmarks: [tiny-ring]
methods: [meanflow]
seeds: [0]
"""


class Repository(Tree):
    """A copy of the checkout's code with one tiny table, trained, published and committed."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        for file in (folder / "workflows/tables").glob("*.yaml"):
            file.unlink()
        (folder / "workflows/tables/tiny.yaml").write_text(TABLE)
        (folder / "workflows/benchmarks/tiny-ring.yaml").write_text(RING)
        (folder / ".gitignore").write_text("results/runs/\n__pycache__/\n")
        self.git("init", "-q")
        for name in ("name", "email"):
            self.git("config", f"user.{name}", "someone")
        for command in (
            ("train", "tiny-ring", "meanflow", "--seeds", "0"),
            ("evaluate", "tiny-ring", "meanflow", "--seeds", "0"),
            ("evaluate", "tiny-ring", "teacher", "--seeds", "0"),
            ("table", "tiny"),
        ):
            assert self.distillbench(*command).returncode == 0
        self.commit("before")

    def git(self, *words: str) -> None:
        subprocess.run(["git", *words], cwd=self.folder, check=True, capture_output=True)

    def commit(self, message: str) -> None:
        self.git("add", "-A")
        self.git("commit", "-q", "-m", message)

    def distillbench(self, *words: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"PYTHONPATH": str(self.folder), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "distillbench.cli", *words]
        return subprocess.run(
            command, cwd=self.folder, env=environment, capture_output=True, text=True
        )

    def published(self) -> dict[str, bytes]:
        """The published records by their place."""
        records = self.folder / "results/records"
        return {str(path): path.read_bytes() for path in sorted(records.rglob("*.json"))}


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    return Repository(tmp_path_factory.mktemp("rekey") / "tree")


def keys_of(files: dict[str, bytes]) -> set[str]:
    return {json.loads(data)["key"] for name, data in files.items() if "seed0" in name}


def test_only_equal_numbers_give_new_keys(repository: Repository):
    before = repository.published()
    # An edit that changes the code of every cell, and no number.
    replacing(PLAYERS, "self.updates += 1", "self.updates += 2 - 1")(repository.folder)
    refused = repository.distillbench("rekey", "HEAD")
    assert refused.returncode == 2 and "uncommitted changes" in refused.stderr
    repository.commit("no number changes")
    # Planted: one that changes numbers, behind the first.
    replacing(PLAYERS, "c.lr * ", "1.01 * c.lr * ")(repository.folder)
    repository.commit("numbers change")
    done = repository.distillbench("rekey", "HEAD~2", "--prove", "1", "--seed", "3")
    assert done.returncode == 1, done.stderr
    assert "tiny-ring/meanflow seed 0 has other metrics" in done.stderr
    assert repository.published() == before
    repository.git("revert", "--no-edit", "HEAD")
    done = repository.distillbench("rekey", "HEAD~3", "--prove", "1", "--seed", "3")
    assert done.returncode == 0, done.stderr
    after = repository.published()
    log = json.loads(after.pop(str(repository.folder / "results/records/rekeyed.json")))
    assert log[0]["seed"] == 3 and log[0]["cells"] == ["tiny-ring/meanflow seed 0"]
    assert log[0]["records"] == 2  # the teacher's as well
    assert set(after) == set(before) and not keys_of(after) & keys_of(before)
    # The records are those of the present code: nothing is left to train or to publish anew.
    again = repository.distillbench("rekey", "HEAD~3")
    assert again.returncode == 0 and "every record has its key" in again.stderr
    assert repository.distillbench("table", "tiny").returncode == 0
    assert repository.distillbench("table", "tiny", "--check").returncode == 0
    assert keys_of(repository.published()) == keys_of(after)
