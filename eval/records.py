"""Published records: the small JSON of every cell behind a table, in results/records/<table>/. Imports no torch."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

# What determines a number of metrics.json, besides the samples: change one and every cell is evaluated again.
NUMERICAL = ("evaluate.py", "extractors.py", "fixed_rows.py", "metrics.py", "mixtures.py")


# Extractors by name, and the file of their weights beside the script that trained them.
EXTRACTORS = {"digits-gelu-64": "digits_extractor.safetensors"}


def known_extractor(name: str) -> None:
    """ValueError with the nearest name where there is no such extractor."""
    if name not in EXTRACTORS:
        near = difflib.get_close_matches(name, EXTRACTORS, n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown extractor {name!r}; did you mean {near!r}?")


@lru_cache
def evaluation_key(extractor: str | None) -> str:
    """Hash of the evaluation's code and of the extractor's weights."""
    here = Path(__file__).parent
    files = [here / name for name in NUMERICAL]
    if extractor is not None:
        known_extractor(extractor)
        files.append(here / EXTRACTORS[extractor])
    return hashlib.sha256(b"".join(f.name.encode() + b"\0" + f.read_bytes() for f in files)).hexdigest()[:12]


def is_evaluated(metrics: Path, extractor: str | None) -> bool:
    """Whether a metrics.json stands and was made by this evaluation."""
    return metrics.is_file() and json.loads(metrics.read_text())["evaluation"]["key"] == evaluation_key(extractor)


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
        return self.result["method"] + (f"@{self.result['variant']}" if self.result["variant"] else "")


def publish(folder: Path, cells: list[tuple[Path, dict[str, Any]]]) -> tuple[int, int]:
    """Replace the records of a table by those of (cell's folder, labels of its arm).

    Labels are merged into the published result, so that a corrected label needs no new run. Returns how many cells have
    exactly the metrics published before, and how many have metrics.
    """
    before = {(r.result["benchmark"], r.arm, r.result["seed"]): r.metrics for r in read(folder)}
    fresh, old = (folder.with_name(f".{folder.name}.{what}.{os.getpid()}") for what in ("new", "old"))
    same = total = 0
    for cell, labels in cells:
        result = json.loads((cell / "result.json").read_text()) | labels
        arm = Record(result, None).arm
        target = fresh / result["benchmark"] / arm / f"seed{result['seed']}"
        target.mkdir(parents=True)
        (target / "result.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
        if result["status"] == "done":
            shutil.copyfile(cell / "metrics.json", target / "metrics.json")
            total += 1
            same += before.get((result["benchmark"], arm, result["seed"])) == json.loads((cell / "metrics.json").read_text())
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    return same, total


def read(folder: Path) -> list[Record]:
    """The published records of a table in the order benchmark, arm, seed; none where there is no such folder."""
    out = []
    for path in sorted(folder.glob("*/*/seed*/result.json")):
        metrics = path.with_name("metrics.json")
        out.append(Record(json.loads(path.read_text()), json.loads(metrics.read_text()) if metrics.is_file() else None))
    return sorted(out, key=lambda r: (r.result["benchmark"], r.arm, r.result["seed"]))
