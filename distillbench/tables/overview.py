"""How far cells are and what happened in one: the words of `distillbench status` and `distillbench logs`. Imports no torch."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Group
from rich.table import Column, Table
from rich.text import Text

from distillbench import config
from distillbench.cells import journal
from distillbench.cells.cell import Cell, read_record
from distillbench.cells.disk import is_locked
from distillbench.cells.jobs import Job
from distillbench.cells.journal import NAME
from distillbench.cells.provenance import hardware
from distillbench.cluster import control
from distillbench.cluster.control import JobState
from distillbench.cluster.queue import SECONDS, Queued
from distillbench.errors import UserError, nearest
from distillbench.registry import folders, resources

COLOURS = {
    "done": "green",
    "trained": "green",
    "running": "yellow",
    "evaluating": "yellow",
    "interrupted": "magenta",
    "lost": "red",
}
COLOURS |= dict.fromkeys(("queued", "waiting", "to do"), "dim")
LAST_STEPS, LAST_LINES = 8, 12  # that `logs` shows of train.jsonl and of traceback.txt


@dataclass(frozen=True)
class State:
    """`word`: done (and evaluated), trained, running, evaluating, interrupted, queued, lost (by a cluster), waiting (for its teacher or
    start), to do, or the record's status."""

    word: str
    share: float = 0.0  # of its training steps, while it has no record
    left: float | None = None  # seconds of training, estimated from its own pace
    pace: float | None = None  # steps per second
    why: str = ""  # queued: SLURM's reason; lost: what happened; running on a cluster: the nodes

    def __str__(self) -> str:
        if self.word == "running":
            if self.share == 0:
                return "starting"
            return (
                "sampling"
                if self.share == 1
                else f"{self.share:.0%}"
                + ("" if self.left is None else f" {duration(self.left)} left")
            )
        if self.word == "interrupted":
            return f"interrupted at {self.share:.0%}"
        if self.word == "queued":
            return f"queued ({self.why})"
        return self.word if self.word in COLOURS else self.word.upper().replace("_", " ")

    @property
    def text(self) -> Text:
        return Text(str(self), style=COLOURS.get(self.word, "red"))


def duration(seconds: float) -> str:
    """35 s, 12 min, 3.5 h."""
    return (
        f"{seconds:.0f} s"
        if seconds < 100
        else f"{seconds / 60:.0f} min"
        if seconds < 5400
        else f"{seconds / 3600:.1f} h"
    )


def progress_of(folder: Path, running: bool = False) -> State:
    """The state of a cell without a record, from its lock (unless it is known to be running) and its journal."""
    word, lines = (
        ("running" if running or is_locked(folder / "lock") else "interrupted"),
        journal.read(folder),
    )
    starts = [i for i, line in enumerate(lines) if "start" in line]
    if not starts:
        return State(word if word == "running" else "to do")
    start = lines[starts[-1]]
    done = max(
        [
            start["start"],
            *(line.get("checkpoint", line.get("step", -1) + 1) for line in lines[starts[-1] + 1 :]),
        ]
    )
    share, left, pace = done / start["steps"], None, None
    if word == "running" and done > start["start"]:
        now, seen = time.time(), (folder / NAME).stat().st_mtime
        pace = (done - start["start"]) / max(seen - start["time"], 1e-3)
        left = max(0.0, (start["steps"] - done) / pace - (now - seen))
    return State(word, share, left, pace)


def state_of(cell: Cell, evaluated: Callable[[Cell], bool], place: JobState | None = None) -> State:
    """The state of a cell; `place`: where its job on a cluster is."""
    place = place or JobState()
    queued = place.queued
    if (record := cell.result()) is not None:
        if record["status"] != "done" or evaluated(cell):
            return State(record["status"])
        return State(
            "evaluating" if queued and queued.state == "RUNNING" and place.evaluates else "trained",
            why=place.why,
        )
    if queued is not None and queued.state == "RUNNING":
        return replace(
            progress_of(cell.folder, is_locked(cell.folder / "lock") or is_current(cell, queued)),
            why=queued.nodes,
        )
    if queued is not None:
        return State(
            "queued", why=queued.reason if queued.state == "PENDING" else queued.state.lower()
        )
    if place.why:
        return State("lost", why=place.why)
    state = progress_of(cell.folder)
    if state.word == "to do" and any(c.result() is None for c in cell.needed):
        return State("waiting")
    return state


def is_current(cell: Cell, queued: Queued) -> bool:
    """Something was written to the cell's journal since its job began: a lock of another node may not be seen."""
    *days, clock = queued.elapsed.split("-")
    elapsed = int(days[0]) * 86400 if days else 0
    for part, unit in zip(reversed(clock.split(":")), (1, 60, 3600)):
        elapsed += int(part) * unit if part.isdecimal() else 0
    path = cell.folder / NAME
    return path.is_file() and path.stat().st_mtime > time.time() - elapsed - SECONDS


def matrix(jobs: list[Job], evaluated: Callable[[Cell], bool]) -> Group:
    """Rows benchmark/arm, columns seeds, and a line that sums it up."""
    places = control.job_states(jobs)
    states = [
        (cell, state_of(cell, evaluated, places.get(cell.key)))
        for job in jobs
        for cell in job.cells
    ]
    rows: dict[str, dict[int, State]] = defaultdict(dict)
    for cell, state in states:
        rows[f"{cell.benchmark.name}/{cell.arm_name}"][cell.seed] = state
    seeds = sorted({cell.seed for cell, _ in states})
    table = Table(Column("", overflow="fold"), *(f"seed {seed}" for seed in seeds), box=None)
    for name, row in rows.items():
        table.add_row(name, *(row[seed].text if seed in row else "" for seed in seeds))
    lost = {
        f"{cell.benchmark.name}/{cell.arm_name}: {state.why}"
        for cell, state in states
        if state.word == "lost"
    }
    price = spent(jobs, states)
    return Group(
        table,
        *(Text(f"lost: {line}") for line in sorted(lost)),
        Text(summary(states)),
        *([Text(price)] if price else []),
    )


def details(jobs: list[Job], evaluated: Callable[[Cell], bool]) -> list[str]:
    """A line for each cell: state, reason, pace, seconds, where its job is, folder."""
    places, out = control.job_states(jobs), []
    for cell in (cell for job in jobs for cell in job.cells):
        place = places.get(cell.key) or JobState()
        result, state = cell.result() or {}, state_of(cell, evaluated, place)
        reason = f": {result['reason']}" if result.get("reason") else ""
        facts = [state.why] if state.why and state.word != "queued" else []
        facts += [f"{state.pace:.3g} steps/s"] if state.pace else []
        facts += [f"{result['cost']['seconds']:g} s"] if result else []
        facts += [f"job {place.queued.id}"] if place.queued else []
        out.append(
            f"{cell.label}: {state}{reason}{''.join(f', {fact}' for fact in facts)}  {cell.folder.relative_to(config.root())}"
        )
    return out


def spent(jobs: list[Job], states: list[tuple[Cell, State]]) -> str:
    """GPU-hours of the cells that ended, and about how many are left; '' where none asks for a GPU."""
    per_second = {cell.key: control.hours(job, 1.0)[0] for job in jobs for cell in job.cells}
    if not any(per_second.values()):
        return ""
    done = sum(
        per_second[c.key] * r["cost"]["seconds"] for c, _ in states if (r := c.result()) is not None
    )
    open_ = [c for c, _ in states if c.result() is None]
    rest = [
        None if s is None else s * per_second[c.key] for c, s in zip(open_, seconds_left(states))
    ]
    left = "unknown" if None in rest else f"about {sum(filter(None, rest)):.3g}"
    return f"GPU-hours: {done:.3g} spent, {left} left"


def forecast(jobs: list[Job], trained: Callable[[Cell], bool], profile: str | None) -> list[str]:
    """What is not trained yet, a line for each job: cells and budget, and with a profile what is asked of the cluster."""
    out, total = [], [0.0, 0.0]
    for job in jobs:
        if not (missing := [c for c in job.cells if not trained(c)]):
            continue
        b = missing[0].benchmark
        cost = (
            f"{b.teacher.updates} updates"
            if missing[0].arm is None
            else f"{missing[0].own_budget / 1e12:g} TFLOP"
        )
        line = f"{job.benchmark}/{job.arm}: seeds {', '.join(str(c.seed) for c in missing)}, {cost} each"
        if profile:
            r = resources.of(job.benchmark, job.arm)
            size = f"{r.nodes} node{'s' if r.nodes > 1 else ''} x {r.ranks} rank{'s' if r.ranks > 1 else ''}"
            line += f"; a job of {size}, {r.gpus} GPUs, {r.cpus} CPUs, {r.memory_gb:g} GB, {r.minutes} min"
            total = [a + h for a, h in zip(total, control.hours(job, 60 * r.minutes))]
        out.append(line)
    if profile and out:
        site = {
            k: v for k, v in resources.site(profile).model_dump().items() if v and k != "benchmarks"
        }
        out.append(
            f"{len(out)} jobs for training, one more each for evaluating; training takes at most {total[0]:.3g} GPU-hours and "
            f"{total[1]:.3g} core-hours if no job reaches its time limit; sbatch: {site or 'defaults of the cluster'}"
        )
    return out


def partial(name: str, jobs: list[Job], evaluated: Callable[[Cell], bool]) -> str:
    """results/<name>.partial.md: which cells keep a table from being rendered, and why."""
    places = control.job_states(jobs)
    states = [
        (cell, state_of(cell, evaluated, places.get(cell.key)))
        for job in jobs
        for cell in job.cells
    ]
    missing = [(c, s) for c, s in states if s.word in COLOURS and s.word != "done"]
    lines = [
        f"# {name}: not complete",
        "",
        f"{len(states) - len(missing)} of {len(states)} cells have ended. The same command continues.",
        "",
    ]
    lines += ["| cell | state | why |", "|---|---|---|"] + [
        f"| {c.label} | {s} | {s.why or '–'} |" for c, s in missing
    ]
    return "\n".join(lines) + "\n"


def summary(states: list[tuple[Cell, State]]) -> str:
    """n of m cells done, how many only trained or failed, and about how long the rest takes."""
    finished = [s.word for c, s in states if c.result() is not None]
    done, trained = finished.count("done"), finished.count("trained")
    text = f"{done} of {len(states)} cells done" + (
        f", {trained} trained but not evaluated" if trained else ""
    )
    if failed := len(finished) - done - trained:
        text += f", {failed} failed"
    rest = seconds_left(states)
    if not rest:
        return text
    known = [seconds for seconds in rest if seconds is not None]
    if len(known) < len(rest):
        return f"{text}, time left unknown until a first cell of each kind is done"
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return f"{text}, about {duration(max(sum(known) / cores, *known))} left on {cores} cores"


def seconds_left(states: list[tuple[Cell, State]]) -> list[float | None]:
    """For every cell without a record: its own estimate; or what cells like it took on this machine, the arm's other seeds or
    (per FLOP of the budget) other arms of its benchmark; None where none has been done."""
    seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
    per_flop: dict[str, list[float]] = defaultdict(list)
    for cell, _ in states:
        record = cell.result()
        if (
            record is not None
            and record["status"] == "done"
            and record["provenance"]["hardware"] == hardware()
        ):
            seconds[cell.benchmark.name, cell.arm_name].append(record["cost"]["seconds"])
            if cell.arm is not None:
                per_flop[cell.benchmark.name].append(
                    record["cost"]["seconds"]
                    / (record["cost"]["flops"] - record["cost"].get("start", {}).get("flops", 0))
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
        raise UserError(
            f"'{name}' is no cell: give benchmark/method/seed, e.g. digits/dmd/0, or the path of its folder"
        )
    benchmark = config.benchmark(parts[0])
    arm = None if parts[1] == "teacher" else folders.arm(parts[1])
    seed = parts[2].removeprefix("seed").partition("-")[0]
    if not seed.isdecimal():
        raise UserError(
            f"'{name}': '{parts[2]}' is no seed, {nearest(parts[2], map(str, benchmark.seeds))}"
        )
    folder = Cell(benchmark, arm, int(seed)).folder
    if not folder.is_dir():
        others = sorted(
            str(p.relative_to(config.root())) for p in folder.parent.glob(f"seed{seed}-*")
        )
        hint = (
            f"; of other versions of its code or settings there are {', '.join(others)}"
            if others
            else ""
        )
        raise UserError(
            f"{name}: nothing has happened yet in {folder.relative_to(config.root())}{hint}"
        )
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
            when = (
                datetime.fromtimestamp(line["time"], UTC)
                .isoformat(" ", "seconds")
                .removesuffix("+00:00")
            )
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
        parts += [
            Text("traceback.txt:"),
            Text("\n".join(f"  {line}" for line in trace.read_text().splitlines()[-LAST_LINES:])),
        ]
    if record is not None and record["status"] != "done":
        log = [Text(f"log: {record['log']}")] if record.get("log") else []
        words = f"{folder.parent.parent.name} {folder.parent.name} --seeds {folder.name.partition('-')[0].removeprefix('seed')}"
        parts += [
            *log,
            Text(f"to try again: rm {folder / 'result.json'} && distillbench train {words}"),
        ]
    parts += [Text(str(p)) for p in sorted(folder.iterdir()) if p.name != "lock"]
    return Group(*parts)
