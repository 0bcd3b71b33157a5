"""Hashes of bytes, of JSON values, and of code: what keys of cells and of evaluations stand on.

`code_hash` is a hash of what code does and not of how it is written. It sees the abstract syntax of
a module without comments, docstrings, annotations of functions and variables, imports and `pass`;
a name that was imported stands for what it names: from a module that is followed, for that module's
own hash, so that a renamed or moved module changes nothing; from any other package for its dotted
name. Annotations in the body of a class are kept: pydantic and dataclasses execute them.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

DIGITS = 16  # hexadecimal, of SHA-256
OURS = ("distillbench", "eval")  # packages whose own paths are no part of a hash
SKIPPED_FIELDS = ("ctx", "kind", "type_comment", "type_params", "returns", "annotation")

# File of a module, given its dotted name, where its code is part of a hash; None where it is not.
Follow = Callable[[str], Path | None]


def digest(data: bytes) -> str:
    """16 hexadecimal digits of SHA-256."""
    return hashlib.sha256(data).hexdigest()[:DIGITS]


def canonical(value: Any) -> bytes:
    """One byte string per JSON value, whatever the order of its keys."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def code_hash(path: Path, follow: Follow) -> str:
    """Hash of the code of a module and of all modules that it imports and `follow` finds.

    A module is read again when its file has changed, the modules behind it once for each process.
    Raises OSError where a file cannot be read, SyntaxError where it is not Python, ValueError on an
    import that is relative, or of all names, or of a module of ours by its dotted name alone.
    """
    about = path.stat()
    return _code_hash(path, follow, (about.st_mtime_ns, about.st_size, about.st_ino))


@lru_cache(maxsize=1024)
def _code_hash(path: Path, follow: Follow, _state: tuple[int, ...]) -> str:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imported = _Imported(follow)
    imported.visit(tree)
    return digest(canonical(_Normaliser(imported).dump(tree)))


class _Imported(ast.NodeVisitor):
    """What the imported names of a module stand for.

    names: local name -> name of what it names; modules: local name -> hash of a module of ours, or
    None where that is not followed.
    """

    def __init__(self, follow: Follow):
        self.follow = follow
        self.names: dict[str, str] = {}
        self.modules: dict[str, str | None] = {}

    def visit_If(self, node: ast.If) -> None:
        if _is_type_checking(node):
            for statement in node.orelse:
                self.visit(statement)
        else:
            self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            local = alias.asname or alias.name.partition(".")[0]
            if alias.name.partition(".")[0] not in OURS:
                self.bind(local, alias.name if alias.asname else local)
            elif alias.asname:
                self.modules[local] = self.hash_of(alias.name)
            else:
                raise ValueError(f"import {alias.name}: write `from ... import ...`")

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        package = node.module or ""
        if node.level or any(alias.name == "*" for alias in node.names):
            raise ValueError(f"from {package} import: name the module and what is imported")
        for alias in node.names:
            local = alias.asname or alias.name
            if package.partition(".")[0] not in OURS:
                self.bind(local, f"{package}.{alias.name}")
            elif _is_module(package, alias.name):
                self.modules[local] = self.hash_of(f"{package}.{alias.name}")
            else:
                self.bind(local, _qualified(self.hash_of(package), alias.name))

    def bind(self, local: str, target: str) -> None:
        """Note what a name stands for; of several things, in several functions, all in order."""
        known = self.names.get(local)
        self.names[local] = target if known in (None, target) else f"{known}|{target}"

    def hash_of(self, module: str) -> str | None:
        """Hash of a module of ours, None where it is not followed."""
        file = self.follow(module)
        return None if file is None else code_hash(file, self.follow)


def _qualified(module: str | None, name: str) -> str:
    return name if module is None else f"{module}.{name}"


def _is_module(package: str, name: str) -> bool:
    """Whether `name` is a module or a package in a package of ours."""
    folder = Path(__file__).parents[1].joinpath(*package.split("."))
    return (folder / f"{name}.py").is_file() or (folder / name / "__init__.py").is_file()


class _Normaliser:
    """Turns a syntax tree into nested lists that are the same on every version of Python."""

    def __init__(self, imported: _Imported):
        self.imported = imported

    def dump(self, node: object, in_class: bool = False) -> Any:
        """A node, a list of nodes or a plain value as JSON; `in_class`: of a class's body."""
        if isinstance(node, list):
            return [self.dump(item, in_class) for item in node if not _is_silent(item, in_class)]
        if isinstance(node, ast.Name) and node.id in self.imported.modules:
            return ["Name", self.imported.modules[node.id] or node.id]
        if isinstance(node, ast.Name):
            return ["Name", self.imported.names.get(node.id, node.id)]
        if isinstance(node, ast.Attribute) and _name(node.value) in self.imported.modules:
            return ["Name", _qualified(self.imported.modules[_name(node.value)], node.attr)]
        if isinstance(node, ast.Attribute):
            value = self.dump(node.value)
            if self._is_imported(node.value):  # math.pi, and pi that was imported from math
                return ["Name", f"{value[1]}.{node.attr}"]
            return ["Attribute", value, node.attr]
        if isinstance(node, ast.Constant):
            return ["Constant", type(node.value).__name__, repr(node.value)]
        if isinstance(node, ast.JoinedStr):
            return ["JoinedStr", _merged([self.dump(part) for part in node.values])]
        if isinstance(node, ast.AnnAssign) and not in_class:
            return [
                "Assign",
                [["targets", [self.dump(node.target)]], ["value", self.dump(node.value)]],
            ]
        if isinstance(node, ast.AnnAssign):
            return [*self._fields(node), self.dump(node.annotation)]
        if isinstance(node, ast.AST):
            return [type(node).__name__, self._fields(node)]
        return node

    def _is_imported(self, node: ast.expr) -> bool:
        """Whether it is a dotted name that begins with an imported one."""
        while isinstance(node, ast.Attribute):
            node = node.value
        return _name(node) in self.imported.names

    def _fields(self, node: ast.AST) -> list[Any]:
        out = []
        for name, value in ast.iter_fields(node):
            if name not in SKIPPED_FIELDS and value is not None and value != []:
                in_class = name == "body" and isinstance(node, ast.ClassDef)
                out.append([name, self.dump(value, in_class)])
        return out


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else ""


def _is_silent(node: object, in_class: bool) -> bool:
    """Whether a statement computes nothing: docstrings, imports, `pass`, types of variables."""
    if isinstance(node, (ast.Import, ast.ImportFrom, ast.Pass)):
        return True
    if isinstance(node, ast.If):
        return _is_type_checking(node) and not node.orelse
    if isinstance(node, ast.AnnAssign):
        return node.value is None and not in_class
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return isinstance(node.value.value, str)
    return False


def _is_type_checking(node: ast.If) -> bool:
    return _name(node.test) == "TYPE_CHECKING"


def _merged(parts: list[Any]) -> list[Any]:
    """Parts of an f-string, adjacent constants joined: versions of Python cut them differently."""
    out: list[Any] = []
    for part in parts:
        follows_constant = bool(out) and out[-1][0] == "Constant"
        if part == ["Constant", "str", "''"]:
            continue
        if part[0] == "Constant" and follows_constant:
            joined = ast.literal_eval(out[-1][2]) + ast.literal_eval(part[2])
            out[-1] = ["Constant", "str", repr(joined)]
        else:
            out.append(part)
    return out
