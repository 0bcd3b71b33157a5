"""Experiments of mechanisms: files in `mechanisms/` on some seeds, and their results.

A result is one JSON file, kept under the hash of everything that determines it, as a cell is:

    format, experiment, seed, key
    values       quantity -> number, finite and not negative; none where it failed
    failed       why, where the experiment failed on this seed
    seconds, provenance
"""

from __future__ import annotations

import importlib.util
import json
import math
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

from distillbench import config
from distillbench.cells.disk import lock, make_folder, write_json, writing
from distillbench.cells.progress import Report
from distillbench.cells.provenance import circumstances
from distillbench.config import root
from distillbench.errors import Diverged, OverBudget, Refused, UserError
from distillbench.hashing import canonical, digest
from distillbench.registry import folders
from distillbench.registry.code import hash_of, runner_hash
from distillbench.registry.source import literals

MECHANISMS = "mechanisms"  # the folder of experiments, and of their results
KEY_DIGITS = 12
# Settings of a method that an experiment may use; its labels and claims it does not see.
SETTINGS = {"group", "start", "config", "benchmarks", "variants"}


def experiment_file(name: str) -> Path:
    """Where the experiment `name` is, if there is one."""
    return root() / MECHANISMS / f"{name}.py"


@dataclass(frozen=True)
class Experiment:
    """A file of `mechanisms/` on some seeds."""

    name: str
    seeds: tuple[int, ...]

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """Its code, that which it stands on, its benchmark and its methods.

        These are read from the file without running it; UserError where it does not name them.
        """
        path = experiment_file(self.name)
        declared = literals(path.read_text())
        methods = declared.get("METHODS")
        name = declared.get("BENCHMARK")
        if not isinstance(methods, tuple) or not isinstance(name, str):
            raise UserError(
                f"{path}: BENCHMARK = 'name' and METHODS = ('name', ...) are missing: "
                "distillbench/audits/mechanism.py says why"
            )
        benchmark = config.benchmark(name)
        used = []
        for method in methods:
            folder = folders.arm(method).folder
            used.append([folder.code_hash(), folder.file.model_dump(include=SETTINGS)])
        return {
            "experiment": hash_of(path),
            "ground": runner_hash(benchmark.data.kind, "audits/mechanism.py"),
            "data": digest(canonical(benchmark.model_dump(mode="json"))),
            "method": digest(canonical(used)),
        }

    def path(self, seed: int) -> Path:
        """Where the result of a seed is, once it has been measured."""
        key = digest(canonical(self.recipe | {"seed": seed}))[:KEY_DIGITS]
        return root() / "results/runs" / MECHANISMS / self.name / f"seed{seed}-{key}.json"

    @property
    def keys(self) -> str:
        """Hash of the keys of all its seeds, 12 hexadecimal digits."""
        names = [self.path(seed).name for seed in self.seeds]
        return digest(canonical(names))[:KEY_DIGITS]

    @property
    def stamp(self) -> str:
        """Of all its results, as `cells.jobs.Job.stamp`."""
        return f"results/runs/{MECHANISMS}/{self.name}/{self.keys}.measured"

    def sync(self) -> bool:
        """Make the stamp agree with the results, as `cells.jobs.Job.sync`."""
        path = root() / self.stamp
        complete = all(self.path(seed).is_file() for seed in self.seeds)
        with writing(path):
            if complete and not path.exists():
                path.touch()
            elif not complete:
                path.unlink(missing_ok=True)
        return complete

    def measure(self, report: Report) -> None:
        """Write the results that are missing, one for a seed on which the experiment fails as well.

        A failed seed's result says why it failed.

        Raises whatever the experiment raises that is no failure of its own or of a cell it needs.
        """
        import torch

        torch.set_num_threads(1)
        torch.set_flush_denormal(True)
        module = self._module()
        for i, seed in enumerate(self.seeds):
            path = self.path(seed)
            make_folder(path.parent)
            with lock(path.with_name(f"seed{seed}.lock")):
                if not path.is_file():
                    report("measuring", i, len(self.seeds))
                    write_json(path, self._result(module, seed))

    def _module(self) -> ModuleType:
        name = f"distillbench_mechanism_{self.name}"
        spec = importlib.util.spec_from_file_location(name, experiment_file(self.name))
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    def _result(self, module: ModuleType, seed: int) -> dict[str, Any]:
        began = time.monotonic()
        key = self.path(seed).stem.rpartition("-")[2]
        result: dict[str, Any] = {
            "format": 1,
            "experiment": self.name,
            "seed": seed,
            "key": key,
            "values": {},
        }
        try:
            result["values"] = checked(module.measure(seed))
        except (ValueError, ArithmeticError, Diverged, OverBudget, Refused) as e:
            result["failed"] = str(e)
        result["seconds"] = round(time.monotonic() - began, 1)
        result["provenance"] = circumstances(self.recipe)
        return result


def checked(quantities: dict[str, float]) -> dict[str, float]:
    """Quantities with 8 digits; ValueError where one is negative or not finite, or without any."""
    values = {name: float(f"{value:.8g}") for name, value in quantities.items()}
    if not values or not all(math.isfinite(v) and v >= 0 for v in values.values()):
        raise ValueError(f"quantities are finite and not negative, here are {values}")
    return values


def measured(found: list[Experiment]) -> dict[str, bytes]:
    """The results of experiments that are there, by their place under the published records."""
    files = {}
    for experiment in found:
        for seed in experiment.seeds:
            path = experiment.path(seed)
            if path.is_file():
                files[f"{MECHANISMS}/{experiment.name}/seed{seed}.json"] = path.read_bytes()
    return files


def by_experiment(files: dict[str, bytes]) -> dict[str, list[dict[str, Any]]]:
    """Results by the experiment's name, in the order of seeds; UserError names a damaged file."""
    out: dict[str, list[dict[str, Any]]] = {}
    for name, text in files.items():
        try:
            result = json.loads(text)
            out.setdefault(result["experiment"], []).append(result)
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{name}: not valid JSON of a measurement: take it from git again, "
                "or publish the audit anew"
            ) from None
    for results in out.values():
        results.sort(key=lambda result: result["seed"])
    return out


def read_measured(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Published results of experiments, as of `by_experiment`."""
    paths = sorted((folder / MECHANISMS).glob("*/seed*.json"))
    return by_experiment({str(path): path.read_bytes() for path in paths})


def commits(files: dict[str, bytes]) -> set[str]:
    """Commits that results of experiments record."""
    found = set()
    for results in by_experiment(files).values():
        found |= {result["provenance"]["commit"] for result in results}
    return found
