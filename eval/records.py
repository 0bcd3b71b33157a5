"""Published records: the small JSON of every cell behind a table, in results/records/<table>/. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

# What determines a number of metrics.json, besides the samples: change one and every cell is evaluated again.
NUMERICAL = ("evaluate.py", "extractors.py", "fixed_rows.py", "metrics.py", "mixtures.py")


@lru_cache
def evaluation_key(extractor: str | None) -> str:
    """Hash of the evaluation's code and of the extractor's weights."""
    here = Path(__file__).parent
    files = [here / name for name in NUMERICAL]
    if extractor is not None:
        files.append(here / weights_name(extractor))
    return hashlib.sha256(b"".join(f.name.encode() + b"\0" + f.read_bytes() for f in files)).hexdigest()[:12]


def weights_name(extractor: str) -> str:
    """File of an extractor's weights beside the script that trained it: 'digits-gelu-64' -> 'digits_extractor...'."""
    return f"{extractor.split('-')[0]}_extractor.safetensors"


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


def publish(folder: Path, cells: list[Path]) -> tuple[int, int]:
    """Replace the records of a table by those in the cells' folders; returns (metrics as published before, metrics)."""
    before = {(r.result["benchmark"], r.arm, r.result["seed"]): r.metrics for r in read(folder)}
    fresh = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    same = total = 0
    for cell in cells:
        result = json.loads((cell / "result.json").read_text())
        arm = Record(result, None).arm
        target = fresh / result["benchmark"] / arm / f"seed{result['seed']}"
        target.mkdir(parents=True)
        shutil.copyfile(cell / "result.json", target / "result.json")
        if result["status"] == "done":
            shutil.copyfile(cell / "metrics.json", target / "metrics.json")
            total += 1
            same += before.get((result["benchmark"], arm, result["seed"])) == json.loads((cell / "metrics.json").read_text())
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)
    return same, total


def read(folder: Path) -> list[Record]:
    """The published records of a table in the order benchmark, arm, seed; none where there is no such folder."""
    out = []
    for path in sorted(folder.glob("*/*/seed*/result.json")):
        metrics = path.with_name("metrics.json")
        out.append(Record(json.loads(path.read_text()), json.loads(metrics.read_text()) if metrics.is_file() else None))
    return sorted(out, key=lambda r: (r.result["benchmark"], r.arm, r.result["seed"]))
