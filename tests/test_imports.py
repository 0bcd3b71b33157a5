"""The walls: who may import whom. Read from the source, so that nothing hides behind a lazy import."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from distillbench.registry import source

ROOT = Path(__file__).parents[1]
OURS = {"distillbench", "eval", "methods", "workflows"}
TORCH_FREE = (
    "distillbench.plan",
    "distillbench.dispatch",
    "distillbench.cell",
    "distillbench.registry",
    "distillbench.launcher",
    "distillbench.slurm_job",
    "distillbench.squeue",
    "distillbench.cluster",
    "distillbench.work",
    "eval.records",
)


MAY_IMPORT_EVAL = (
    "cli.py",
    "cli_audit.py",
    "cli_publish.py",
    "scoring.py",
    "audit_render.py",
    "bundle.py",
)


def violations(root: Path) -> list[str]:
    """Every import that crosses a wall of docs/architecture.md."""
    out = []
    for path in [
        p
        for top in ("methods", "mechanisms", "distillbench", "eval")
        for p in sorted((root / top).rglob("*.py"))
    ]:
        place = path.relative_to(root)
        if place.parts[0] == "methods":
            siblings = {p.parent.name for p in path.parents[1].glob("*/method.py")} - {
                place.parts[1]
            }
            out += [f"{place} imports {name}" for _, name, _ in source.forbidden(path, siblings)]
            continue
        for name in sorted({name for _, name in source.imports(path)}):
            top = name.partition(".")[0]
            bad = False
            if place.parts[0] == "distillbench":
                bad = top == "methods" or (top == "eval" and place.name not in MAY_IMPORT_EVAL)
            elif place.parts[0] == "mechanisms":
                bad = top in OURS - {"distillbench"}
            elif place.parts[0] == "eval":
                bad = top in OURS - {"eval"}
            if bad:
                out.append(f"{place} imports {name}")
    return out


def test_nobody_crosses_a_wall():
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    "path,line",
    [
        ("methods/a/method.py", "from eval.metrics import kid"),
        ("methods/a/method.py", "from methods.b.method import loss"),
        ("methods/a/method.py", "from .helper import loss"),
        ("methods/a/method.py", "def f():\n    import eval.tables"),
        ("methods/a/method.py", "from distillbench.data import load"),
        ("methods/a/method.py", "from sklearn.datasets import load_digits"),
        ("distillbench/train.py", "from eval import metrics"),
        ("distillbench/train.py", "import methods.dmd.method"),
        ("mechanisms/a.py", "from eval.mixtures import sliced_wasserstein"),
        ("mechanisms/a.py", "from methods.b.method import loss"),
        ("eval/metrics.py", "from distillbench import paths"),
        ("eval/metrics.py", "def f():\n    from distillbench.cell import Cell"),
    ],
)
def test_a_planted_violation_is_found(tmp_path: Path, path: str, line: str):
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text(line + "\n")
    assert len(violations(tmp_path)) >= 1


def test_distillbench_knows_no_method_by_name():
    names = [p.parent.name for p in (ROOT / "methods").glob("*/method.py")]
    for path in (ROOT / "distillbench").glob("*.py"):
        strings = [
            n.value
            for n in ast.walk(ast.parse(path.read_text()))
            if isinstance(n, ast.Constant) and isinstance(n.value, str)
        ]
        assert not [s for s in strings if s in names and (s, path.name) != ("add", "jvp.py")], (
            path
        )  # there it is torch's function


@pytest.mark.parametrize("module", TORCH_FREE)
def test_what_the_workflow_reads_imports_no_torch(module: str):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
