"""Progress with ETA: bars on a terminal, a line every few seconds elsewhere or where jobs share the terminal."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from distillbench.cells.environment import LINES

Report = Callable[[str, int, int], None]  # (what, done, total)
SECONDS_BETWEEN_LINES = 10


def reporter(label: str) -> Report:
    """`report(what, done, total)` for one cell."""
    shown = _bars(label) if sys.stderr.isatty() and LINES not in os.environ else _lines(label)

    def report(what: str, done: int, total: int) -> None:
        with suppress(OSError):  # a terminal that is gone is no reason to stop
            shown(what, done, total)

    return report


def silent(_what: str, _done: int, _total: int) -> None:
    """A report that nobody watches."""


def say(text: str) -> None:
    """A line for whoever still listens."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def _lines(label: str) -> Report:
    what_now, since, first, said = "", 0.0, 0, time.monotonic()

    def report(what: str, done: int, total: int) -> None:
        nonlocal what_now, since, first, said
        now = time.monotonic()
        if what != what_now:
            what_now, since, first = what, now, done
        if now - said >= SECONDS_BETWEEN_LINES and done > first:
            left = (now - since) * (total - done) / (done - first)
            print(
                f"{label}: {what} {done / total:4.0%}, {left:.0f} s left",
                file=sys.stderr,
                flush=True,
            )
            said = now

    return report


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


def _bars(label: str) -> Report:
    tasks: dict[str, object] = {}

    def report(what: str, done: int, total: int) -> None:
        if what not in tasks:
            tasks[what] = _display().add_task(f"{label}: {what}", total=total)
        _display().update(tasks[what], completed=done)  # type: ignore[arg-type]

    return report


def stop() -> None:
    """Leave the terminal as it was."""
    if _display.cache_info().currsize:
        with suppress(OSError):
            _display().stop()
