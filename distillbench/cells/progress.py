"""Progress with ETA: bars on a terminal; elsewhere, or where jobs share one, lines now and then.

Imports no torch.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from distillbench.cells.environment import LINES

Report = Callable[[str, int, int], None]  # (what, done, total)
SECONDS_BETWEEN_LINES = 10


def reporter(label: str) -> Report:
    """`report(what, done, total)` for one cell."""
    bars = sys.stderr.isatty() and LINES not in os.environ
    shown: Report = _Bars(label) if bars else _Lines(label)

    def report(what: str, done: int, total: int) -> None:
        with suppress(OSError):  # a terminal that is gone is no reason to stop
            shown(what, done, total)

    return report


def silent(_what: str, _done: int, _total: int) -> None:
    """A `Report` that prints nothing."""


def say(text: str) -> None:
    """Print a line to stderr; a terminal that is gone is no error."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


class _Lines:
    """A report as lines on stderr, SECONDS_BETWEEN_LINES apart."""

    def __init__(self, label: str):
        self.label = label
        self.what = ""  # that is in progress
        self.since = 0.0  # when that began
        self.first = 0  # what was done of it then
        self.printed = time.monotonic()  # when the last line was

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if what != self.what:
            self.what = what
            self.since = now
            self.first = done
        if now - self.printed >= SECONDS_BETWEEN_LINES and done > self.first:
            left = (now - self.since) * (total - done) / (done - self.first)
            line = f"{self.label}: {what} {done / total:4.0%}, {left:.0f} s left"
            print(line, file=sys.stderr, flush=True)
            self.printed = now


class _Bars:
    """A report as a bar for each thing that is in progress."""

    def __init__(self, label: str):
        self.label = label
        self.tasks: dict[str, TaskID] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        if what not in self.tasks:
            self.tasks[what] = _display().add_task(f"{self.label}: {what}", total=total)
        _display().update(self.tasks[what], completed=done)


@lru_cache
def _display() -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f}%"),
        TimeRemainingColumn(),
    )
    display = Progress(*columns, console=Console(stderr=True))
    display.start()
    return display


def stop() -> None:
    """Leave the terminal as it was."""
    if _display.cache_info().currsize:
        with suppress(OSError):
            _display().stop()
