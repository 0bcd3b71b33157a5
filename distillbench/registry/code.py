"""Which code determines a cell's numbers: its method's, the runner's, and that of its data's kind.

Only the mathematics is followed: the author's desk, networks, data, teachers. What reads settings,
keeps records, reports or watches determines no number, and what is configured stands resolved in a
cell's recipe. Imports no torch.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from distillbench.hashing import canonical, code_hash, digest

PACKAGE = Path(__file__).parents[1]
# Modules at the desk that determine no number, or whose values a recipe holds resolved.
NOT_FOLLOWED = ("config", "errors", "hashing", "reading")
FOLDERS = ("networks", "data", "teachers")
# What trains and samples a cell; what watches it and writes its record is not among them.
RUNNER = (
    "cells/build.py",
    "cells/loop.py",
    "cells/sampling.py",
    "cells/setup.py",
    "cells/steps.py",
)
# Modules that a cell runs only where its benchmark names this kind of data, beside data/<kind>.py.
BESIDE = {"mixture": ("teachers/exact.py",)}
# Modules that know all kinds, and that the runner imports for the one that it needs.
OF_ALL_KINDS = ("data/kinds.py", "data/digits.py", "data/mixture.py", "teachers/exact.py")


def followed(module: str) -> Path | None:
    """File of a module whose code is part of the keys of the cells that import it, else None."""
    top, *inner = module.split(".")
    if top != "distillbench" or not inner:
        return None
    file = PACKAGE.joinpath(*inner).with_suffix(".py")
    if not file.is_file():
        return None
    at_desk = len(inner) == 1 and inner[0] not in NOT_FOLLOWED
    in_runner = file.relative_to(PACKAGE).as_posix() in RUNNER
    return file if at_desk or inner[0] in FOLDERS or in_runner else None


def followed_by_runner(module: str) -> Path | None:
    """The same for imports of the runner, which hold the kinds of data that others use."""
    file = followed(module)
    if file is None or file.relative_to(PACKAGE).as_posix() in OF_ALL_KINDS:
        return None
    return file


def hash_of(file: Path) -> str:
    """Hash of a module's code and of all that it imports and that determines numbers."""
    return code_hash(file, followed)


@lru_cache
def runner_hash(kind: str, *more: str) -> str:
    """Hash of the runner's code, of data of this kind, and of `more` files of the package."""
    own = (*RUNNER, *more)
    hashes = [code_hash(PACKAGE / file, followed_by_runner) for file in own]
    hashes += [hash_of(PACKAGE / file) for file in (f"data/{kind}.py", *BESIDE.get(kind, ()))]
    return digest(canonical(hashes))
