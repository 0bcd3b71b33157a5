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
FOLDERS = ("eval.features.", "eval.metrics.")
# Modules in these folders that decide no number: they find weights, keep features, name the
# evaluation. An extractor of image scale counts where it is used.
NOT_NUMERICAL = (
    "eval.features.inception",
    "eval.features.weights",
    "eval.metrics.key",
    "eval.metrics.reference",
)
KEY_DIGITS = 12


def followed(module: str) -> Path | None:
    """File of a module whose code is part of the key, else None."""
    if not module.startswith(FOLDERS) or module in NOT_NUMERICAL:
        return None
    return EVAL.joinpath(*module.split(".")[1:]).with_suffix(".py")


@lru_cache
def evaluation_key(*extractors: str | None) -> str:
    """12 hexadecimal digits: hash of the evaluation's code and of its extractors.

    Of an extractor count name and weights, and at image scale its code; the main one comes first,
    None stands for no extractor. Raises ValueError where one is not known or its weights are not
    there.
    """
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
        key = json.loads(metrics.read_text(encoding="utf-8"))["evaluation"]["key"]
    except (OSError, ValueError, TypeError, KeyError):
        return False
    return key == evaluation_key(*extractors)
