"""A throw-away checkout with tiny benchmarks, in which the command line and Snakemake run."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from subprocess import CompletedProcess
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.commands import BIN as BIN
from tests.commands import (
    LONG,
    ROOT,
    Command,
    environment,
    real_environment,
    run,
    zygote_environment,
)
from tests.shim import SOCKET

DIGITS = """
name: tiny
family: digits
data: {kind: digits}
network: {width: 32, depth: 1}
teacher: {updates: 60, batch: 32, lr: 1.0e-3, heun_steps: 4}
budget: {flops: 1.5e+9}
sampling: {count: 1000}
extractor: digits-gelu-64
seeds: [0, 1]
timeout_s: 3600
"""
RING = """
name: tiny-ring
family: gaussians
data: {kind: mixture, layout: ring, sigma: 0.15, weights: [1, 2, 3]}
network: {width: 32, depth: 1}
teacher: {updates: 60, batch: 32, lr: 1.0e-3, heun_steps: 4}
budget: {flops: 7.0e+9}
sampling: {count: 500}
seeds: [0, 1]
timeout_s: 3600
"""
TABLE = "{{name: {name}, title: {name}, benchmarks: [{name}]}}\n"


class Checkout:
    """A folder that is a checkout to the command line; the packages are those under test."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = environment()
        for name in (
            "Snakefile",
            "workflows/rules",
            "workflows/resources.yaml",
            "profiles",
            "slurm",
            "methods",
        ):
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, folder / name)
        self.write("distillbench.yaml", "method_paths: []\n")
        for name in ("check-mixture", "check-digits"):
            self.write(
                f"workflows/benchmarks/{name}.yaml",
                (ROOT / f"workflows/benchmarks/{name}.yaml").read_text(),
            )
        for name, text in (("tiny", DIGITS), ("tiny-ring", RING)):
            self.write(f"workflows/benchmarks/{name}.yaml", text)
            self.write(f"workflows/tables/{name}.yaml", TABLE.format(name=name))

    def keep(self, *methods: str) -> None:
        """Take all other methods away."""
        for path in (self.folder / "methods").iterdir():
            if path.is_dir() and path.name not in methods:
                shutil.rmtree(path)

    def write(self, path: str, text: str) -> Path:
        target = self.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
        return target

    def run(self, *command: str, timeout: float = LONG) -> CompletedProcess[str]:
        """`distillbench ...` or `snakemake ...` here."""
        return run(command, self.folder, self.environment, timeout)

    def run_anew(self, *command: str) -> CompletedProcess[str]:
        """The same as an installation runs it, with all its imports."""
        return run(command, self.folder, real_environment())

    def start(self, *command: str, new_session: bool = False, **more: str) -> Command:
        """`run` in the background, with `more` in its environment."""
        return Command(command, self.folder, self.environment | more, new_session)

    def snakemake(self, *targets: str, cores: int = 2) -> CompletedProcess[str]:
        return self.run("snakemake", "--cores", str(cores), *targets)

    def metrics(self) -> dict[str, bytes]:
        """The bytes of every metrics.json by path."""
        runs = self.folder / "results/runs"
        return {
            str(p.relative_to(runs)): p.read_bytes() for p in sorted(runs.rglob("metrics.json"))
        }


def captured(monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str) -> list:
    """(arguments, value) of every call of the module's function `name`."""
    calls, original = [], getattr(module, name)

    def wrapped(*args: Any) -> Any:
        calls.append((args, original(*args)))
        return calls[-1][1]

    monkeypatch.setattr(module, name, wrapped)
    return calls


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checkout:
    (tmp_path / "checkout").mkdir()
    made = Checkout(tmp_path / "checkout")
    monkeypatch.chdir(made.folder)
    light_children(monkeypatch)
    return made


def light_children(monkeypatch: pytest.MonkeyPatch) -> None:
    """What this process asks of a module in a process of its own, the zygote begins."""
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    if zygote_environment():
        monkeypatch.setattr(
            sys, "executable", str(Path(zygote_environment()[SOCKET]).parent / "python")
        )


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


# Files by what they take, longest first, so that no worker ends with one of these.
FIRST = (
    *("test_audit_workflow", "test_workflow", "test_resilience", "test_check", "test_ranks"),
    *("test_cells", "test_tuning", "test_starts", "test_disks", "test_method_pages"),
    *("test_costs", "test_tables", "test_perf_gpu", "test_protocol"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        name = item.path.stem
        return FIRST.index(name) if name in FIRST else len(FIRST)

    items.sort(key=place)
