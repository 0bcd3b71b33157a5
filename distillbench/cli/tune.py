"""`distillbench tune`: the search a method declares, on data and a seed that no table reports, by another extractor than the one
that ranks.

`tuning.json` in a method's folder, one for each method, renewed after every trial:

    {"format": 1, "benchmark": name, "seeds": [...], "extractor": name, "objective": "fid at nfe 1",
     "space": {"student.lr": [...], ...}, "winner": {changed settings}, "cost": {"flops": of all trials, "seconds": ...},
     "earlier": [trials of other settings or code, kept],
     "trials": [{"changes": to config.yaml at the time {...}, "settings": of every key of the space {...}, "status": "done",
                 "key": of the cells [...], "updates": of the student, "fid": mean over seeds, "fid_teacher", "recall",
                 "coverage", "memorisation", "flops": of all seeds, "seconds", "commit", "dirty"}]}
"""

from __future__ import annotations

import itertools
import json
import random
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

from distillbench import config
from distillbench.cells.cell import Cell
from distillbench.cells.disk import write_json
from distillbench.cells.work import train_cells
from distillbench.errors import UserError, nearest
from distillbench.registry import folders
from distillbench.registry.folders import Arm, MethodFolder

BENCHMARK = "digits-tuning"
TRIALS = 12
SHOWN = ("fid", "fid_teacher", "recall", "coverage", "memorisation")
out = Console(highlight=False)


def trials(folder: MethodFolder) -> list[dict[str, Any]]:
    """The changes of every trial, flat; the first changes nothing. UserError where a key names no setting."""
    path, space = folder.path / "config.yaml", folder.file.search
    if not space:
        raise UserError(
            f"{path}: key 'search' is missing: list the values to try, e.g. search: {{student.lr: [5.0e-4, 1.0e-3]}}"
        )
    settings = flat(Arm(folder, None).settings(config.benchmark(BENCHMARK)))
    for key, values in space.items():
        if key not in settings:
            raise UserError(
                f"{path}: key 'search.{key}' is no setting of config, {nearest(key, settings)}"
            )
        if not values:
            raise UserError(f"{path}: key 'search.{key}' is empty: list the values to try")
    combinations = [dict(zip(space, values)) for values in itertools.product(*space.values())]
    others = [c for c in combinations if any(settings[k] != v for k, v in c.items())]
    if len(others) > TRIALS - 1:
        others = random.Random(folder.name).sample(others, TRIALS - 1)
    return [{}, *({k: v for k, v in c.items() if settings[k] != v} for c in others)]


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"student": {"lr": 1}} -> {"student.lr": 1}."""
    out: dict[str, Any] = {}
    for key, value in settings.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out


def nested(changes: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `flat`."""
    out: dict[str, Any] = {}
    for key, value in changes.items():
        *path, last = key.split(".")
        inner = out
        for part in path:
            inner = inner.setdefault(part, {})
        inner[last] = value
    return out


def cells(folder: MethodFolder, changes: dict[str, Any]) -> list[Cell]:
    b, arm = config.benchmark(BENCHMARK), Arm(folder, None, nested(changes))
    return [Cell(b, arm, seed) for seed in b.seeds]


def values(folder: MethodFolder, changes: dict[str, Any]) -> dict[str, Any]:
    """Of every key of the space."""
    settings = flat(Arm(folder, None).settings(config.benchmark(BENCHMARK))) | changes
    return {key: settings[key] for key in folder.file.search}


def run(folder: MethodFolder) -> None:
    """Train and score every trial, writing tuning.json after each."""
    from distillbench.cli.evaluate import check_extractors, evaluate_cells

    b = config.benchmark(BENCHMARK)
    check_extractors([b])
    planned, done, nfe, path = (
        trials(folder),
        list[dict[str, Any]](),
        None,
        folder.path / "tuning.json",
    )
    cls = folders.load(folder)
    for changes in planned:  # a value that does not fit is found before anything is trained
        folders.configuration(Arm(folder, None, nested(changes)), b, cls)
    before = json.loads(path.read_text()) if path.is_file() else {}
    before = [*before.get("earlier", []), *before.get("trials", [])]
    for number, changes in enumerate(planned, 1):
        out.print(
            f"{folder.name}: trial {number} of {len(planned)}: {words(changes)}", soft_wrap=True
        )
        own = cells(folder, changes)
        train_cells(own)
        evaluate_cells(own, None)
        done.append(trial(own, changes) | {"settings": values(folder, changes)})
        nfe = next(
            (r["headline_nfe"] for r in map(Cell.result, own) if r and r["headline_nfe"]), nfe
        )
        finished = [t for t in done if t["status"] == "done"]
        write_json(
            path,
            {
                "format": 1,
                "benchmark": b.name,
                "seeds": b.seeds,
                "extractor": b.extractor,
                "objective": f"fid at nfe {nfe}",
                "space": folder.file.search,
                "winner": min(finished, key=lambda t: t["fid"])["changes"] if finished else None,
                "cost": {k: round(sum(t[k] for t in done), 1) for k in ("flops", "seconds")},
                "trials": done,
                "earlier": [
                    t
                    for t in before
                    if t["key"] not in [[c.key for c in cells(folder, p)] for p in planned]
                ],
            },
        )
    show(folder)


def trial(own: list[Cell], changes: dict[str, Any]) -> dict[str, Any]:
    """What tuning.json says of a trial: its cells as they ended, scores as means over the seeds."""
    records = [r for r in map(Cell.result, own) if r is not None]
    failed = next((r for r in records if r["status"] != "done"), None)
    line: dict[str, Any] = {
        "changes": changes,
        "status": failed["status"] if failed else "done",
        "key": [c.key for c in own],
    }
    if failed:
        line["reason"] = failed["reason"]
    else:
        found = [
            row
            for c, r in zip(own, records)
            for row in json.loads(c.metrics.read_text())["rows"]
            if row["nfe"] == r["headline_nfe"]
        ]
        line["updates"] = records[0]["cost"]["updates"]["student"]
        line |= {
            name: float(f"{sum(row[name] for row in found) / len(found):.5g}") for name in SHOWN
        }
    return line | {
        "flops": sum(
            r["cost"].get("flops", 0) for r in records
        ),  # none where it ended before its plan
        "seconds": round(sum(r["cost"]["seconds"] for r in records), 1),
        "commit": records[0]["provenance"]["commit"],
        "dirty": any(r["provenance"]["dirty"] for r in records),
    }


def words(changes: dict[str, Any]) -> str:
    return ", ".join(f"{k}: {v}" for k, v in changes.items()) or "as in config.yaml"


def show(folder: MethodFolder) -> None:
    """Print the trials with what is known of them, the best first."""
    path, planned = folder.path / "tuning.json", trials(folder)
    known = json.loads(path.read_text())["trials"] if path.is_file() else []
    table = RichTable(box=None, pad_edge=False)
    for name in ("FID", "to teacher", "recall", "coverage", "memor.", "updates", "s"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("settings", overflow="fold")
    for t in sorted(known, key=lambda t: t.get("fid", float("inf"))):
        scores = [f"{t[name]:.3f}" if name in t else "–" for name in SHOWN]
        what = words(t["settings"]) + (
            "" if t["status"] == "done" else f" ({t['status']}: {t['reason']})"
        )
        table.add_row(*scores, str(t.get("updates", "–")), f"{t['seconds']:.0f}", what)
    for changes in planned:
        if values(folder, changes) not in [t["settings"] for t in known]:
            table.add_row(*["–"] * 7, f"{words(values(folder, changes))} (to do)")
    out.print(table)
