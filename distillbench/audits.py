"""What an audit needs: its questions, the cells and experiments that answer them, and the proof that claims were frozen first.

A question is a claim on one benchmark. Whatever is wrong with a claim is said before anything runs. Imports no torch.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from distillbench import config, registry, resources
from distillbench.cell import Cell, circumstances, git, ground_hash, lock, make_folder, write_json, writing
from distillbench.claims import Claim, Trial
from distillbench.config import Table, canonical, digest, root
from distillbench.errors import Diverged, OverBudget, Refused, UserError, nearest
from distillbench.plan import Job, start_arms
from distillbench.scoring import known_metrics

FROZEN = "frozen.json"  # in the published records: commit -> what stood there
ROOM = "mechanisms"  # the folder of experiments, and of their results under results/runs
Metrics = Callable[[str], tuple[str, ...]]  # of a benchmark's name


@dataclass(frozen=True)
class Question:
    """A claim of a method on one benchmark; `trial` is None where it is not tried, and `why_not` says why."""

    method: registry.MethodFolder
    claim: Claim
    benchmark: str | None = None
    trial: Trial | None = None
    why_not: str | None = None

    @property
    def arms(self) -> tuple[str, ...]:
        """The claim's arms with the share of the budget that they get; of a mechanism its quantities."""
        if self.trial is None or self.claim.experiment:
            return tuple(self.claim.arms)
        return tuple(registry.arm(name).at(self.trial.share).name for name in self.claim.arms)

    def asked(self, seeds: list[int]) -> dict[str, Any]:
        """What eval/audit.py is told of it: the claim as it stands, its hash, and how it is tried here."""
        claim, trial = self.claim, self.trial
        tried: dict[str, Any] = {} if trial is None else trial.model_dump(include={"metric", "share", "nfe", "threshold"})
        return claim.model_dump(exclude={"trials", "untestable"}) | {
            "method": self.method.name, "title": self.method.file.title, "claim_hash": claim.hash(), "benchmark": self.benchmark,
            "arms": list(self.arms), "why_not": self.why_not, "seeds": seeds[: trial.seeds] if trial else [],
            "margin": claim.margin(self.benchmark) if self.benchmark else None, **tried,
        }  # fmt: skip


def place(method: registry.MethodFolder, index: int) -> str:
    """File and line of a method's claim."""
    path = method.path / "claims.yaml"
    return f"{path}:{config.line_of(path.read_text(), ['claims', index])}"


def misfits(claim: Claim, metrics: Metrics, exists: Callable[[str], object]) -> Iterator[tuple[str, str]]:
    """(what was expected, what was seen) where a claim names something that is not there; `exists` raises UserError on an arm."""
    for benchmark, trial in claim.trials.items():
        try:
            known = metrics(benchmark)
            if not claim.experiment and trial.metric not in known:
                yield f"claim {claim.id} to name a metric of {benchmark}, {nearest(str(trial.metric), known)}", str(trial.metric)
            for name in () if claim.experiment else claim.arms:
                exists(name)
            if claim.experiment and not experiment_file(claim.experiment).is_file():
                there = (p.stem for p in (root() / ROOM).glob("*.py"))
                yield f"claim {claim.id} to name an experiment, {nearest(claim.experiment, there)}", claim.experiment
        except UserError as e:
            yield f"claim {claim.id} to name a benchmark and arms that exist", str(e)


def questions(table: Table) -> list[Question]:
    """Every claim of a table's methods on its benchmarks, in the order of files; UserError with file, line and remedy on a mistake."""
    found: list[Question] = []
    seen: dict[str, str] = {}
    names = sorted(registry.discover()) if table.methods == "all" else table.methods
    for method in (registry.arm(name).folder for name in names):
        for index, claim in enumerate(method.claims.claims):
            here = place(method, index)
            if claim.id in seen:
                raise UserError(f"{here}: claim id '{claim.id}' is also at {seen[claim.id]}: ids are unique over all methods; rename one")
            seen[claim.id] = here
            for expected, saw in misfits(claim, known_metrics, registry.arm):
                raise UserError(f"{here}: expected {expected}; saw {saw}")
            if claim.untestable:
                found.append(Question(method, claim, why_not=claim.untestable))
            for benchmark, trial in claim.trials.items():
                if trial.seeds > len(table.seeds or []):
                    there = f"workflows/tables/{table.name}.yaml has {len(table.seeds or [])}"
                    raise UserError(f"{here}: claim {claim.id} declares {trial.seeds} seeds on {benchmark}, {there}: add seeds there")
                inside = benchmark in table.benchmarks
                why = None if inside else f"{benchmark} is none of this audit's benchmarks"
                found.append(Question(method, claim, benchmark, trial if inside else None, why))
    return found


def chosen(found: list[Question], method: str | None, benchmark: str | None, claim: str | None) -> list[Question]:
    """Those of a method, on a benchmark, of one claim; UserError where there is none."""
    for what, wanted, known in (
        ("method", method, {q.method.name for q in found}),
        ("benchmark", benchmark, {q.benchmark for q in found if q.benchmark}),
        ("claim", claim, {q.claim.id for q in found}),
    ):
        if wanted is not None and wanted not in known:
            raise UserError(f"--{what}: no claim of '{wanted}' in this audit, {nearest(wanted, known)}")
    return [
        q for q in found
        if method in (None, q.method.name) and benchmark in (None, q.benchmark) and claim in (None, q.claim.id)
    ]  # fmt: skip


def jobs(asked: list[Question], seeds: list[int]) -> list[Job]:
    """Teachers, a job each, then every arm once, with as many of the seeds as the most demanding question takes."""
    wanted: dict[tuple[str, str], int] = {}
    arms: dict[str, registry.Arm] = {}
    for q in asked:
        if q.trial is None or q.claim.experiment:
            continue
        assert q.benchmark is not None
        for arm in (registry.arm(name).at(q.trial.share) for name in q.claim.arms):
            for one in (*start_arms([arm]), arm):
                arms[one.name] = one
                wanted[q.benchmark, one.name] = max(q.trial.seeds, wanted.get((q.benchmark, one.name), 0))
    out = []
    for benchmark in dict.fromkeys(b for b, _ in wanted):
        b = config.benchmark(benchmark)
        out += [Job((Cell(b, None, s),)) for s in seeds[: max(n for (name, _), n in wanted.items() if name == benchmark)]]
    for (benchmark, name), count in wanted.items():
        n = resources.of(benchmark, name).seeds or count
        cells = [Cell(config.benchmark(benchmark), arms[name], s) for s in seeds[:count]]
        out += [Job(tuple(cells[i : i + n])) for i in range(0, count, n)]
    return out


def stamps(every: list[Question], asked: list[Question], seeds: list[int]) -> list[str]:
    """What Snakemake makes for some questions of an audit: the jobs and experiments of the whole audit that they need."""
    wanted = {(j.benchmark, j.arm) for j in jobs(asked, seeds)}
    names = {e.name for e in experiments(asked, seeds)}
    found = [j.stamp("evaluated") for j in jobs(every, seeds) if (j.benchmark, j.arm) in wanted]
    return found + [e.stamp for e in experiments(every, seeds) if e.name in names]


# Experiments.


def experiment_file(name: str) -> Path:
    return root() / ROOM / f"{name}.py"


@dataclass(frozen=True)
class Experiment:
    """A file of mechanisms/ on some seeds; a result is kept under the hash of everything that determines it."""

    name: str
    seeds: tuple[int, ...]

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """Its code, that which it stands on, and its benchmark and methods, which are read from the file without running it."""
        path = experiment_file(self.name)
        declared = constants(path.read_text())
        if not isinstance(declared.get("METHODS"), tuple) or not isinstance(declared.get("BENCHMARK"), str):
            raise UserError(f"{path}: BENCHMARK = 'name' and METHODS = ('name', ...) are missing: distillbench/mechanism.py says why")
        folders = [registry.arm(name).folder for name in declared["METHODS"]]
        return {
            "experiment": digest(path.read_bytes()),
            "ground": ground_hash() + digest(Path(__file__).with_name("mechanism.py").read_bytes()),
            "data": digest(canonical(config.benchmark(declared["BENCHMARK"]).model_dump(mode="json"))),
            "method": digest(b"".join(f.code_hash().encode() + (f.path / "config.yaml").read_bytes() for f in folders)),
        }

    def path(self, seed: int) -> Path:
        return root() / "results/runs" / ROOM / self.name / f"seed{seed}-{digest(canonical(self.recipe | {'seed': seed}))[:12]}.json"

    @property
    def keys(self) -> str:
        return digest(canonical([self.path(s).name for s in self.seeds]))[:12]

    @property
    def stamp(self) -> str:
        """As `plan.Job.stamp`."""
        return f"results/runs/{ROOM}/{self.name}/{self.keys}.measured"

    def sync(self) -> bool:
        """As `plan.Job.sync`."""
        path, complete = root() / self.stamp, all(self.path(s).is_file() for s in self.seeds)
        with writing(path):
            if complete and not path.exists():
                path.touch()
            elif not complete:
                path.unlink(missing_ok=True)
        return complete

    def measure(self, report: Callable[[str, int, int], None]) -> None:
        """Write what is missing; a seed on which the experiment fails gets a record too, without quantities and with the reason."""
        import time

        import torch

        torch.set_num_threads(1)
        torch.set_flush_denormal(True)
        spec = importlib.util.spec_from_file_location(f"distillbench_mechanism_{self.name}", experiment_file(self.name))
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for i, seed in enumerate(self.seeds):
            path = self.path(seed)
            make_folder(path.parent)
            with lock(path.with_name(f"seed{seed}.lock")):
                if path.is_file():
                    continue
                report("measuring", i, len(self.seeds))
                began = time.monotonic()
                about = {"format": 1, "experiment": self.name, "seed": seed, "key": path.stem.rpartition("-")[2]}
                try:
                    values = {name: float(f"{value:.8g}") for name, value in module.measure(seed).items()}
                    if not values or not all(math.isfinite(v) and v >= 0 for v in values.values()):
                        raise ValueError(f"quantities are finite and not negative, here are {values}")
                    about["values"] = values
                except (ValueError, ArithmeticError, Diverged, OverBudget, Refused) as e:  # its own failure, or that of a cell it needs
                    about |= {"values": {}, "failed": str(e)}
                write_json(path, about | {"seconds": round(time.monotonic() - began, 1), "provenance": circumstances(self.recipe)})


def experiments(asked: list[Question], seeds: list[int]) -> list[Experiment]:
    """Every experiment once, with as many seeds as the most demanding question takes."""
    wanted: dict[str, int] = {}
    for q in asked:
        if q.trial is not None and q.claim.experiment:
            wanted[q.claim.experiment] = max(q.trial.seeds, wanted.get(q.claim.experiment, 0))
    return [Experiment(name, tuple(seeds[:count])) for name, count in sorted(wanted.items())]


# Freezing.


def frozen(commits: set[str], table: str) -> dict[str, dict[str, Any]]:
    """Commit -> {"claims": {id: hash}, "seeds": of the audit called `table`}, as they stood there; without commits unknown to git."""
    out: dict[str, dict[str, Any]] = {}
    for commit in sorted(commits):
        files = git("ls-tree", "-r", "--name-only", commit).splitlines()
        if not files:
            continue
        margins = constants(git("show", f"{commit}:distillbench/claims.py"))
        then = yaml.load(git("show", f"{commit}:workflows/tables/{table}.yaml"), config.LOADER) or {}
        found: dict[str, str] = {}
        for file in (f for f in files if f.startswith("methods/") and f.endswith("/claims.yaml")):
            for claim in (yaml.load(git("show", f"{commit}:{file}"), config.LOADER) or {}).get("claims", []):
                with suppress(ValidationError):  # of an older schema: no claim of today
                    read = Claim.model_validate(claim)
                    found[read.id] = read.hash(margins)
        out[commit] = {"claims": found, "seeds": then.get("seeds") or []}
    return out


def constants(text: str) -> dict[str, Any]:
    """Literals that a module's text assigns to names, read without running it."""
    out = {}
    for line in ast.parse(text).body:
        if isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Name):
            with suppress(ValueError):
                out[line.targets[0].id] = ast.literal_eval(line.value)
    return out


def measured(found: list[Experiment]) -> dict[str, bytes]:
    """The results of experiments, by their place under the published records."""
    return {f"{ROOM}/{e.name}/seed{s}.json": e.path(s).read_bytes() for e in found for s in e.seeds if e.path(s).is_file()}


def by_experiment(files: dict[str, bytes]) -> dict[str, list[dict[str, Any]]]:
    """Results by the experiment's name, in the order of seeds; UserError names a damaged file."""
    out: dict[str, list[dict[str, Any]]] = {}
    for name, text in files.items():
        try:
            one = json.loads(text)
            out.setdefault(one["experiment"], []).append(one)
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{name}: not valid JSON of a measurement: take it from git again, or publish the audit anew") from None
    return {name: sorted(values, key=lambda one: one["seed"]) for name, values in out.items()}


def read_measured(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Published results of experiments."""
    return by_experiment({str(path): path.read_bytes() for path in sorted((folder / ROOM).glob("*/seed*.json"))})


def read_frozen(folder: Path) -> dict[str, dict[str, Any]]:
    """What `frozen` said when the records were published; UserError where the file is damaged."""
    path = folder / FROZEN
    try:
        return json.loads(path.read_text()) if path.is_file() else {}
    except ValueError:
        raise UserError(f"{path}: not valid JSON: take it from git again, or publish the audit anew") from None


def commits(files: dict[str, bytes]) -> set[str]:
    """That results of experiments record."""
    return {one["provenance"]["commit"] for values in by_experiment(files).values() for one in values}


def as_json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()
