"""`distillbench rekey`: new keys for published records after a change of code that changed no
number, once drawn cells, trained again on the new code, have proved that.

The keys of the code before the change come from that code itself: a commit is laid out in a folder
of its own and asked, and where published numbers are of another processor it is run there too. A
record is left as it is where its key was stale even there, or where its settings are others now.
`results/records/rekeyed.json` lists what was done:

    [{"from": commit, "to": commit, "seed": of the draw, "cells": [label, ...], "records": count}]
"""

from __future__ import annotations

import io
import json
import os
import random
import subprocess
import sys
import tarfile
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distillbench import config
from distillbench.audits.experiments import MECHANISMS, Experiment
from distillbench.cells.cell import Cell
from distillbench.cells.disk import make_folder, write_json
from distillbench.cells.environment import ONE_THREAD
from distillbench.cells.progress import say
from distillbench.cells.provenance import git, hardware
from distillbench.config import root
from distillbench.errors import UserError
from distillbench.registry import folders

LOG = "results/records/rekeyed.json"
# Parts of a recipe that are hashes of code or of other recipes; the rest are settings and data.
CODE = ("ground", "method", "teacher", "start", "experiment")
# Asked of the earlier code, in its own folder: keys and recipes of cells and of experiments. The
# first imports are those of the layout before this module was written.
QUESTION = """
import json, sys
try:
    from distillbench.cells.cell import Cell
    from distillbench.audits.experiments import Experiment
    from distillbench.registry.folders import arm
    from eval.metrics.key import evaluation_key
except ImportError:
    from distillbench.cell import Cell
    from distillbench.audits import Experiment
    from distillbench.registry import arm
    from eval.records import evaluation_key
from distillbench import config
for line in sys.stdin:
    subject, name, seed = json.loads(line)
    try:
        evaluation = None
        if subject == "mechanisms":
            found = Experiment(name, (seed,))
            key = found.path(seed).stem.rpartition("-")[2]
        else:
            b = config.benchmark(subject)
            found = Cell(b, None if name == "teacher" else arm(name), seed)
            key = found.key
            evaluation = evaluation_key(b.extractor, b.cross_extractor)
        answer = {"key": key, "recipe": found.recipe, "evaluation": evaluation}
    except Exception as e:
        answer = {"key": None, "recipe": {}, "evaluation": None, "error": str(e)}
    print(json.dumps(answer), flush=True)
"""


@dataclass(frozen=True, order=True)
class Subject:
    """What a record is of: a benchmark's arm, or an experiment of `mechanisms`, and its seed."""

    benchmark: str
    arm: str
    seed: int

    def __str__(self) -> str:
        return f"{self.benchmark}/{self.arm} seed {self.seed}"

    @property
    def is_experiment(self) -> bool:
        """Whether it is of an experiment, whose name stands for the arm."""
        return self.benchmark == MECHANISMS

    def cell(self) -> Cell:
        """The cell as it is now; UserError where there is none."""
        arm = None if self.arm == "teacher" else folders.arm(self.arm)
        return Cell(config.benchmark(self.benchmark), arm, self.seed)

    def now(self) -> tuple[str, dict[str, Any]]:
        """Its key and recipe under the present code and settings; UserError where it is gone."""
        if self.is_experiment:
            found = Experiment(self.arm, (self.seed,))
            return found.path(self.seed).stem.rpartition("-")[2], found.recipe
        cell = self.cell()
        return cell.key, cell.recipe


@dataclass(frozen=True)
class Published:
    """A record in results/records; `result` of an experiment is the whole of it."""

    file: Path
    subject: Subject
    result: dict[str, Any]

    @property
    def hardware(self) -> str:
        """Where it was made."""
        return self.result["provenance"]["hardware"]

    def whole(self) -> dict[str, Any] | None:
        """Everything published of it: the record, and a cell's metrics under `metrics`."""
        return self.result if self.subject.is_experiment else with_metrics(self.file.parent)


@dataclass(frozen=True)
class Change:
    """A record's new key, and the hashes of its provenance."""

    record: Published
    key: str
    hashes: dict[str, str]


def published() -> Iterator[Published]:
    """Every published record of every table."""
    records = root() / "results/records"
    for file in sorted(records.glob("*/*/*/seed*/result.json")):
        result = json.loads(file.read_text())
        arm = file.parts[-3]
        yield Published(file, Subject(result["benchmark"], arm, result["seed"]), result)
    for file in sorted(records.glob(f"*/{MECHANISMS}/*/seed*.json")):
        result = json.loads(file.read_text())
        yield Published(file, Subject(MECHANISMS, result["experiment"], result["seed"]), result)


class EarlierCode:
    """The code of a commit, laid out in a folder of its own with what it has trained there."""

    def __init__(self, commit: str, folder: Path):
        self.commit = commit
        self.folder = folder
        self.environment = os.environ | {"PYTHONPATH": str(folder)}
        packed = subprocess.run(["git", "archive", commit], cwd=root(), capture_output=True)
        if packed.returncode:
            raise UserError(f"rekey {commit}: no such commit here: name one that git knows")
        make_folder(folder)
        with tarfile.open(fileobj=io.BytesIO(packed.stdout)) as tar:
            tar.extractall(folder, filter="data")

    def keys(self, subjects: list[Subject]) -> dict[Subject, dict[str, Any]]:
        """{"key", "recipe", "evaluation"} of every subject by its code; UserError where it cannot
        say."""
        questions = "".join(f"{json.dumps([p.benchmark, p.arm, p.seed])}\n" for p in subjects)
        done = subprocess.run(
            [sys.executable, "-c", QUESTION],
            cwd=self.folder,
            env=self.environment,
            input=questions,
            capture_output=True,
            text=True,
        )
        answers = [json.loads(line) for line in done.stdout.splitlines()]
        if len(answers) < len(subjects):
            why = done.stderr.strip()[-300:]
            raise UserError(f"rekey {self.commit}: its code does not say keys: {why}")
        return dict(zip(subjects, answers))

    def run(self, subject: Subject) -> None:
        """Train and evaluate a cell, or measure an experiment, by its code."""
        run_subject(subject, self.folder, self.environment)

    def result(self, subject: Subject) -> dict[str, Any] | None:
        """What `run` gave: the record with its metrics, or the experiment's; None of nothing."""
        runs = self.folder / "results/runs" / subject.benchmark / subject.arm
        if subject.is_experiment:
            return read_json(next(runs.glob(f"seed{subject.seed}-*.json"), None))
        cell = next(runs.glob(f"seed{subject.seed}-*"), None)
        return None if cell is None else with_metrics(cell)


def read_json(path: Path | None) -> dict[str, Any] | None:
    """A JSON object, None where there is no such file."""
    return json.loads(path.read_text()) if path is not None and path.is_file() else None


def with_metrics(folder: Path) -> dict[str, Any] | None:
    """The record in a folder with its metrics under `metrics`; None where there is none."""
    result = read_json(folder / "result.json")
    return None if result is None else result | {"metrics": read_json(folder / "metrics.json")}


def run_subject(subject: Subject, folder: Path, environment: dict[str, str]) -> None:
    """Train and evaluate a cell, or measure an experiment, in a checkout; what is there stays."""
    seeds = ["--seeds", str(subject.seed)]
    if subject.is_experiment:
        commands = [["measure", subject.arm]]
    else:
        commands = [[stage, subject.benchmark, subject.arm] for stage in ("train", "evaluate")]
    for words in commands:
        command = [sys.executable, "-m", "distillbench.cli", *words, *seeds]
        one_thread = environment | dict.fromkeys(ONE_THREAD, "1")
        subprocess.run(command, cwd=folder, env=one_thread, capture_output=True)


def settings(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe less its code."""
    return {key: value for key, value in recipe.items() if key not in CODE}


def changes(records: list[Published], earlier: EarlierCode) -> list[Change]:
    """The records whose code alone has changed since; says how many are left, and why."""
    before = earlier.keys(sorted({record.subject for record in records}))
    out: list[Change] = []
    left: dict[str, int] = defaultdict(int)
    for record in records:
        then = before[record.subject]
        try:
            key, recipe = record.subject.now()
        except UserError:
            left["not in this checkout"] += 1
            continue
        same = settings(then["recipe"]) == settings(recipe)
        metrics = read_json(record.file.with_name("metrics.json"))
        if record.subject.is_experiment:
            metrics = None
        if then["key"] != record.result["key"]:
            left[f"another key at {earlier.commit[:12]} already"] += 1
        elif not same:
            left["other settings now"] += 1
        elif metrics is not None and metrics["evaluation"]["key"] != then["evaluation"]:
            left["evaluated by other code"] += 1
        elif key != record.result["key"]:
            known = record.result["provenance"]["hashes"]
            out.append(Change(record, key, {name: recipe[name] for name in known}))
    for why, count in left.items():
        say(f"{count} records are left as they are: {why}")
    return out


def drawn(found: list[Change], count: int, seed: int) -> list[Subject]:
    """Cells to train again: one of every method on every family of benchmarks, and further ones
    up to `count`; of experiments one for every four cells.

    Where some of a group were published from this kind of processor, one of those is drawn: their
    bytes can be compared with the published ones.
    """
    here: dict[tuple[str, str], set[Subject]] = defaultdict(set)
    anywhere: dict[tuple[str, str], set[Subject]] = defaultdict(set)
    experiments: set[Subject] = set()
    for change in found:
        record = change.record
        if record.subject.is_experiment:
            experiments.add(record.subject)
        elif record.result["status"] == "done" and record.subject.arm != "teacher":
            family = config.benchmark(record.subject.benchmark).family
            group = (family, record.subject.arm.partition("@")[0])
            anywhere[group].add(record.subject)
            if record.hardware == hardware():
                here[group].add(record.subject)
    generator = random.Random(seed)
    chosen = [generator.choice(sorted(here[g] or anywhere[g])) for g in sorted(anywhere)]
    others = sorted(set().union(*anywhere.values()) - set(chosen))
    chosen += generator.sample(others, min(len(others), max(0, count - len(chosen))))
    measured = min(len(experiments), max(1, count // 4))
    return chosen + generator.sample(sorted(experiments), measured)


def result_now(subject: Subject) -> dict[str, Any] | None:
    """The record and metrics of a cell, or an experiment's result, under the present code."""
    if subject.is_experiment:
        return read_json(Experiment(subject.arm, (subject.seed,)).path(subject.seed))
    return with_metrics(subject.cell().folder)


def difference(old: dict[str, Any] | None, new: dict[str, Any] | None) -> str | None:
    """How the numbers of two records of one subject differ; None where they do not."""
    if old is None or new is None:
        return f"has no {'earlier' if old is None else 'new'} result"
    if old.get("values") != new.get("values"):
        return "has other values"
    if old.get("status") != new.get("status"):
        return f"ended as {new.get('status')}, not as {old.get('status')}"
    if price_of(old) != price_of(new):
        return "has another cost"
    if old.get("status") == "done" and (old["metrics"] is None or new["metrics"] is None):
        return "was not evaluated"
    same = without_keys(old.get("metrics")) == without_keys(new.get("metrics"))
    return None if same else "has other metrics"


def price_of(result: dict[str, Any]) -> dict[str, Any]:
    """What a record says of its cost that repeats: steps, FLOPs, rows, updates."""
    cost = dict(result.get("cost", {}))
    for name in ("seconds", "peak_memory_mb", "start"):
        cost.pop(name, None)  # of the machine
    return cost


def without_keys(metrics: dict[str, Any] | None) -> str:
    """The text of a metrics.json less the keys of its cell and of its evaluation."""
    if metrics is None:
        return ""
    evaluation = metrics["evaluation"] | {"key": None}
    return json.dumps(metrics | {"key": None, "evaluation": evaluation})


def rewrite(change: Change) -> None:
    """Write the new keys into a record, and into what lies beside it."""
    from eval.metrics.key import evaluation_key

    record = change.record
    result = json.loads(record.file.read_text())
    result["key"] = change.key
    result["provenance"]["hashes"] = change.hashes
    write_json(record.file, result)
    if record.subject.is_experiment:
        return
    b = config.benchmark(record.subject.benchmark)
    for name in ("metrics.json", "draws.json"):
        file = record.file.with_name(name)
        scores = read_json(file)
        if scores is not None and scores["key"] == record.result["key"]:
            scores["key"] = change.key
            scores["evaluation"]["key"] = evaluation_key(b.extractor, b.cross_extractor)
            write_json(file, scores)
    curve = (
        record.file.parents[3] / "curves" / record.subject.benchmark / f"{record.subject.arm}.json"
    )
    if curve.is_file():
        scalars = json.loads(curve.read_text())
        if scalars["seed"] == record.subject.seed:
            scalars["key"] = change.key
            curve.write_text(json.dumps(scalars, ensure_ascii=False) + "\n")


def rekey(base: str, count: int, seed: int) -> bool:
    """Prove on drawn cells that code has changed no number since `base`, then write new keys.

    Returns whether they were written: if one number differs, nothing is.
    """
    if git("status", "--porcelain", "--", ".", ":!results"):
        raise UserError("rekey: uncommitted changes: commit them, since the log names the commit")
    commit = git("rev-parse", "--verify", f"{base}^{{commit}}") or base
    # Kept between calls: interrupted, the same command continues with what has been trained.
    earlier = EarlierCode(commit, root() / "results/runs/rekey" / commit[:12])
    found = changes(list(published()), earlier)
    if not found:
        say("every record has its key")
        return True
    subjects = drawn(found, count, seed)
    if not subjects:
        raise UserError(
            "rekey: no finished student among the records: there is nothing to prove by"
        )
    say(f"{len(found)} records to re-key, after {len(subjects)} drawn ones, seed {seed}:")
    if not proved(found, subjects, earlier):
        say("nothing is re-keyed: find out why, or train these tables again")
        return False
    for change in found:
        rewrite(change)
    log = root() / LOG
    line = {
        "from": commit,
        "to": git("rev-parse", "HEAD"),
        "seed": seed,
        "cells": [str(subject) for subject in subjects],
        "records": len(found),
    }
    write_json(log, [*(json.loads(log.read_text()) if log.is_file() else []), line])
    say(f"all equal: {len(found)} records re-keyed; render tables and pages anew")
    return True


def proved(found: list[Change], subjects: list[Subject], earlier: EarlierCode) -> bool:
    """Whether subjects run again give the published numbers, teachers and starts included.

    Bytes repeat on one kind of processor. Where a record is of another one, the earlier code runs
    here too and its numbers stand for the published ones.
    """
    records: dict[Subject, Published] = {}
    for change in found:
        known = records.get(change.record.subject)
        if known is None or known.hardware != hardware():
            records[change.record.subject] = change.record
    wanted = []
    for subject in subjects:
        if not subject.is_experiment:
            needed = [
                Subject(subject.benchmark, c.arm_name, subject.seed) for c in subject.cell().needed
            ]
            wanted += [one for one in needed if one in records]
        wanted.append(subject)
    wanted = list(dict.fromkeys(wanted))
    elsewhere = [one for one in wanted if records[one].hardware != hardware()]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        # Needed cells come before the drawn ones; two that need the same wait for its lock.
        now = [pool.submit(run_subject, one, root(), dict(os.environ)) for one in wanted]
        then = [pool.submit(earlier.run, one) for one in elsewhere]
        for one, done in zip([*wanted, *elsewhere], [*now, *then]):
            done.result()
            say(f"  {one}{' by the earlier code' if done in then else ''}")
    good = True
    for one in wanted:
        old = earlier.result(one) if one in elsewhere else records[one].whole()
        why = difference(old, result_now(one))
        if why is not None:
            say(f"  {one} {why}")
            good = False
    return good
