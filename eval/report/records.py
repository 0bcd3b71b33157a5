"""Published records: the small JSON of every cell behind a table, in results/records/<table>/, with the training curve of an arm's
lowest seed (`eval/curves.py`). Imports no torch."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.report.curves import publish_curve


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
        return self.result["method"] + (
            f"@{self.result['variant']}" if self.result["variant"] else ""
        )


def publish(
    folder: Path,
    cells: list[tuple[Path, dict[str, Any]]],
    with_draws: bool,
    more: dict[str, bytes] | None = None,
) -> tuple[int, int]:
    """Replace the records of a table by those of (cell's folder, labels of its arm); `with_draws`: repeated draws as well.

    more: of an audit, further files by their place in the folder; its arms are too many for their training curves to be kept.

    Labels are merged into the published result, so that a corrected label needs no new run. Returns how many cells have
    exactly the metrics published before, be it under another key, and how many have metrics. The caller holds a lock; ValueError
    where the disk is full or not writable, and then the folder is as it was.
    """
    fresh, old = (folder.with_name(f".{folder.name}.{what}") for what in ("new", "old"))
    try:
        _settle(folder, fresh, old)  # what a killed process left
        without_key = {"key": None}  # other code may give the same numbers
        before = {
            (r.result["benchmark"], r.arm, r.result["seed"]): (r.metrics or {}) | without_key
            for r in read(folder)
        }
        same = total = 0
        for cell, labels in cells:
            result = json.loads((cell / "result.json").read_text()) | labels
            arm = Record(result, None).arm
            target = fresh / result["benchmark"] / arm / f"seed{result['seed']}"
            target.mkdir(parents=True)
            (target / "result.json").write_text(
                json.dumps(result, indent=1, ensure_ascii=False) + "\n"
            )
            if result["status"] == "done":
                metrics = read_json(cell / "metrics.json")
                is_same = (
                    before.get((result["benchmark"], arm, result["seed"])) == metrics | without_key
                )
                draws = cell / "draws.json"
                if is_same and not draws.is_file():  # a run that repeats the numbers keeps these
                    draws = folder / target.relative_to(fresh) / "draws.json"
                shutil.copyfile(cell / "metrics.json", target / "metrics.json")
                if more is None:
                    publish_curve(fresh, cell, result, arm)
                if (
                    with_draws
                    and draws.is_file()
                    and read_json(draws)["evaluation"]["key"] == metrics["evaluation"]["key"]
                ):  # else of an older evaluation
                    shutil.copyfile(draws, target / "draws.json")
                total += 1
                same += is_same
        for name, data in (more or {}).items():
            (fresh / name).parent.mkdir(parents=True, exist_ok=True)
            (fresh / name).write_bytes(data)
        if folder.exists():
            folder.rename(old)
        fresh.rename(folder)
    except OSError as e:
        raise ValueError(
            f"{e.filename or folder}: cannot be written ({e.strerror}): make room or make it writable, then rerun"
        ) from None
    finally:
        _settle(folder, fresh, old)
    return same, total


def _settle(folder: Path, fresh: Path, old: Path) -> None:
    """No leftovers beside `folder`, and the old records back where the new ones did not come."""
    if old.exists() and not folder.exists():
        old.rename(folder)
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)


def read(folder: Path) -> list[Record]:
    """The published records of a table in the order benchmark, arm, seed; none where there is no such folder.

    ValueError names a file that is damaged."""
    out = []
    for path in sorted(folder.glob("*/*/seed*/result.json")):
        metrics = path.with_name("metrics.json")
        out.append(Record(read_json(path), read_json(metrics) if metrics.is_file() else None))
    return sorted(out, key=lambda r: (r.result["benchmark"], r.arm, r.result["seed"]))


def read_json(path: Path) -> dict[str, Any]:
    """A published JSON object; ValueError names a damaged file."""
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except ValueError:
        raise ValueError(
            f"{path}: not valid JSON: take it from git again, or delete it and publish the table anew"
        ) from None
    return found
