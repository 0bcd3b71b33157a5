"""Text and numbers as every report prints them: tables, units, rounding, bytes of JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from eval.catalogue import MISSING

Write = Callable[[Path, bytes], None]  # puts bytes into a file, or compares them with it


def table(head: Sequence[str], body: Sequence[Sequence[Any]]) -> str:
    """A table in GitHub's Markdown; short lines are filled with empty cells."""
    lines = [[*line, *[""] * (len(head) - len(line))] for line in body]
    return tabulate(lines, head, "github", disable_numparse=True)


def escaped(words: str) -> str:
    """Text for a cell of a table."""
    return words.replace("|", "\\|")


def millions(value: float | None, missing: str = MISSING) -> str:
    """A count as `1.23M`."""
    return missing if value is None else f"{value / 1e6:.2f}M"


def tera(value: float | None, missing: str = MISSING) -> str:
    """FLOPs in units of 10^12, without the unit."""
    return missing if value is None else f"{value / 1e12:.2f}"


def fixed(value: float | None, digits: int) -> str:
    """A number with so many digits after the point."""
    return MISSING if value is None else f"{value:.{digits}f}"


def nfe_words(values: Sequence[int], headline: int) -> str:
    """Numbers of network evaluations, the headline in bold."""
    return ", ".join(f"**{n}**" if n == headline else str(n) for n in values)


def significant(value: float, digits: int = 6) -> float:
    """A number rounded to significant digits."""
    return float(f"{value:.{digits}g}")


def rounded(value: Any, digits: int) -> Any:
    """A JSON value with floats of so many significant digits; None for floats not finite."""
    if isinstance(value, dict):
        return {str(key): rounded(part, digits) for key, part in value.items()}
    if isinstance(value, list):
        return [rounded(part, digits) for part in value]
    if isinstance(value, float):
        return significant(value, digits) if math.isfinite(value) else None
    return value


def json_bytes(content: Any) -> bytes:
    """A twin of a table, as every .json under results is laid out."""
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()
