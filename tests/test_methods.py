"""Every method folder is complete, and what its README points at exists."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from distillbench import reading
from distillbench.audits import questions
from distillbench.cli.evaluate import known_metrics
from distillbench.config import Benchmark
from distillbench.registry import folders, source
from distillbench.registry.claims import Claim
from distillbench.registry.folders import Arm

ROOT = Path(__file__).parents[1]
METHODS = sorted(p.parent for p in (ROOT / "methods").glob("*/method.py"))


@pytest.mark.parametrize("folder", METHODS, ids=lambda p: p.name)
def test_the_page_points_at_code_that_exists(folder: Path):
    assert len(source.targets(folder / "README.md")) >= 4
    assert source.unresolved(folder / "README.md", ROOT) == []


def test_a_page_that_points_nowhere_is_found(tmp_path: Path):
    (tmp_path / "method.py").write_text("class A:\n    def f(self): ...\n")
    page = tmp_path / "README.md"
    page.write_text(
        "| `methods/dmd/method.py:regression_loss` | `method.py:A.f` "
        "| `method.py:A.g` | `methods/none/method.py:f` |"
    )
    assert source.unresolved(page, ROOT) == ["method.py:A.g", "methods/none/method.py:f"]


@pytest.mark.parametrize("folder", METHODS, ids=lambda p: p.name)
def test_settings_fit_on_every_benchmark_and_claims_name_arms(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(ROOT)
    method = folders.discover()[folder.name]
    cls = folders.load(method)
    for name in (None, *method.file.variants):
        arm = Arm(method, name)
        for path in (ROOT / "workflows/benchmarks").glob("*.yaml"):
            b = reading.read(path, Benchmark)
            needs = cls.needs(folders.configuration(arm, b, cls))
            assert needs.headline_nfe in needs.nfe
    assert [
        found
        for claim in method.claims.claims
        for found in questions.misfits(claim, known_metrics, folders.arm)
    ] == []


PLANTED = {  # what a claim says instead -> what is seen
    "unknown benchmark 'digtis'": {"trials": {"digtis": {"metric": "fid", "seeds": 3}}},
    "sliced_w2": {"trials": {"digits": {"metric": "sliced_w2", "seeds": 3}}},  # of mixtures alone
    "plian": {"arms": ["dmd", "dmd@plian"]},
    "no_such_experiment": {"kind": "mechanism", "experiment": "no_such_experiment"},
}


@pytest.mark.parametrize("seen", PLANTED)
def test_a_claim_that_names_what_is_not_there_is_found(seen: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    said = {
        "id": "A-1",
        "claim": "it is better",
        "where": "Table 1",
        "kind": "comparative",
        "scale_free": False,
        "primary": True,
        "refuted_if": "it is not",
        "arms": ["dmd", "dmd@no-regression"],
        "trials": {"digits": {"metric": "fid", "seeds": 3}},
    }
    assert list(questions.misfits(Claim.model_validate(said), known_metrics, folders.arm)) == []
    ((expected, saw),) = questions.misfits(
        Claim.model_validate(said | PLANTED[seen]), known_metrics, folders.arm
    )
    assert "claim A-1 to name " in expected and seen in saw


def test_every_module_of_the_suite_says_what_it_holds():
    tops = ("distillbench", "eval", "methods", "mechanisms", "perf")
    paths = [path for top in tops for path in (ROOT / top).rglob("*.py")]
    assert len(paths) > 100
    for path in paths:
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path
