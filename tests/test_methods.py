"""Every method folder is complete, and what its README points at exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from distillbench import config, registry
from distillbench.config import Benchmark

ROOT = Path(__file__).parents[1]
METHODS = sorted(p.parent for p in (ROOT / "methods").glob("*/method.py"))
TARGET = re.compile(r"`([\w/]+\.py):([\w.]+)`")


def defined(path: Path) -> set[str]:
    """Functions, classes and methods of a file: f, C, C.f."""
    out = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            out.add(node.name)
        if isinstance(node, ast.ClassDef):
            out |= {f"{node.name}.{n.name}" for n in node.body if isinstance(n, ast.FunctionDef)}
    return out


def unresolved(page: str) -> list[str]:
    return [f"{file}:{name}" for file, name in TARGET.findall(page) if not (ROOT / file).is_file() or name not in defined(ROOT / file)]


@pytest.mark.parametrize("folder", METHODS, ids=lambda p: p.name)
def test_the_page_points_at_code_that_exists(folder: Path):
    page = (folder / "README.md").read_text()
    assert len(TARGET.findall(page)) >= 4
    assert unresolved(page) == []
    assert unresolved("`methods/dmd/method.py:no_such_function`") and unresolved("`methods/none/method.py:f`")


@pytest.mark.parametrize("folder", METHODS, ids=lambda p: p.name)
def test_settings_fit_on_every_benchmark_and_claims_name_arms(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    method = registry.discover()[folder.name]
    cls = registry.load(method)
    for name in (None, *method.file.variants):
        arm = registry.Arm(method, name)
        for path in (ROOT / "workflows/benchmarks").glob("*.yaml"):
            b = config.read(path, Benchmark)
            needs = cls.needs(registry.configuration(arm, b, cls))
            assert needs.headline_nfe in needs.nfe
    for claim in method.claims.claims:
        for arm_name in claim.arms:
            registry.arm(arm_name)
        config.benchmark(claim.benchmark)


def test_every_module_of_the_suite_stays_readable():
    for path in [*(ROOT / "distillbench").glob("*.py"), *(ROOT / "eval").glob("*.py"), *(ROOT / "methods").glob("*/method.py")]:
        assert len(path.read_text().splitlines()) <= 400, path
        assert ast.get_docstring(ast.parse(path.read_text())), f"{path} does not say what it holds"
