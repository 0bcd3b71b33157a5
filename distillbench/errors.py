"""Exceptions: mistakes a user can mend (one line, exit code 2), and how a method's cell may end."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input. The message names the file, the key and the remedy."""


class Refused(Exception):
    """A method cannot run on this benchmark; its row says REFUSED.

    Raised with the reason from `needs` or `__init__` of the method.
    """


class Diverged(Exception):
    """A loss, a gradient, a logged scalar or a sample is not finite."""


class OverBudget(Exception):
    """The budget does not buy one cycle."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Text that helps after an unknown `name`: the nearest known one, or all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"did you mean '{close[0]}'?"
    return f"known: {', '.join(names) or 'none'}"
