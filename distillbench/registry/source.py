"""What a method's folder says without being run: its imports, and the code that its README points
at."""

from __future__ import annotations

import ast
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

# `file.py:function` or `file.py:Class.method` in a README.
TARGET = re.compile(r"`([\w/.-]+\.py):([\w.]+)`")
# What a method may import of distillbench: mathematics and the contract. Data come in its batches.
ALLOWED = frozenset(
    (
        "adversarial",
        "errors",
        "flowmaps",
        "jvp",
        "matching",
        "method",
        "networks",
        "paths",
        "players",
        "samplers",
        "seeds",
        "teachers",
        "times",
    )
)
FORBIDDEN = {
    "eval": "the evaluation is not a method's business",
    "sklearn": "data come in batch.x, if `needs` asks for them",
    "safetensors": "weights come from task.network",
    "importlib": "imports are written as such",
    "methods": "methods know nothing of each other: what two share is a function in distillbench",
}


def imports(path: Path) -> list[tuple[int, str]]:
    """(line, module) of every import in a file, at any depth; relative ones begin with a dot."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            found.append((node.lineno, "." * node.level + (node.module or "")))
        elif isinstance(node, ast.ImportFrom):
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.Name) and node.id == "__import__":
            found.append((node.lineno, "importlib"))
    return found


def forbidden(path: Path, siblings: set[str]) -> list[tuple[int, str, str]]:
    """(line, module, why) of every import that a method may not have.

    siblings: names of the other methods.
    """
    found = []
    for line, name in imports(path):
        why = _why_forbidden(name, siblings)
        if why is not None:
            found.append((line, name, why))
    return found


def _why_forbidden(name: str, siblings: set[str]) -> str | None:
    if name.startswith("."):
        return "a method is one file"
    parts = name.split(".")
    if parts[0] in FORBIDDEN:
        return FORBIDDEN[parts[0]]
    if parts[0] == "distillbench" and (len(parts) < 2 or parts[1] not in ALLOWED):
        return f"a method uses of distillbench: {', '.join(sorted(ALLOWED))}"
    if siblings & {parts[0], parts[0].removeprefix("distillbench_method_")}:
        return FORBIDDEN["methods"]
    return None


def defined(path: Path) -> set[str]:
    """Functions, classes and methods that a file defines: f, C, C.f."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef):
                    names.add(f"{node.name}.{inner.name}")
    return names


def targets(page: Path) -> list[str]:
    """Every `file.py:name` of a README."""
    found = TARGET.findall(page.read_text(encoding="utf-8"))
    return [f"{file}:{name}" for file, name in found]


def unresolved(page: Path, root: Path) -> list[str]:
    """Targets of a README that do not exist.

    Their files are looked for from the root of the checkout and from the README's own folder.
    """
    missing = []
    for target in targets(page):
        file, _, name = target.partition(":")
        there = [path for path in (root / file, page.parent / file) if path.is_file()]
        if not there or name not in defined(there[0]):
            missing.append(target)
    return missing


def literals(text: str) -> dict[str, Any]:
    """Literals that a module's text assigns to names, read without running it."""
    found = {}
    for statement in ast.parse(text).body:
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            with suppress(ValueError):
                found[statement.targets[0].id] = ast.literal_eval(statement.value)
    return found
