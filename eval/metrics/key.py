"""The key of an evaluation: a hash of the code and the extractors behind a metrics.json.

A metrics.json that names another key is of another evaluation, and is made again. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from pathlib import Path

from distillbench.hashing import code_hash
from eval.features.weights import IMAGE_SCALE, weight_file

EVAL = Path(__file__).parents[1]
# Modules that decide a number; what reads weights and samples, or keeps features, decides none.
NUMERICAL = (
    "eval.features.extractors",
    "eval.metrics.conditional",
    "eval.metrics.evaluate",
    "eval.metrics.fixed_rows",
    "eval.metrics.mixtures",
    "eval.metrics.pairwise",
    "eval.metrics.scores",
)
KEY_DIGITS = 12


def followed(module: str) -> Path | None:
    """File of a module whose code is part of the key, else None."""
    if module not in NUMERICAL:
        return None
    return EVAL.joinpath(*module.split(".")[1:]).with_suffix(".py")


@lru_cache
def evaluation_key(*extractors: str | None) -> str:
    """Hash of the evaluation's code and of name and weights of these extractors, the main one
    first; ValueError where one is not known or its weights are not there."""
    parts = [code_hash(EVAL / "metrics/evaluate.py", followed)]
    for name in extractors:
        if name is None:
            continue
        weights = hashlib.sha256(weight_file(name).read_bytes()).hexdigest()
        parts += [name, weights]  # by name too: one file serves two preprocessings
        if name in IMAGE_SCALE:
            parts.append(code_hash(EVAL / "features/inception.py", followed))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:KEY_DIGITS]


def is_evaluated(metrics: Path, *extractors: str | None) -> bool:
    """Whether a metrics.json stands, whole, and was made by this evaluation and extractors."""
    try:
        key = json.loads(metrics.read_text())["evaluation"]["key"]
    except (OSError, ValueError, TypeError, KeyError):
        return False
    return key == evaluation_key(*extractors)
