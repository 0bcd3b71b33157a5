"""Keys hash code, not text: which edits leave them, and which change them."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from distillbench.hashing import code_hash

ROOT = Path(__file__).parents[1]
ASK = """
import json, sys
from distillbench import config
from distillbench.cells.cell import Cell
from distillbench.registry import folders
from eval.metrics.key import evaluation_key
keys = {"evaluation": evaluation_key(None)}
for arm in ("meanflow", "dmd2"):
    for benchmark in ("digits", "gaussians-ring"):
        cell = Cell(config.benchmark(benchmark), folders.arm(arm), 0)
        keys[f"{benchmark}/{arm}"] = cell.key
print(json.dumps(keys))
"""
MEANFLOW = {"digits/meanflow", "gaussians-ring/meanflow"}
CELLS = MEANFLOW | {"digits/dmd2", "gaussians-ring/dmd2"}
METHOD = "methods/meanflow/method.py"
Edit = Callable[[Path], None]


class Tree:
    """A copy of the checkout's code that may be edited."""

    def __init__(self, folder: Path):
        self.folder = folder
        for name in ("distillbench", "eval", "methods", "workflows"):
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
        shutil.copyfile(ROOT / "distillbench.yaml", folder / "distillbench.yaml")

    def keys(self) -> dict[str, str]:
        """Keys of four cells and of the evaluation, by the code as it stands in the copy."""
        environment = os.environ | {"PYTHONPATH": str(self.folder)}
        done = subprocess.run(
            [sys.executable, "-c", ASK],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def changed_by(
        self, edit: Edit, before: dict[str, str], kept: dict[str, str] | None = None
    ) -> set[str]:
        """Names of the keys that an edit changes; the copy is as it was afterwards.

        kept: takes the keys that the edit gives.
        """
        backup = self.folder.with_name("backup")
        shutil.copytree(self.folder, backup)
        try:
            edit(self.folder)
            after = self.keys()
            if kept is not None:
                kept.update(after)
        finally:
            shutil.rmtree(self.folder)
            backup.rename(self.folder)
        return {name for name in before if after[name] != before[name]}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    return Tree(tmp_path_factory.mktemp("keys") / "tree")


@pytest.fixture(scope="module")
def before(tree: Tree) -> dict[str, str]:
    return tree.keys()


def replacing(path: str, old: str, new: str) -> Edit:
    """The edit that puts `new` in the place of the first `old` of a file."""

    def edit(folder: Path) -> None:
        text = (folder / path).read_text(encoding="utf-8")
        assert old in text, f"{old!r} is not in {path}"
        (folder / path).write_text(text.replace(old, new, 1), encoding="utf-8")

    return edit


def rewritten_by_the_parser(folder: Path) -> None:
    """Every module of the desk and the method in another format, without comments."""
    for path in [folder / METHOD, *(folder / "distillbench").glob("*.py")]:
        text = ast.unparse(ast.parse(path.read_text(encoding="utf-8")))
        path.write_text(text + "\n", encoding="utf-8")


def without_docstrings(folder: Path) -> None:
    """The method and the flow maps without a single docstring."""
    for path in (folder / METHOD, folder / "distillbench/flowmaps.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            if documented and ast.get_docstring(node) is not None:
                node.body = node.body[1:] or [ast.Pass()]
        path.write_text(ast.unparse(tree) + "\n", encoding="utf-8")


def a_renamed_module(folder: Path) -> None:
    """times.py and flowmaps.py under other names."""
    for old, new in (("times", "laws_of_time"), ("flowmaps", "maps")):
        (folder / f"distillbench/{old}.py").rename(folder / f"distillbench/{new}.py")
        for path in [*folder.glob("methods/*/*.py"), *folder.glob("distillbench/**/*.py")]:
            text = path.read_text(encoding="utf-8")
            text = text.replace(f"distillbench.{old} import", f"distillbench.{new} import")
            text = text.replace(
                f"distillbench import {old}\n", f"distillbench import {new} as {old}\n"
            )
            path.write_text(text, encoding="utf-8")


def mutated(path: str, kind: type[ast.AST], mutate: Callable[[ast.AST], bool]) -> Edit:
    """The edit that changes the first node of a kind for which `mutate` returns that it did."""

    def edit(folder: Path) -> None:
        tree = ast.parse((folder / path).read_text(encoding="utf-8"))
        assert any(isinstance(node, kind) and mutate(node) for node in ast.walk(tree)), path
        (folder / path).write_text(ast.unparse(tree) + "\n", encoding="utf-8")

    return edit


def another_number(node: ast.AST) -> bool:
    assert isinstance(node, ast.Constant)
    if type(node.value) not in (int, float):
        return False
    node.value += 1
    return True


def another_sign(node: ast.AST) -> bool:
    assert isinstance(node, ast.BinOp)
    if not isinstance(node.op, ast.Sub):
        return False
    node.op = ast.Add()
    return True


def another_default(node: ast.AST) -> bool:
    assert isinstance(node, ast.arguments)
    if not node.defaults:
        return False
    node.defaults[-1] = ast.Constant(7)
    return True


def another_annotation(node: ast.AST) -> bool:
    assert isinstance(node, ast.arg)
    node.annotation = ast.Name("object")
    return True


FLOW_MAPS = "distillbench/flowmaps.py"
ADVERSARIAL = "distillbench/adversarial.py"
LEAVES: dict[str, Edit] = {
    "a comment": replacing(FLOW_MAPS, "def ", "# another comment\n\n\ndef "),
    "a comment in the method": replacing(METHOD, "class ", "# another comment\n\n\nclass "),
    "a docstring": replacing(METHOD, '"""', '"""Other words. '),
    "no docstrings": without_docstrings,
    "a reformatting": rewritten_by_the_parser,
    "a renamed module": a_renamed_module,
    "an annotation": mutated("distillbench/paths.py", ast.arg, another_annotation),
    "a variable's type": replacing("distillbench/cells/steps.py", "x: Tensor | None = ", "x = "),
    "an import": replacing("distillbench/seeds.py", "import torch\n", "import torch\nimport os\n"),
    "progress": mutated("distillbench/cells/progress.py", ast.Constant, another_number),
    "the watcher": mutated("distillbench/cells/supervisor.py", ast.Constant, another_number),
    "a table": mutated("eval/report/tables.py", ast.Constant, another_number),
}
LOADERS = "distillbench/data/kinds.py"
LEAVES["another kind of data"] = replacing(LOADERS, "LOADERS:", "print_it = print\nLOADERS:")
GAUSSIANS = {name for name in CELLS if name.startswith("gaussians")}
CHANGES: dict[str, tuple[Edit, set[str]]] = {
    "what another method imports": (
        mutated(ADVERSARIAL, ast.Constant, another_number),
        CELLS - MEANFLOW,
    ),
    "a constant": (mutated(FLOW_MAPS, ast.Constant, another_number), MEANFLOW),
    "an operator": (mutated(FLOW_MAPS, ast.BinOp, another_sign), MEANFLOW),
    "a default": (mutated("distillbench/samplers.py", ast.arguments, another_default), CELLS),
    "a called function": (mutated("distillbench/paths.py", ast.BinOp, another_sign), CELLS),
    "another function by that name": (
        replacing(
            "distillbench/cells/steps.py",
            "import derive, ranks",
            "import ranks\nfrom zlib import crc32 as derive",
        ),
        CELLS,
    ),
    "the loop": (mutated("distillbench/cells/loop.py", ast.Constant, another_number), CELLS),
    "a network": (mutated("distillbench/networks/mlp.py", ast.Constant, another_number), CELLS),
    "the mixture": (mutated("distillbench/data/mixture.py", ast.BinOp, another_sign), GAUSSIANS),
    "its velocity": (mutated("distillbench/teachers/exact.py", ast.BinOp, another_sign), GAUSSIANS),
    "the digits": (
        mutated("distillbench/data/digits.py", ast.BinOp, another_sign),
        CELLS - GAUSSIANS,
    ),
    "a metric": (mutated("eval/metrics/mixtures.py", ast.BinOp, another_sign), {"evaluation"}),
}


@pytest.mark.parametrize("what", LEAVES)
def test_an_edit_that_changes_no_result_leaves_every_key(
    tree: Tree, before: dict[str, str], what: str
):
    assert tree.changed_by(LEAVES[what], before) == set()


@pytest.mark.parametrize("what", CHANGES)
def test_an_edit_of_code_changes_the_keys_of_what_runs_it(
    tree: Tree, before: dict[str, str], what: str
):
    edit, expected = CHANGES[what]
    assert tree.changed_by(edit, before) == expected


TWO_IMPORTS = """
def f():
    from math import sin as g
    g(1)


def h():
    from math import cos as g
    g(1)
"""
SAME = (
    ("x: int = 3", "x = 3"),
    ("def f(a: int, b=2) -> int:\n    return a", "def f(a, b=2):\n    'Words.'\n    return a"),
    ("def f():\n    pass", "def f():\n    'Words.'"),
    ("import math\ny = math.pi", "from math import pi as p\ny = p"),
    (
        "import torch.nn.functional as F\ny = F.gelu",
        "from torch.nn import functional\ny = functional.gelu",
    ),
    ("y = f'a' f'b {x}'", "y = f'ab {x}'"),
)
OTHER = (
    (TWO_IMPORTS, TWO_IMPORTS.replace("sin", "tan")),
    (
        "if TYPE_CHECKING:\n    x = 1\nelse:\n    x = 2",
        "if TYPE_CHECKING:\n    x = 1\nelse:\n    x = 3",
    ),
    ("x = 3", "x = 3.0"),
    ("x = 3", "x = '3'"),
    ("x = True", "x = 1"),
    ("from math import sin as f\ny = f(1)", "from math import cos as f\ny = f(1)"),
    ("def f(a, b=2): ...", "def f(a, b=3): ..."),
    ("def f(a, *, b): ...", "def f(a, b): ..."),
    ("@a\ndef f(): ...", "def f(): ..."),
    ("class C:\n    x: int = 3", "class C:\n    x: float = 3"),
    ("y = f'{x:.3g}'", "y = f'{x:.4g}'"),
    ("y = x[1:]", "y = x[:1]"),
)


def hash_of(folder: Path, text: str) -> str:
    path = folder / "module.py"
    path.write_text(text + "\n")
    os.utime(path, ns=(len(text), abs(hash(text)) % 10**12))  # another state of the file
    return code_hash(path, lambda module: None)


@pytest.mark.parametrize("first,second", SAME)
def test_the_same_code_has_one_hash(tmp_path: Path, first: str, second: str):
    assert hash_of(tmp_path, first) == hash_of(tmp_path, second)


@pytest.mark.parametrize("first,second", OTHER)
def test_other_code_has_another_hash(tmp_path: Path, first: str, second: str):
    assert hash_of(tmp_path, first) != hash_of(tmp_path, second)


@pytest.mark.parametrize(
    "text", ["from math import *", "from .paths import noised", "import distillbench.paths"]
)
def test_an_import_that_hides_its_names_has_no_hash(tmp_path: Path, text: str):
    with pytest.raises(ValueError, match="import"):
        hash_of(tmp_path, text)


def test_a_module_under_another_name_is_followed(tree: Tree, before: dict[str, str]):
    own = replacing(
        METHOD,
        "class ",
        "import distillbench.adversarial as adv\nHINGE = adv.hinge_generator\n\n\nclass ",
    )

    def edited_too(folder: Path) -> None:
        own(folder)
        mutated(ADVERSARIAL, ast.Constant, another_number)(folder)

    def keys_after(edit: Edit) -> dict[str, str]:
        kept: dict[str, str] = {}
        tree.changed_by(edit, before, kept)
        return kept

    assert keys_after(own)["digits/meanflow"] != keys_after(edited_too)["digits/meanflow"]


def test_a_method_that_is_no_python_has_a_key_still(tree: Tree, before: dict[str, str]):
    broken = replacing(METHOD, "class ", "klass ")
    assert tree.changed_by(broken, before) == MEANFLOW
