"""A cell is (benchmark, arm, seed): its key, its folder, its record. Imports no torch.

The key is a hash of everything that determines the result. If the record stands in the keyed folder the cell is fresh;
nothing else decides.
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
from distillbench.registry.code import ground_hash
from distillbench.registry.folders import Arm


@dataclass(frozen=True)
class Cell:
    """arm=None is the teacher of that seed."""

    benchmark: Benchmark
    arm: Arm | None
    seed: int

    @property
    def arm_name(self) -> str:
        return "teacher" if self.arm is None else self.arm.name

    @property
    def label(self) -> str:
        return f"{self.benchmark.name}/{self.arm_name} seed {self.seed}"

    @property
    def teacher(self) -> Cell:
        """Seed k of a method is paired with teacher k."""
        return Cell(self.benchmark, None, self.seed)

    @cached_property
    def start(self) -> Cell | None:
        """The cell whose student this one starts from, of the same seed and teacher."""
        arm = None if self.arm is None else self.arm.start
        return None if arm is None else Cell(self.benchmark, arm, self.seed)

    @property
    def needed(self) -> list[Cell]:
        """What has to be trained before it."""
        return [
            c for c in (None if self.arm is None else self.teacher, self.start) if c is not None
        ]

    @property
    def budget(self) -> float:
        """FLOPs it may spend, of its start and its own; from scratch the teacher's come on top."""
        assert self.arm is not None
        return self.benchmark.budget.flops * self.arm.share

    @property
    def own_budget(self) -> float:
        """What of it is left when its start has been paid for."""
        return self.budget - (self.start.budget if self.start else 0)

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """Everything that determines the result, as JSON."""
        b = self.benchmark
        common = {
            "seed": self.seed,
            "ground": ground_hash(b.data.kind),
            "data": b.data.fingerprint(),
            "benchmark": b.model_dump(
                mode="json", include={"data", "network", "teacher", "sampling", "guidance"}
            ),
        }
        if self.arm is None:
            return common
        return common | {
            "budget": {"flops": self.budget},
            "teacher": self.teacher.key,
            "group": self.arm.attribute("group"),
            "method": self.arm.folder.code_hash(),
            "config": self.arm.settings(b),
            **({} if self.start is None else {"start": self.start.key}),
        }

    @cached_property
    def key(self) -> str:
        return digest(canonical(self.recipe))[:12]

    @cached_property
    def folder(self) -> Path:
        return (
            root()
            / "results/runs"
            / self.benchmark.name
            / self.arm_name
            / f"seed{self.seed}-{self.key}"
        )

    @property
    def record(self) -> Path:
        return self.folder / "result.json"

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.json"

    def result(self) -> dict[str, Any] | None:
        """The record, or None while the cell is not fresh."""
        return read_record(self.record)

    def labels(self) -> dict[str, Any]:
        """What a table says about the cell's arm besides its numbers."""
        teacher: dict[str, Any] = {
            "title": "Teacher",
            "fidelity": None,
            "adaptation": False,
            "trajectory": False,
            "reported": [],
        }
        return teacher if self.arm is None else self.arm.labels()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One process at a time works on a cell; a second one waits and then finds the record."""
        with lock(self.folder / "lock"):
            yield


def read_record(path: Path) -> dict[str, Any] | None:
    """A result.json, or None where there is none; UserError where it is damaged."""
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text())
        found["status"]
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{path}: not valid JSON of a record: delete it and rerun") from None
    except OSError as e:
        raise UserError(
            f"{path}: cannot be read ({e.strerror}): make it readable, then rerun"
        ) from None
    return found
