"""Every public name of the desk is documented, and what handles tensors says of which shape.

The desk is what a method's author imports: the modules directly in `distillbench/`.
"""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[1] / "distillbench"
MODULES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")

# A shape begins with a name, a star or dots, an interval such as [0, 1] with a number.
SHAPE = re.compile(r"\[[A-Za-z*.]|\bscalars?\b|\bany shape\b|\bstate dict\b")

Definition = ast.FunctionDef | ast.ClassDef


def definitions(body: list[ast.stmt]) -> list[Definition]:
    """Public functions and classes among statements."""
    found = [node for node in body if isinstance(node, Definition)]
    return [node for node in found if not node.name.startswith("_")]


def has_tensor(annotation: ast.expr | None) -> bool:
    """Whether an annotation names Tensor, alone or inside of another type."""
    if annotation is None:
        return False
    return any(isinstance(node, ast.Name) and node.id == "Tensor" for node in ast.walk(annotation))


def handles_tensors(node: Definition) -> bool:
    """Whether a function takes or returns tensors, or a class is made of them."""
    if isinstance(node, ast.FunctionDef):
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        return any(has_tensor(a) for a in [node.returns, *(a.annotation for a in arguments)])
    for part in node.body:
        if isinstance(part, ast.AnnAssign) and has_tensor(part.annotation):
            return True
        is_function = isinstance(part, ast.FunctionDef)
        if is_function and part.name in ("__init__", "forward") and handles_tensors(part):
            return True
    return False


def complaint(node: Definition) -> str | None:
    """What is wrong with the docstring of a definition."""
    text = ast.get_docstring(node)
    if text is None:
        return "no docstring"
    summary, *rest = text.splitlines()
    if not summary.endswith(".") or (rest and rest[0]):
        return "the first line is no sentence of its own"
    if handles_tensors(node) and not SHAPE.search(text):
        return "no shape"
    return None


def complaints(source: str) -> dict[str, str]:
    """Complaint by public name of a module, methods as Class.method.

    `forward` is documented by its class, where the shapes are.
    """
    out = {}
    for node in definitions(ast.parse(source).body):
        out[node.name] = complaint(node)
        if isinstance(node, ast.ClassDef):
            for method in definitions(node.body):
                if method.name != "forward":
                    out[f"{node.name}.{method.name}"] = complaint(method)
    return {name: problem for name, problem in out.items() if problem is not None}


def public_objects(module: ModuleType) -> set[str]:
    """Public functions and classes that a module defines, as Python sees them."""
    own = {
        name
        for name, value in vars(module).items()
        if callable(value) and getattr(value, "__module__", None) == module.__name__
    }
    return {name for name in own if not name.startswith("_")}


@pytest.mark.parametrize("name", MODULES)
def test_every_public_name_of_the_desk_is_documented(name):
    source = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    assert complaints(source) == {}


@pytest.mark.parametrize("name", MODULES)
def test_no_public_name_is_overlooked(name):
    source = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    seen = {node.name for node in definitions(ast.parse(source).body)}
    assert seen == public_objects(importlib.import_module(f"distillbench.{name}"))


PLANTED = [
    ("def f(n: int) -> int:\n    return n", {"f": "no docstring"}),
    ("class C:\n    pass", {"C": "no docstring"}),
    (
        'class C:\n    """C."""\n    @property\n    def p(self) -> int:\n        return 1',
        {"C.p": "no docstring"},
    ),
    ('def f(t: Tensor) -> None:\n    """A time in [0, 1]."""', {"f": "no shape"}),
    ('def f(*, t: Tensor | None = None) -> None:\n    """A time."""', {"f": "no shape"}),
    ('def f() -> tuple[Tensor, ...]:\n    """Many times."""', {"f": "no shape"}),
    ('class C:\n    """A batch."""\n    x: dict[str, Tensor]', {"C": "no shape"}),
    (
        'class C(nn.Module):\n    """A net."""\n    def forward(self, x: Tensor): ...',
        {"C": "no shape"},
    ),
    (
        'def f() -> None:\n    """A sentence that\n    goes on."""',
        {"f": "the first line is no sentence of its own"},
    ),
]
FINE = [
    "def _f(t: Tensor): ...",
    'def f(t: Tensor) -> Tensor:\n    """t [B] in [0, 1], float32."""',
    'def f(x: Tensor) -> Tensor:\n    """A mean.\n\n    x: [..., width]."""',
    'class C(nn.Module):\n    """[B, D] -> [B]."""\n    def forward(self, x: Tensor): ...',
]


@pytest.mark.parametrize(("source", "expected"), PLANTED)
def test_planted_gaps_are_found(source, expected):
    assert complaints(source) == expected


@pytest.mark.parametrize("source", FINE)
def test_documented_names_pass(source):
    assert complaints(source) == {}
