"""The walls: who may import whom, read from the source, so that nothing hides in a function."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

from distillbench.registry import source

ROOT = Path(__file__).parents[1]
PACKAGES = ("distillbench", "eval", "methods", "mechanisms", "workflows")
# A folder imports from itself and from lower floors alone; "" is what lies flat in the package.
FLOORS = {
    "distillbench": {
        "": 0,
        "networks": 1,
        "data": 1,
        "template": 1,
        "teachers": 2,
        "registry": 3,
        "cells": 4,
        "audits": 5,
        "cluster": 5,
        "tables": 6,
        "conformance": 6,
        "cli": 7,
    },
    "eval": {"": 0, "features": 1, "metrics": 2, "report": 3, "audit": 4},
}
EVAL_MAY_IMPORT = {"distillbench.hashing"}  # what its key is made by
TORCH_FREE = (
    "distillbench.audits.needs",
    "distillbench.cells.cell",
    "distillbench.cells.validate",
    "distillbench.cells.work",
    "distillbench.cli.main",
    "distillbench.cli.workflow",
    "distillbench.cluster.control",
    "distillbench.cluster.dispatch",
    "distillbench.cluster.job",
    "distillbench.cluster.launcher",
    "distillbench.cluster.queue",
    "distillbench.registry.folders",
    "distillbench.tables.overview",
    "distillbench.tables.contents",
    "eval.report.records",
)


def module_of(path: Path, root: Path) -> str:
    """Dotted name of a file, of a package's __init__ that of the package."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules(root: Path) -> dict[str, Path]:
    """Every module of distillbench and eval by its dotted name."""
    files = [path for package in FLOORS for path in (root / package).rglob("*.py")]
    return {module_of(path, root): path for path in sorted(files)}


def imported(path: Path, known: dict[str, Path]) -> set[str]:
    """Modules of ours that a file imports, anywhere in it; a name in one stands for the module."""
    found = set()
    for _, name in source.imports(path):
        if name.partition(".")[0] in PACKAGES:
            parent = name.rpartition(".")[0]
            found.add(name if name in known or parent not in known else parent)
    return found


def floor(module: str) -> tuple[str, int]:
    """Package and floor of a module of distillbench or eval; KeyError on an unknown folder."""
    package, *inner = module.split(".")
    folder = inner[0] if len(inner) > 1 or (inner and inner[0] in FLOORS[package]) else ""
    return package, FLOORS[package][folder]


def crossed(module: str, target: str) -> bool:
    """Whether an import of distillbench or eval crosses a wall of docs/architecture.md."""
    package = target.partition(".")[0]
    here, own_floor = floor(module)
    if package not in FLOORS:
        return True
    if here == package:
        same_folder = module.split(".")[:-1] == target.split(".")[:-1]
        return not same_folder and floor(target)[1] >= own_floor
    if here == "eval":
        return target not in EVAL_MAY_IMPORT
    return not module.startswith("distillbench.cli.")


def violations(root: Path) -> list[str]:
    """Every import that crosses a wall."""
    out = []
    known = modules(root)
    for module, path in known.items():
        for target in sorted(imported(path, known)):
            if target != module and crossed(module, target):
                out.append(f"{module} imports {target}")
    methods = sorted((root / "methods").rglob("*.py"))
    names = {path.parent.name for path in methods if path.name == "method.py"}
    for path in methods:
        siblings = names - {path.relative_to(root).parts[1]}
        for _, name, why in source.forbidden(path, siblings):
            out.append(f"{path.relative_to(root)} imports {name}: {why}")
    for path in sorted((root / "mechanisms").glob("*.py")):
        for target in sorted(imported(path, known)):
            if not target.startswith("distillbench.") or target.startswith("distillbench.cli"):
                out.append(f"{path.relative_to(root)} imports {target}")
    for path in (*known.values(), *(root / "mechanisms").glob("*.py")):
        for _, name in source.imports(path):
            if name.startswith("."):
                out.append(f"{path.relative_to(root)} imports {name}, which hides where it is from")
    return out


def circle(root: Path) -> list[str]:
    """Modules that import each other, in order; none where there is no such circle."""
    known = modules(root)
    graph = {}
    for module, path in known.items():
        graph[module] = {name for name in imported(path, known) if name in known} - {module}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as e:
        return list(e.args[1])
    return []


def test_nobody_crosses_a_wall():
    assert violations(ROOT) == []


def test_no_circle():
    assert circle(ROOT) == []


def test_every_folder_has_a_floor_and_says_what_it_holds():
    for module, path in modules(ROOT).items():
        floor(module)
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        assert text, f"{path} does not say what it holds"
        if path.name == "__init__.py":
            body = ast.parse(path.read_text(encoding="utf-8")).body
            assert len(body) == 1 and len(text.splitlines()) == 1, path


PLANTED = {
    "an upward import": ("distillbench/registry/a.py", "from distillbench.cells.cell import Cell"),
    "the desk imports a folder": ("distillbench/a.py", "from distillbench.data import images"),
    "a neighbour": ("distillbench/audits/a.py", "import distillbench.cluster.queue"),
    "in a function": (
        "distillbench/cells/a.py",
        "def f():\n    from distillbench.tables import contents",
    ),
    "for types alone": (
        "distillbench/cells/a.py",
        "if TYPE_CHECKING:\n    from distillbench.cli import main",
    ),
    "the evaluator": ("distillbench/cells/a.py", "from eval.metrics import scores"),
    "the evaluator, from below cli": ("distillbench/tables/a.py", "import eval.catalogue"),
    "a method by name": ("distillbench/cells/a.py", "import methods.dmd.method"),
    "eval upwards": ("eval/metrics/a.py", "from eval.report import records"),
    "eval outwards": ("eval/metrics/a.py", "from distillbench import paths"),
    "eval outwards in a function": (
        "eval/report/a.py",
        "def f():\n    from distillbench.cells.cell import Cell",
    ),
    "a relative import": ("distillbench/cells/a.py", "from ..tables.contents import arms"),
    "a mechanism that knows the command line": (
        "mechanisms/a.py",
        "from distillbench.cli.evaluate import known_metrics",
    ),
    "a mechanism that scores": ("mechanisms/a.py", "from eval.metrics.mixtures import modes"),
    "a mechanism and a method": ("mechanisms/a.py", "from methods.b.method import loss"),
    "a method that scores": ("methods/a/method.py", "from eval.metrics.scores import kid"),
    "a method and another": ("methods/a/method.py", "from methods.b.method import loss"),
    "a method of two files": ("methods/a/method.py", "from .helper import loss"),
    "a method in a function": ("methods/a/method.py", "def f():\n    import eval.catalogue"),
    "a method that loads data": ("methods/a/method.py", "from distillbench.data.kinds import load"),
    "a method and a data set": ("methods/a/method.py", "from sklearn.datasets import load_digits"),
}


@pytest.fixture
def skeleton(tmp_path: Path) -> Path:
    """A tree of empty modules, one of each that planted imports name."""
    for module in modules(ROOT):
        path = tmp_path.joinpath(*module.split("."))
        is_package = ROOT.joinpath(*module.split(".")).is_dir()
        file = path / "__init__.py" if is_package else path.with_suffix(".py")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("")
    return tmp_path


@pytest.mark.parametrize("what", PLANTED)
def test_a_planted_violation_is_found(skeleton: Path, what: str):
    assert violations(skeleton) == []
    path, line = PLANTED[what]
    (skeleton / path).parent.mkdir(parents=True, exist_ok=True)
    (skeleton / path).write_text(line + "\n")
    assert len(violations(skeleton)) >= 1


@pytest.mark.parametrize("second", ["import distillbench.cells.a", "def f():\n    from . import a"])
def test_a_planted_circle_is_found(skeleton: Path, second: str):
    assert circle(skeleton) == []
    second = second.replace("from . import a", "from distillbench.cells import a")
    (skeleton / "distillbench/cells/a.py").write_text("from distillbench.cells.b import f\n")
    (skeleton / "distillbench/cells/b.py").write_text(second + "\n")
    assert set(circle(skeleton)) == {"distillbench.cells.a", "distillbench.cells.b"}


def test_distillbench_knows_no_method_by_name():
    names = [path.parent.name for path in (ROOT / "methods").glob("*/method.py")]
    for path in (ROOT / "distillbench").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
        known = strings & set(names)
        assert known <= ({"add"} if path.name == "jvp.py" else set()), path  # torch's own function


@pytest.mark.parametrize("module", TORCH_FREE)
def test_what_the_workflow_reads_imports_no_torch(module: str):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
