"""The one exception for mistakes a user can mend: it becomes one clear line and exit code 2, never a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input. The message names the file, the key and the remedy."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Text that helps after an unknown `name`: the nearest known one, or all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(known) or 'none'}"
