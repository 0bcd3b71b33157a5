"""The proof that claims were frozen first: what stood in the commits that runs record.

`frozen.json`, among an audit's published records, is

    commit -> {"claims": {id: hash}, "seeds": [...]}
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from distillbench.cells.provenance import git
from distillbench.errors import UserError
from distillbench.reading import LOADER
from distillbench.registry.claims import Claim
from distillbench.registry.source import literals

FROZEN = "frozen.json"
# Where the default margins stood, the latest place first.
MARGINS = ("distillbench/registry/claims.py", "distillbench/claims.py")
Frozen = dict[str, dict[str, Any]]


def frozen(commits: set[str], table: str) -> Frozen:
    """Claims and seeds of the audit `table` as they stood in commits that git knows."""
    out: Frozen = {}
    for commit in sorted(commits):
        files = git("ls-tree", "-r", "--name-only", commit).splitlines()
        if not files:
            continue
        standing = [file for file in MARGINS if file in files]
        margins = literals(git("show", f"{commit}:{standing[0]}")) if standing else {}
        claims: dict[str, str] = {}
        for file in files:
            if file.startswith("methods/") and file.endswith("/claims.yaml"):
                claims |= claim_hashes(git("show", f"{commit}:{file}"), margins)
        then = _yaml(git("show", f"{commit}:workflows/tables/{table}.yaml"))
        out[commit] = {"claims": claims, "seeds": then.get("seeds") or []}
    return out


def claim_hashes(text: str, margins: dict[str, Any]) -> dict[str, str]:
    """Hash of every claim in a claims.yaml by its id; claims of an older schema are left out."""
    found = {}
    for written in _yaml(text).get("claims", []):
        with suppress(ValidationError):
            claim = Claim.model_validate(written)
            found[claim.id] = claim.hash(margins)
    return found


def _yaml(text: str) -> dict[str, Any]:
    return yaml.load(text, LOADER) or {}


def read_frozen(folder: Path) -> Frozen:
    """What `frozen` said when the records were published; UserError where the file is damaged."""
    path = folder / FROZEN
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text())
    except ValueError:
        raise UserError(
            f"{path}: not valid JSON: take it from git again, or publish the audit anew"
        ) from None
