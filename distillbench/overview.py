"""How far cells are and what happened in one: the words of `distillbench status` and `distillbench logs`. Imports no torch."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from distillbench import config, journal, registry
from distillbench.cell import Cell, hardware, is_locked, read_record
from distillbench.errors import UserError, nearest
from distillbench.plan import Job

COLOURS = {"done": "green", "trained": "green", "running": "yellow", "interrupted": "magenta", "waiting": "dim", "to do": "dim"}
LAST_STEPS, LAST_LINES = 8, 12  # that `logs` shows of train.jsonl and of traceback.txt


@dataclass(frozen=True)
class State:
    """`word`: done (and evaluated), trained, running, interrupted, waiting (for its teacher or start), to do, or the record's status."""

    word: str
    share: float = 0.0  # of its training steps, while it has no record
    left: float | None = None  # seconds of training, estimated from its own pace

    def __str__(self) -> str:
        if self.word == "running":
            if self.share == 0:
                return "starting"
            return "sampling" if self.share == 1 else f"{self.share:.0%}" + ("" if self.left is None else f" {duration(self.left)} left")
        if self.word == "interrupted":
            return f"interrupted at {self.share:.0%}"
        return self.word if self.word in COLOURS else self.word.upper().replace("_", " ")

    @property
    def text(self) -> Text:
        return Text(str(self), style=COLOURS.get(self.word, "red"))


def duration(seconds: float) -> str:
    """35 s, 12 min, 3.5 h."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def progress_of(folder: Path) -> State:
    """The state of a cell without a record, from its lock and its journal."""
    word, lines = ("running" if is_locked(folder / "lock") else "interrupted"), journal.read(folder)
    starts = [i for i, line in enumerate(lines) if "start" in line]
    if not starts:
        return State(word if word == "running" else "to do")
    start = lines[starts[-1]]
    done = max([start["start"], *(line.get("checkpoint", line.get("step", -1) + 1) for line in lines[starts[-1] + 1 :])])
    share, left = done / start["steps"], None
    if word == "running" and done > start["start"]:
        now, seen = time.time(), (folder / journal.NAME).stat().st_mtime
        left = max(0.0, (seen - start["time"]) * (start["steps"] - done) / (done - start["start"]) - (now - seen))
    return State(word, share, left)


def state_of(cell: Cell, evaluated: Callable[[Cell], bool]) -> State:
    """The state of a cell."""
    if (record := cell.result()) is not None:
        return State(record["status"] if record["status"] != "done" else "done" if evaluated(cell) else "trained")
    state = progress_of(cell.folder)
    if state.word == "to do" and any(c.result() is None for c in cell.needed):
        return State("waiting")
    return state


def matrix(jobs: list[Job], evaluated: Callable[[Cell], bool]) -> Group:
    """Rows benchmark/arm, columns seeds, and a line that sums it up."""
    states = [(cell, state_of(cell, evaluated)) for job in jobs for cell in job.cells]
    rows: dict[str, dict[int, State]] = defaultdict(dict)
    for cell, state in states:
        rows[f"{cell.benchmark.name}/{cell.arm_name}"][cell.seed] = state
    seeds = sorted({cell.seed for cell, _ in states})
    table = Table("", *(f"seed {seed}" for seed in seeds), box=None)
    for name, row in rows.items():
        table.add_row(name, *(row[seed].text if seed in row else "" for seed in seeds))
    return Group(table, Text(summary(states)))


def summary(states: list[tuple[Cell, State]]) -> str:
    """n of m cells done, how many only trained or failed, and about how long the rest takes."""
    finished = [s.word for c, s in states if c.result() is not None]
    done, trained = finished.count("done"), finished.count("trained")
    text = f"{done} of {len(states)} cells done" + (f", {trained} trained but not evaluated" if trained else "")
    if failed := len(finished) - done - trained:
        text += f", {failed} failed"
    rest = seconds_left(states)
    if not rest:
        return text
    known = [seconds for seconds in rest if seconds is not None]
    if len(known) < len(rest):
        return f"{text}, time left unknown until a first cell of each kind is done"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return f"{text}, about {duration(max(sum(known) / cores, *known))} left on {cores} cores"


def seconds_left(states: list[tuple[Cell, State]]) -> list[float | None]:
    """For every cell without a record: its own estimate; or what cells like it took on this machine, the arm's other seeds or
    (per FLOP of the budget) other arms of its benchmark; None where none has been done."""
    seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
    per_flop: dict[str, list[float]] = defaultdict(list)
    for cell, _ in states:
        record = cell.result()
        if record is not None and record["status"] == "done" and record["provenance"]["hardware"] == hardware():
            seconds[cell.benchmark.name, cell.arm_name].append(record["cost"]["seconds"])
            if cell.arm is not None:
                per_flop[cell.benchmark.name].append(
                    record["cost"]["seconds"] / (record["cost"]["flops"] - record["cost"].get("start", {}).get("flops", 0))
                )
    rest: list[float | None] = []
    for cell, state in states:
        if cell.result() is not None:
            continue
        b = cell.benchmark
        if state.left is not None:
            rest.append(state.left)
        elif same := seconds.get((b.name, cell.arm_name)):
            rest.append(mean(same) * (1 - state.share))
        elif cell.arm is not None and b.name in per_flop:
            rest.append(mean(per_flop[b.name]) * cell.own_budget * (1 - state.share))
        else:
            rest.append(None)
    return rest


def find(name: str) -> Path:
    """The folder of the cell `name`: benchmark/method[@variant]/seed, or a path; UserError offers the nearest name."""
    if (Path(name) / "lock").is_file():
        return Path(name).resolve()
    parts = name.rstrip("/").split("/")
    if len(parts) != 3:
        raise UserError(f"'{name}' is no cell: give benchmark/method/seed, e.g. digits/dmd/0, or the path of its folder")
    benchmark = config.benchmark(parts[0])
    arm = None if parts[1] == "teacher" else registry.arm(parts[1])
    seed = parts[2].removeprefix("seed").partition("-")[0]
    if not seed.isdecimal():
        raise UserError(f"'{name}': '{parts[2]}' is no seed, {nearest(parts[2], map(str, benchmark.seeds))}")
    folder = Cell(benchmark, arm, int(seed)).folder
    if not folder.is_dir():
        others = sorted(str(p.relative_to(config.root())) for p in folder.parent.glob(f"seed{seed}-*"))
        hint = f"; of other versions of its code or settings there are {', '.join(others)}" if others else ""
        raise UserError(f"{name}: nothing has happened yet in {folder.relative_to(config.root())}{hint}")
    return folder


def story(folder: Path) -> Group:
    """What happened in a cell: record, starts and deaths, last steps, traceback, files."""
    record = read_record(folder / "result.json")
    head = f"{folder.parent.parent.name}/{folder.parent.name}/{folder.name}: "
    if record is None:
        state = progress_of(folder)
        head += str(state) if state.word != "running" else f"running, {state}"
    else:
        head += record["status"].upper().replace("_", " ") if record["status"] != "done" else "done"
        head += f": {record['reason']}" if record["reason"] else ""
        head += f"; {record['cost']['seconds']:g} s"
        steps = record["cost"].get("steps")
        head += f", {steps} steps, {record['cost']['flops'] / 1e12:.3g} TFLOP" if steps else ""
    parts: list[Any] = [Text(head)]
    lines = journal.read(folder)
    for line in lines:
        if "start" in line:
            when = datetime.fromtimestamp(line["time"], UTC).isoformat(" ", "seconds").removesuffix("+00:00")
            parts.append(Text(f"start at step {line['start']} of {line['steps']}, {when} UTC"))
        elif "died" in line:
            parts.append(Text(f"died: {line['died']} {line['at']}"))
    steps = [line for line in lines if "step" in line][-LAST_STEPS:]
    if steps:
        columns = list(dict.fromkeys(key for line in steps for key in line))
        table = Table(*columns, box=None)
        for line in steps:
            table.add_row(*(f"{line[key]:g}" if key in line else "" for key in columns))
        parts.append(table)
    if (trace := folder / "traceback.txt").is_file():
        parts += [Text("traceback.txt:"), Text("\n".join(f"  {line}" for line in trace.read_text().splitlines()[-LAST_LINES:]))]
    parts += [Text(str(p)) for p in sorted(folder.iterdir()) if p.name != "lock"]
    return Group(*parts)
