"""Published records: the small JSON of every cell behind a table, in results/records/<table>/, with
the training curve of an arm's lowest seed (`eval/report/curves.py`). Imports no torch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar

from eval.report.curves import publish_curve

Item = TypeVar("Item")
Label = TypeVar("Label")
Cell = tuple[str, str, int]  # benchmark, arm, seed


@dataclass(frozen=True)
class Record:
    """One cell as published: its result and, if it finished, its metrics."""

    result: dict[str, Any]
    metrics: dict[str, Any] | None

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Metrics per NFE; empty where the cell failed."""
        return self.metrics["rows"] if self.metrics else []

    @property
    def fixed(self) -> list[dict[str, Any]]:
        """Metrics of the fixed rows, which the teacher of image benchmarks carries."""
        return self.metrics.get("fixed", []) if self.metrics else []

    @property
    def arm(self) -> str:
        """Name of its arm, `method@variant`."""
        return arm_name(self.result["method"], self.result["variant"])

    @property
    def benchmark(self) -> str:
        """Name of its benchmark."""
        return str(self.result["benchmark"])

    @property
    def seed(self) -> int:
        """Its training seed."""
        return int(self.result["seed"])

    @property
    def group(self) -> str:
        """A key of `rows.GROUPS`: what its arm is."""
        return str(self.result["group"])

    @property
    def status(self) -> str:
        """How it ended: "done", or why not."""
        return str(self.result["status"])

    def at(self, nfe: int | None) -> dict[str, Any] | None:
        """Metrics at an NFE, at its headline NFE for None; None where it has no samples there."""
        wanted = nfe or self.result["headline_nfe"]
        return next((row for row in self.rows if row["nfe"] == wanted), None)


def arm_name(method: str, variant: str | None) -> str:
    """Name of an arm, `method@variant`."""
    return f"{method}@{variant}" if variant else method


def grouped(items: Iterable[Item], key: Callable[[Item], Label]) -> dict[Label, list[Item]]:
    """Items by key, keys and items in the order in which they come."""
    out: dict[Label, list[Item]] = {}
    for item in items:
        out.setdefault(key(item), []).append(item)
    return out


def by_benchmark(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Records by benchmark, sorted by its name."""
    return dict(sorted(grouped(records, attrgetter("benchmark")).items()))


def by_arm(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Records by arm, sorted by its name."""
    return dict(sorted(grouped(records, attrgetter("arm")).items()))


def by_group(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Records by group."""
    return grouped(records, attrgetter("group"))


def place(record: Record) -> Cell:
    """Benchmark, arm and seed: the order of records."""
    return record.benchmark, record.arm, record.seed


def publish(
    folder: Path,
    cells: list[tuple[Path, dict[str, Any]]],
    with_draws: bool,
    more: dict[str, bytes] | None = None,
) -> tuple[int, int]:
    """Replace the records of a table by those of (cell's folder, labels of its arm).

    with_draws: repeated draws as well. more: of an audit, further files by their place in the
    folder; its arms are too many for their training curves to be kept.

    Labels are merged into the published result, so that a corrected label needs no new run. Returns
    how many cells have exactly the metrics published before, be it under another key, and how many
    have metrics. The caller holds a lock; ValueError where the disk is full or not writable, and
    then the folder is as it was.
    """
    fresh = folder.with_name(f".{folder.name}.new")
    old = folder.with_name(f".{folder.name}.old")
    try:
        _settle(folder, fresh, old)  # what a killed process left
        before = {place(r): _without_key(r.metrics or {}) for r in read(folder)}
        same = total = 0
        for cell, labels in cells:
            record = _publish_cell(fresh, cell, labels, more is None)
            if record.metrics is None:
                continue
            total += 1
            is_same = before.get(place(record)) == _without_key(record.metrics)
            same += is_same
            if with_draws:
                sources = [cell]
                if is_same:  # a run that repeats the numbers keeps the draws published with them
                    sources.append(_place(folder, record))
                _publish_draws(fresh, sources, record)
        for name, data in (more or {}).items():
            (fresh / name).parent.mkdir(parents=True, exist_ok=True)
            (fresh / name).write_bytes(data)
        if folder.exists():
            folder.rename(old)
        fresh.rename(folder)
    except OSError as e:
        raise ValueError(
            f"{e.filename or folder}: cannot be written ({e.strerror}): "
            "make room or make it writable, then rerun"
        ) from None
    finally:
        _settle(folder, fresh, old)
    return same, total


def _without_key(metrics: dict[str, Any]) -> dict[str, Any]:
    """Metrics to compare: other code may give the same numbers."""
    return metrics | {"key": None}


def _place(folder: Path, record: Record) -> Path:
    """Where a record lies among those of a table."""
    return folder / record.benchmark / record.arm / f"seed{record.seed}"


def _publish_draws(fresh: Path, sources: list[Path], record: Record) -> None:
    """Copy the repeated draws of a cell from the first folder that has some of its evaluation."""
    assert record.metrics is not None
    for source in sources:
        draws = source / "draws.json"
        if draws.is_file():
            key = read_json(draws)["evaluation"]["key"]
            if key == record.metrics["evaluation"]["key"]:
                shutil.copyfile(draws, _place(fresh, record) / "draws.json")
            return


def _publish_cell(fresh: Path, cell: Path, labels: dict[str, Any], with_curve: bool) -> Record:
    """Copy one cell's record into the folder of fresh records."""
    result = json.loads((cell / "result.json").read_text(encoding="utf-8")) | labels
    metrics = read_json(cell / "metrics.json") if result["status"] == "done" else None
    record = Record(result, metrics)
    target = _place(fresh, record)
    target.mkdir(parents=True)
    text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
    (target / "result.json").write_text(text, encoding="utf-8")
    if metrics is None:
        return record
    shutil.copyfile(cell / "metrics.json", target / "metrics.json")
    if with_curve:
        publish_curve(fresh, cell, result, record.arm)
    return record


def _settle(folder: Path, fresh: Path, old: Path) -> None:
    """Remove leftovers beside `folder`, and put the old records back where no new ones came."""
    if old.exists() and not folder.exists():
        old.rename(folder)
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)


def read(folder: Path) -> list[Record]:
    """The published records of a table in the order benchmark, arm, seed; none without a folder.

    ValueError names a file that is damaged.
    """
    out = []
    for path in sorted(folder.glob("*/*/seed*/result.json")):
        metrics = path.with_name("metrics.json")
        out.append(Record(read_json(path), read_json(metrics) if metrics.is_file() else None))
    return sorted(out, key=place)


def read_json(path: Path) -> dict[str, Any]:
    """A published JSON object; ValueError names a damaged file."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise ValueError(
            f"{path}: not valid JSON: take it from git again, "
            "or delete it and publish the table anew"
        ) from None
    return found
