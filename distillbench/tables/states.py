"""How far one cell is: from its record, its journal and its place in a cluster's queue. Imports no
torch."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.text import Text

from distillbench.cells import journal
from distillbench.cells.cell import Cell
from distillbench.cells.disk import is_locked
from distillbench.cluster.control import JobState
from distillbench.cluster.queue import SECONDS, Queued

# Colours of the words that are no failure; a failure is its record's status, in red.
COLOURS = {
    "done": "green",
    "trained": "green",
    "running": "yellow",
    "evaluating": "yellow",
    "interrupted": "magenta",
    "lost": "red",
    "queued": "dim",
    "waiting": "dim",
    "to do": "dim",
}


@dataclass(frozen=True)
class State:
    """How far a cell is, in one of the words of COLOURS or its record's status.

    done (and evaluated), trained, running, evaluating, interrupted, queued, lost (by a cluster),
    waiting (for its teacher or start), to do.
    """

    word: str
    share: float = 0.0  # of its training steps, while it has no record
    left: float | None = None  # seconds of training, estimated from its own pace
    pace: float | None = None  # steps per second
    why: str = ""  # queued: SLURM's reason; lost: what happened; running on a cluster: the nodes

    def __str__(self) -> str:
        if self.word == "running":
            return self._progress()
        if self.word == "interrupted":
            return f"interrupted at {self.share:.0%}"
        if self.word == "queued":
            return f"queued ({self.why})"
        return self.word if self.word in COLOURS else failure(self.word)

    def _progress(self) -> str:
        if self.share == 0:
            return "starting"
        if self.share == 1:
            return "sampling"
        left = "" if self.left is None else f" {duration(self.left)} left"
        return f"{self.share:.0%}{left}"

    @property
    def text(self) -> Text:
        """The state in its colour."""
        return Text(str(self), style=COLOURS.get(self.word, "red"))


def failure(status: str) -> str:
    """The status of a failed record as tables show it: OVER BUDGET."""
    return status.upper().replace("_", " ")


def duration(seconds: float) -> str:
    """35 s, 12 min, 3.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def progress_of(folder: Path, running: bool = False) -> State:
    """The state of a cell without a record, from its journal and its lock.

    running: whether it is known to run, so that its lock need not be looked at.
    """
    word = "running" if running or is_locked(folder / "lock") else "interrupted"
    lines = journal.read(folder)
    starts = [i for i, line in enumerate(lines) if "start" in line]
    if not starts:
        return State("running" if word == "running" else "to do")
    start = lines[starts[-1]]
    steps = start["steps"]
    done = steps_done(start, lines[starts[-1] + 1 :])
    if word == "interrupted" or done <= start["start"]:
        return State(word, done / steps)
    now = time.time()
    seen = (folder / journal.NAME).stat().st_mtime
    pace = (done - start["start"]) / max(seen - start["time"], 1e-3)
    left = max(0.0, (steps - done) / pace - (now - seen))
    return State(word, done / steps, left, pace)


def steps_done(start: dict[str, Any], lines: list[dict[str, Any]]) -> int:
    """Steps of training behind a cell, by the journal's lines since its latest start."""
    done = start["start"]
    for line in lines:
        if "checkpoint" in line:
            done = max(done, line["checkpoint"])
        elif "step" in line:
            done = max(done, line["step"] + 1)
    return done


def state_of(cell: Cell, evaluated: Callable[[Cell], bool], place: JobState | None = None) -> State:
    """The state of a cell; `place`: where its job on a cluster is."""
    place = place or JobState()
    queued = place.queued
    runs = queued is not None and queued.state == "RUNNING"
    record = cell.result()
    if record is not None:
        if record["status"] != "done" or evaluated(cell):
            return State(record["status"])
        return State("evaluating" if runs and place.evaluates else "trained", why=place.why)
    if queued is not None and runs:
        alive = is_locked(cell.folder / "lock") or is_current(cell, queued)
        return replace(progress_of(cell.folder, alive), why=queued.nodes)
    if queued is not None:
        why = queued.reason if queued.state == "PENDING" else queued.state.lower()
        return State("queued", why=why)
    if place.why:
        return State("lost", why=place.why)
    state = progress_of(cell.folder)
    if state.word == "to do" and any(needed.result() is None for needed in cell.needed):
        return State("waiting")
    return state


def is_current(cell: Cell, queued: Queued) -> bool:
    """Whether something was written to the cell's journal since its job began.

    A lock that another node holds may not be seen.
    """
    path = cell.folder / journal.NAME
    began = time.time() - elapsed_seconds(queued.elapsed) - SECONDS
    return path.is_file() and path.stat().st_mtime > began


def elapsed_seconds(text: str) -> int:
    """Seconds of squeue's [days-][hours:]minutes:seconds; a part that is no number counts as 0."""
    *days, clock = text.split("-")
    elapsed = int(days[0]) * 86400 if days else 0
    for part, unit in zip(reversed(clock.split(":")), (1, 60, 3600)):
        if part.isdecimal():
            elapsed += int(part) * unit
    return elapsed
