"""What a method's folder says without being run: its imports, and the code that its README points at."""

from __future__ import annotations

import ast
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

TARGET = re.compile(
    r"`([\w/.-]+\.py):([\w.]+)`"
)  # `file.py:function` or `file.py:Class.method` in a README
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
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, a.name) for a in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            found.append((node.lineno, "." * node.level + (node.module or "")))
        elif isinstance(node, ast.ImportFrom):
            found += [(node.lineno, f"{node.module}.{a.name}") for a in node.names]
        elif isinstance(node, ast.Name) and node.id == "__import__":
            found.append((node.lineno, "importlib"))
    return found


def forbidden(path: Path, siblings: set[str]) -> list[tuple[int, str, str]]:
    """(line, module, why) of every import that a method may not have; `siblings` are the names of the other methods."""
    out = []
    for line, name in imports(path):
        parts = name.split(".")
        if name.startswith("."):
            out.append((line, name, "a method is one file"))
        elif parts[0] in FORBIDDEN:
            out.append((line, name, FORBIDDEN[parts[0]]))
        elif parts[0] == "distillbench" and (len(parts) < 2 or parts[1] not in ALLOWED):
            out.append((line, name, f"a method uses of distillbench: {', '.join(sorted(ALLOWED))}"))
        elif siblings & {parts[0], parts[0].removeprefix("distillbench_method_")}:
            out.append((line, name, FORBIDDEN["methods"]))
    return out


def defined(path: Path) -> set[str]:
    """Functions, classes and methods of a file: f, C, C.f."""
    out = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            out.add(node.name)
        if isinstance(node, ast.ClassDef):
            out |= {f"{node.name}.{n.name}" for n in node.body if isinstance(n, ast.FunctionDef)}
    return out


def targets(page: Path) -> list[str]:
    """Every `file.py:name` of a README."""
    return [f"{file}:{name}" for file, name in TARGET.findall(page.read_text())]


def unresolved(page: Path, root: Path) -> list[str]:
    """Those that do not exist, looked for from the root of the checkout and from the README's own folder."""
    out = []
    for target in targets(page):
        file, _, name = target.partition(":")
        found = next((p for p in (root / file, page.parent / file) if p.is_file()), None)
        if found is None or name not in defined(found):
            out.append(target)
    return out


def literals(text: str) -> dict[str, Any]:
    """Literals that a module's text assigns to names, read without running it."""
    out = {}
    for line in ast.parse(text).body:
        if isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Name):
            with suppress(ValueError):
                out[line.targets[0].id] = ast.literal_eval(line.value)
    return out
