"""`distillbench new`: a method folder that works, with marked places for what is new. Imports no
torch."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path
from typing import Annotated

import typer

from distillbench import config
from distillbench.cells.disk import make_folder, write_atomically
from distillbench.errors import UserError
from distillbench.registry import folders
from distillbench.registry.folders import RESERVED

TEMPLATE = Path(__file__).parents[1] / "template"
FILES = ("method.py", "config.yaml", "claims.yaml", "README.md")


def new(
    target: Annotated[str, typer.Argument(help="name of the method, or a path that ends in it")],
) -> None:
    """Write a method that works, with places marked for your idea: methods/NAME, or the folder at a
    path.

    docs/adding-a-method.md walks through the rest.
    """
    path, name = write_folder(target)
    checked = path if "/" in target else name
    print(f"{path} written: look for YOUR IDEA in method.py, then `distillbench check {checked}`")
    if name not in folders.discover():
        place = os.path.relpath(path, config.root())
        print(f"for the tables to find it, add it to distillbench.yaml: method_paths: [{place}]")


def write_folder(target: str) -> tuple[Path, str]:
    """Write the template for a name (into methods/) or at a path; returns folder and name.

    Raises UserError where the name is none for a method, or is taken.
    """
    root = config.root()
    path = root / "methods" / target if "/" not in target else Path(target).resolve()
    name = path.name
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise UserError(
            f"new {target}: '{name}' names a folder and appears in tables: use small letters, "
            "digits and _, e.g. my_method"
        )
    if path.exists():
        raise UserError(f"new {target}: {path} is there already: choose another name, or remove it")
    if name in RESERVED or name in folders.discover() or importlib.util.find_spec(name) is not None:
        raise UserError(f"new {target}: the method name '{name}' is taken: choose another name")
    inside = path.is_relative_to(root)
    words = {
        "methods/template/": f"{path.relative_to(root)}/" if inside else "",
        "TEMPLATE": name.upper().replace("_", "-"),
        "Template": "".join(part.capitalize() for part in name.split("_")),
        "template": name,
    }
    make_folder(path)
    for file in FILES:
        text = (TEMPLATE / file).read_text(encoding="utf-8")
        if not inside:  # editors find the schemas in a checkout only
            text = re.sub(r"# yaml-language-server: .*\n", "", text)
        write_atomically(path / file, with_words(text, words).encode())
    return path, name


def with_words(text: str, words: dict[str, str]) -> str:
    """A text whose words are replaced at once, so that no replacement is replaced again."""

    def word(found: re.Match[str]) -> str:
        return words[found[0]]

    return re.sub("|".join(words), word, text)
