"""`distillbench tune`: the search a method declares, on data and a seed that no table reports, by
another extractor than the one that ranks.

`tuning.json` in a method's folder, renewed after every trial:

    format, benchmark, seeds, extractor
    objective   "fid at nfe 1"
    space       key of config -> the values to try
    winner      the changes of the best trial by `fid`, or null
    cost        {"flops", "seconds"} of all trials
    trials      one object each, see below
    earlier     trials of other settings or code, kept

    changes     to config.yaml at the time, by key
    status      done, or that of the first seed that failed; then also `reason`
    key         keys of the cells, one for each seed
    updates     of the student
    fid, fid_teacher, recall, coverage, memorisation     means over the seeds, at the headline NFE
    flops, seconds                                       sums over the seeds
    commit, dirty
    settings    the value of every key of the space
"""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import typer
from rich.table import Table as RichTable

from distillbench import config
from distillbench.cells.cell import Cell
from distillbench.cells.disk import write_json
from distillbench.cells.work import train_cells
from distillbench.cli.evaluate import evaluate_cells
from distillbench.cli.extractors import check_extractors
from distillbench.cli.options import out
from distillbench.config import Benchmark
from distillbench.errors import UserError, nearest
from distillbench.registry import folders
from distillbench.registry.folders import Arm, MethodFolder

BENCHMARK = "digits-tuning"
TRIALS = 12
SCORES = ("fid", "fid_teacher", "recall", "coverage", "memorisation")


def tune(
    method: Annotated[str, typer.Argument(help="a method whose config.yaml has a `search`")],
    show: Annotated[bool, typer.Option("--show", help="list the trials; run nothing")] = False,
) -> None:
    """Try the settings that a method's `search` declares, where no table looks; every trial stays
    in its tuning.json.

    At most 12 trials: all combinations, or the settings as they are and 11 combinations drawn by
    the method's name. They run on digits-tuning: one half of the training half teaches, the other
    is compared with, under the extractor of the cross-check column and on a seed of their own. The
    best by FID at the headline NFE is named; writing it into config.yaml is up to you. Interrupted,
    the same command continues.
    """
    if "@" in method:
        variant = method.partition("@")[2]
        raise UserError(f"tune {method}: settings are those of a method: leave @{variant} out")
    folder = folders.arm(method).folder
    if not show:
        run_trials(folder)
    show_trials(folder)


def settings_by_key(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings flat, by keys such as student.lr."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            found |= settings_by_key(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def nested(changes: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `settings_by_key`."""
    found: dict[str, Any] = {}
    for key, value in changes.items():
        *path, last = key.split(".")
        inner = found
        for part in path:
            inner = inner.setdefault(part, {})
        inner[last] = value
    return found


@dataclass(frozen=True)
class Trial:
    """Changes to a method's settings, by key, and the cells that try them."""

    folder: MethodFolder
    changes: dict[str, Any]

    @property
    def arm(self) -> Arm:
        """The method in its default variant, with these changes."""
        return Arm(self.folder, None, nested(self.changes))

    @cached_property
    def cells(self) -> list[Cell]:
        """One cell for each seed of the benchmark."""
        b = config.benchmark(BENCHMARK)
        return [Cell(b, self.arm, seed) for seed in b.seeds]

    @property
    def settings(self) -> dict[str, Any]:
        """The value of every key of the space."""
        found = current_settings(self.folder) | self.changes
        return {key: found[key] for key in self.folder.file.search}

    def result(self) -> dict[str, Any]:
        """What tuning.json says of it, once its cells have ended and are evaluated."""
        records = [result for cell in self.cells if (result := cell.result()) is not None]
        failed = [record for record in records if record["status"] != "done"]
        found: dict[str, Any] = {
            "changes": self.changes,
            "status": failed[0]["status"] if failed else "done",
            "key": [cell.key for cell in self.cells],
        }
        if failed:
            found["reason"] = failed[0]["reason"]
        else:
            found["updates"] = records[0]["cost"]["updates"]["student"]
            found |= self._mean_scores(records)
        # A cell that ended before its plan was made has no FLOPs.
        found["flops"] = sum(record["cost"].get("flops", 0) for record in records)
        found["seconds"] = round(sum(record["cost"]["seconds"] for record in records), 1)
        found["commit"] = records[0]["provenance"]["commit"]
        found["dirty"] = any(record["provenance"]["dirty"] for record in records)
        found["settings"] = self.settings
        return found

    def _mean_scores(self, records: list[dict[str, Any]]) -> dict[str, float]:
        """SCORES at the headline NFE with 5 digits, means over the seeds."""
        rows = []
        for cell, record in zip(self.cells, records):
            metrics = json.loads(cell.metrics.read_text(encoding="utf-8"))
            rows += [row for row in metrics["rows"] if row["nfe"] == record["headline_nfe"]]
        return {name: float(f"{fmean(row[name] for row in rows):.5g}") for name in SCORES}


def current_settings(folder: MethodFolder) -> dict[str, Any]:
    """The settings of a method on the tuning benchmark as they are, by key."""
    return settings_by_key(Arm(folder, None).settings(config.benchmark(BENCHMARK)))


def trials(folder: MethodFolder) -> list[Trial]:
    """The trials of a method, of which the first changes nothing.

    Raises UserError where there is no space to search, or where a key of it is no setting.
    """
    path = folder.path / "config.yaml"
    space = folder.file.search
    if not space:
        raise UserError(
            f"{path}: key 'search' is missing: list the values to try, "
            "e.g. search: {student.lr: [5.0e-4, 1.0e-3]}"
        )
    current = current_settings(folder)
    for key, values in space.items():
        if key not in current:
            raise UserError(
                f"{path}: key 'search.{key}' is no setting of config, {nearest(key, current)}"
            )
        if not values:
            raise UserError(f"{path}: key 'search.{key}' is empty: list the values to try")
    changes = []
    for chosen in itertools.product(*space.values()):
        combination = dict(zip(space, chosen))
        changed = {key: value for key, value in combination.items() if current[key] != value}
        if changed:
            changes.append(changed)
    if len(changes) > TRIALS - 1:
        changes = random.Random(folder.name).sample(changes, TRIALS - 1)
    return [Trial(folder, changed) for changed in ({}, *changes)]


def run_trials(folder: MethodFolder) -> None:
    """Train and score every trial, writing tuning.json after each."""
    b = config.benchmark(BENCHMARK)
    check_extractors([b])
    planned = trials(folder)
    method = folders.load(folder)
    for trial in planned:  # a value that does not fit is found before anything is trained
        folders.configuration(trial.arm, b, method)
    path = folder.path / "tuning.json"
    earlier = earlier_results(path, planned)
    results = []
    nfe = None
    for number, trial in enumerate(planned, 1):
        what = words(trial.changes)
        out.print(f"{folder.name}: trial {number} of {len(planned)}: {what}", soft_wrap=True)
        train_cells(trial.cells)
        evaluate_cells(trial.cells, None)
        results.append(trial.result())
        nfe = headline_nfe(trial.cells) or nfe
        write_json(path, tuning(folder, b, nfe, results, earlier))


def earlier_results(path: Path, planned: list[Trial]) -> list[dict[str, Any]]:
    """Results in a tuning.json that are of none of the planned trials."""
    if not path.is_file():
        return []
    before = json.loads(path.read_text(encoding="utf-8"))
    keys = [[cell.key for cell in trial.cells] for trial in planned]
    results = [*before.get("earlier", []), *before.get("trials", [])]
    return [result for result in results if result["key"] not in keys]


def headline_nfe(cells: list[Cell]) -> int | None:
    """The headline NFE that the first of the cells with a record of it has."""
    for cell in cells:
        result = cell.result()
        if result is not None and result["headline_nfe"]:
            return result["headline_nfe"]
    return None


def tuning(
    folder: MethodFolder,
    b: Benchmark,
    nfe: int | None,
    results: list[dict[str, Any]],
    earlier: list[dict[str, Any]],
) -> dict[str, Any]:
    """The content of tuning.json."""
    winner = None
    for result in results:
        if result["status"] == "done" and (winner is None or result["fid"] < winner["fid"]):
            winner = result
    return {
        "format": 1,
        "benchmark": b.name,
        "seeds": b.seeds,
        "extractor": b.extractor,
        "objective": f"fid at nfe {nfe}",
        "space": folder.file.search,
        "winner": winner["changes"] if winner is not None else None,
        "cost": {
            "flops": round(sum(result["flops"] for result in results), 1),
            "seconds": round(sum(result["seconds"] for result in results), 1),
        },
        "trials": results,
        "earlier": earlier,
    }


def words(settings: dict[str, Any]) -> str:
    """Settings by key, in one line."""
    return ", ".join(f"{key}: {value}" for key, value in settings.items()) or "as in config.yaml"


def show_trials(folder: MethodFolder) -> None:
    """Print the trials with what is known of them, the best first."""
    path = folder.path / "tuning.json"
    planned = trials(folder)
    known = json.loads(path.read_text(encoding="utf-8"))["trials"] if path.is_file() else []
    table = RichTable(box=None, pad_edge=False)
    for name in ("FID", "to teacher", "recall", "coverage", "memor.", "updates", "s"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("settings", overflow="fold")

    def fid(result: dict[str, Any]) -> float:
        return result.get("fid", float("inf"))

    for result in sorted(known, key=fid):
        table.add_row(*row_of(result))
    done = [result["settings"] for result in known]
    for trial in planned:
        if trial.settings not in done:
            table.add_row(*["–"] * 7, f"{words(trial.settings)} (to do)")
    out.print(table)


def row_of(result: dict[str, Any]) -> list[str]:
    """A trial's line of the table."""
    scores = [f"{result[name]:.3f}" if name in result else "–" for name in SCORES]
    updates = str(result.get("updates", "–"))
    settings = words(result["settings"])
    if result["status"] != "done":
        settings += f" ({result['status']}: {result['reason']})"
    return [*scores, updates, f"{result['seconds']:.0f}", settings]
