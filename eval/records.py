"""Published records: the small JSON of every cell behind a table, in results/records/<table>/, with the training curve of an arm's
lowest seed (`eval/curves.py`). Imports no torch."""

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

from eval.curves import publish_curve

# What determines a number of metrics.json, besides the samples: change one and every cell is evaluated again.
NUMERICAL = ("conditional.py", "evaluate.py", "extractors.py", "fixed_rows.py", "metrics.py", "mixtures.py", "pairwise.py")


# Extractors by name, and the file of their weights beside the script that trained them.
EXTRACTORS = {"digits-gelu-64": "digits_extractor.safetensors", "digits-simclr-64": "digits_simclr.safetensors"}
# Extractors whose weights are the user's, by name, and the published file, which both packages can read.
INCEPTION = "weights-inception-2015-12-05-6726825d.pth"
IMAGE_SCALE = {"inception-torch-fidelity": INCEPTION, "inception-clean-fid": INCEPTION}


def known_extractor(name: str) -> None:
    """ValueError with the nearest name where there is no such extractor."""
    names = [*EXTRACTORS, *IMAGE_SCALE]
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown extractor {name!r}; did you mean {near!r}?")


def weight_file(name: str) -> Path:
    """The file of an extractor's weights: beside this module, or, at image scale, where the user keeps it.

    That is the folder named by DISTILLBENCH_WEIGHTS and no other if it is set, else `weights/` in the working folder, else
    torch.hub's cache of checkpoints. Nothing is fetched: ValueError says which file to put where.
    """
    known_extractor(name)
    if name in EXTRACTORS:
        return Path(__file__).with_name(EXTRACTORS[name])
    file, chosen = IMAGE_SCALE[name], os.environ.get("DISTILLBENCH_WEIGHTS")
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"))  # torch.hub.get_dir(), without importing torch
    hub = Path(os.environ.get("TORCH_HOME", cache / "torch"), "hub", "checkpoints")
    folders = [Path(chosen)] if chosen else [Path("weights"), hub]
    for folder in folders:
        if (path := folder.expanduser() / file).is_file():
            return path
    raise ValueError(
        f"extractor {name!r} needs the file {file}, attached to the releases of torch-fidelity on GitHub (its SHA-256 begins "
        f"with {Path(file).stem.rpartition('-')[2]}); put it into {folders[0].absolute()} (looked in "
        f"{', '.join(map(str, folders))}; the variable DISTILLBENCH_WEIGHTS names another folder)"
    )


@lru_cache
def evaluation_key(*extractors: str | None) -> str:
    """Hash of the evaluation's code, and of name and weights of these extractors (the main one, the second one)."""
    here = Path(__file__).parent
    files = [(name, here / name) for name in NUMERICAL]
    for extractor in extractors:
        if extractor is not None:
            files.append((extractor, weight_file(extractor)))  # by name: one file serves two preprocessings
            if extractor in IMAGE_SCALE:
                files.append(("inception.py", here / "inception.py"))
    return hashlib.sha256(b"".join(name.encode() + b"\0" + f.read_bytes() for name, f in files)).hexdigest()[:12]


def is_evaluated(metrics: Path, *extractors: str | None) -> bool:
    """Whether a metrics.json stands, whole, and was made by this evaluation, under these extractors."""
    try:
        key = json.loads(metrics.read_text())["evaluation"]["key"]
    except (OSError, ValueError, TypeError, KeyError):
        return False
    return key == evaluation_key(*extractors)


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


def publish(
    folder: Path, cells: list[tuple[Path, dict[str, Any]]], with_draws: bool, more: dict[str, bytes] | None = None
) -> tuple[int, int]:  # fmt: skip
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
        before = {(r.result["benchmark"], r.arm, r.result["seed"]): (r.metrics or {}) | without_key for r in read(folder)}
        same = total = 0
        for cell, labels in cells:
            result = json.loads((cell / "result.json").read_text()) | labels
            arm = Record(result, None).arm
            target = fresh / result["benchmark"] / arm / f"seed{result['seed']}"
            target.mkdir(parents=True)
            (target / "result.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
            if result["status"] == "done":
                metrics, draws = read_json(cell / "metrics.json"), cell / "draws.json"
                shutil.copyfile(cell / "metrics.json", target / "metrics.json")
                if more is None:
                    publish_curve(fresh, cell, result, arm)
                if (
                    with_draws and draws.is_file() and read_json(draws)["evaluation"]["key"] == metrics["evaluation"]["key"]
                ):  # else of an older evaluation
                    shutil.copyfile(draws, target / "draws.json")
                total += 1
                same += before.get((result["benchmark"], arm, result["seed"])) == metrics | without_key
        for name, data in (more or {}).items():
            (fresh / name).parent.mkdir(parents=True, exist_ok=True)
            (fresh / name).write_bytes(data)
        if folder.exists():
            folder.rename(old)
        fresh.rename(folder)
    except OSError as e:
        raise ValueError(f"{e.filename or folder}: cannot be written ({e.strerror}): make room or make it writable, then rerun") from None
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
        raise ValueError(f"{path}: not valid JSON: take it from git again, or delete it and publish the table anew") from None
    return found
