"""`distillbench new`: a method folder that works, with marked places for what is new. Imports no torch."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from distillbench import config
from distillbench.cells.disk import make_folder, write_atomically
from distillbench.errors import UserError
from distillbench.registry import folders
from distillbench.registry.folders import RESERVED

TEMPLATE = Path(__file__).parents[1] / "template"
FILES = ("method.py", "config.yaml", "claims.yaml", "README.md")


def write_folder(target: str) -> tuple[Path, str]:
    """Write the template for a name (into methods/) or a path; returns the folder and how its code is named in its README."""
    root = config.root()
    path = root / "methods" / target if "/" not in target else Path(target).resolve()
    name = path.name
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise UserError(
            f"new {target}: '{name}' names a folder and appears in tables: use small letters, digits and _, e.g. my_method"
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
        text = (TEMPLATE / file).read_text()
        if not inside:  # editors find the schemas in a checkout only
            text = re.sub(r"# yaml-language-server: .*\n", "", text)
        text = re.sub("|".join(words), lambda found: words[found[0]], text)
        write_atomically(path / file, text.encode())
    return path, name
