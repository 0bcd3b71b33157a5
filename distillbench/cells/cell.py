"""A cell is (benchmark, arm, seed): its key, its folder, its record. Imports no torch.

The key is a hash of everything that determines the result. If the record stands in the keyed folder
the cell is fresh; nothing else decides.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from distillbench.cells.disk import lock
from distillbench.config import Benchmark, root
from distillbench.errors import UserError
from distillbench.hashing import canonical, digest
from distillbench.registry.code import runner_hash
from distillbench.registry.folders import Arm

KEY_DIGITS = 12
# Parts of a benchmark that are in the key of its cells as they are written.
IN_KEY = {"data", "network", "teacher", "sampling", "guidance"}


@dataclass(frozen=True)
class Cell:
    """One arm on one benchmark with one seed; arm=None is the teacher of that seed."""

    benchmark: Benchmark
    arm: Arm | None
    seed: int

    @property
    def arm_name(self) -> str:
        """Name of the arm, or 'teacher'."""
        return "teacher" if self.arm is None else self.arm.name

    @property
    def label(self) -> str:
        """The cell's name in messages: `<benchmark>/<arm> seed <seed>`."""
        return f"{self.benchmark.name}/{self.arm_name} seed {self.seed}"

    @property
    def teacher(self) -> Cell:
        """The teacher's cell that it is paired with, of the same seed."""
        return Cell(self.benchmark, None, self.seed)

    @cached_property
    def start(self) -> Cell | None:
        """The cell whose student this one starts from, of the same seed and teacher."""
        arm = None if self.arm is None else self.arm.start
        return None if arm is None else Cell(self.benchmark, arm, self.seed)

    @property
    def needed(self) -> list[Cell]:
        """The cells that have to be trained before it: its teacher and its start."""
        cells = [] if self.arm is None else [self.teacher]
        if self.start is not None:
            cells.append(self.start)
        return cells

    @property
    def budget(self) -> float:
        """FLOPs it may spend, its start's included; from scratch the teacher's come on top."""
        assert self.arm is not None
        return self.benchmark.budget.flops * self.arm.share

    @property
    def own_budget(self) -> float:
        """FLOPs that are left of its budget when its start has been paid for."""
        return self.budget - (self.start.budget if self.start else 0)

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """Everything that determines the result, as JSON."""
        b = self.benchmark
        recipe = {
            "seed": self.seed,
            "ground": runner_hash(b.data.kind),
            "data": b.data.fingerprint(),
            "benchmark": b.model_dump(mode="json", include=IN_KEY),
        }
        if self.arm is None:
            return recipe
        recipe |= {
            "budget": {"flops": self.budget},
            "teacher": self.teacher.key,
            "group": self.arm.attribute("group"),
            "method": self.arm.folder.code_hash(),
            "config": self.arm.settings(b),
        }
        if self.start is not None:
            recipe["start"] = self.start.key
        return recipe

    @cached_property
    def key(self) -> str:
        """12 hexadecimal digits of a hash of its recipe."""
        return digest(canonical(self.recipe))[:KEY_DIGITS]

    @cached_property
    def folder(self) -> Path:
        """results/runs/<benchmark>/<arm>/seed<seed>-<key>."""
        runs = root() / "results/runs"
        return runs / self.benchmark.name / self.arm_name / f"seed{self.seed}-{self.key}"

    @property
    def record(self) -> Path:
        """File of how it was trained, which exists once that has ended."""
        return self.folder / "result.json"

    @property
    def metrics(self) -> Path:
        """File of its evaluation."""
        return self.folder / "metrics.json"

    def result(self) -> dict[str, Any] | None:
        """The record, or None while the cell is not fresh."""
        return read_record(self.record)

    def labels(self) -> dict[str, Any]:
        """What a table says about the cell's arm besides its numbers."""
        if self.arm is not None:
            return self.arm.labels()
        return {
            "title": "Teacher",
            "fidelity": None,
            "adaptation": False,
            "trajectory": False,
            "reported": [],
        }

    @contextmanager
    def locked(self) -> Iterator[None]:
        """A block in which this process alone works on the cell.

        A second one waits, and then finds the record.
        """
        with lock(self.folder / "lock"):
            yield


def read_record(path: Path) -> dict[str, Any] | None:
    """A result.json, or None where there is none; UserError where it is damaged."""
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        record["status"]
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{path}: not valid JSON of a record: delete it and rerun") from None
    except OSError as e:
        raise UserError(
            f"{path}: cannot be read ({e.strerror}): make it readable, then rerun"
        ) from None
    return record
