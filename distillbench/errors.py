"""Exceptions: mistakes a user can mend (one clear line, exit code 2), and the ways a method's cell may end."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input. The message names the file, the key and the remedy."""


class Refused(Exception):
    """A method cannot run on this benchmark: raise it with the reason from `needs` or `__init__`; the row says REFUSED."""


class Diverged(Exception):
    """A loss, a gradient, a logged scalar or a sample is not finite."""


class OverBudget(Exception):
    """The budget does not buy one cycle."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Text that helps after an unknown `name`: the nearest known one, or all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(known) or 'none'}"
