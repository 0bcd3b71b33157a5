"""What happened in one cell: the words of `distillbench logs`. Imports no torch."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from distillbench import config
from distillbench.cells import journal
from distillbench.cells.cell import Cell, read_record
from distillbench.errors import UserError, nearest
from distillbench.registry import folders
from distillbench.tables.states import failure, progress_of

LAST_STEPS = 8  # that are shown of train.jsonl
LAST_LINES = 12  # of traceback.txt


def find(name: str) -> Path:
    """The folder of the cell `name`: benchmark/method[@variant]/seed, or a path.

    Raises UserError, with the nearest name, where there is no such cell, or where nothing has
    happened in it.
    """
    if (Path(name) / "lock").is_file():
        return Path(name).resolve()
    parts = name.rstrip("/").split("/")
    if len(parts) != 3:
        raise UserError(
            f"'{name}' is no cell: give benchmark/method/seed, e.g. digits/dmd/0, or the path of "
            "its folder"
        )
    benchmark = config.benchmark(parts[0])
    arm = None if parts[1] == "teacher" else folders.arm(parts[1])
    seed = parts[2].removeprefix("seed").partition("-")[0]
    if not seed.isdecimal():
        near = nearest(parts[2], map(str, benchmark.seeds))
        raise UserError(f"'{name}': '{parts[2]}' is no seed, {near}")
    folder = Cell(benchmark, arm, int(seed)).folder
    if not folder.is_dir():
        root = config.root()
        others = sorted(folder.parent.glob(f"seed{seed}-*"))
        hint = ""
        if others:
            places = ", ".join(str(path.relative_to(root)) for path in others)
            hint = f"; of other versions of its code or settings there are {places}"
        raise UserError(f"{name}: nothing has happened yet in {folder.relative_to(root)}{hint}")
    return folder


def story(folder: Path) -> Group:
    """What happened in a cell: record, starts and deaths, last steps, traceback, files."""
    record = read_record(folder / "result.json")
    lines = journal.read(folder)
    parts: list[Text | Table] = [Text(headline(folder, record))]
    parts += [Text(line) for line in starts_and_deaths(lines)]
    steps = [line for line in lines if "step" in line]
    if steps:
        parts.append(step_table(steps[-LAST_STEPS:]))
    trace = folder / "traceback.txt"
    if trace.is_file():
        last = trace.read_text(encoding="utf-8").splitlines()[-LAST_LINES:]
        parts.append(Text("traceback.txt:"))
        parts.append(Text("\n".join(f"  {line}" for line in last)))
    if record is not None and record["status"] != "done":
        if record.get("log"):
            parts.append(Text(f"log: {record['log']}"))
        parts.append(Text(f"to try again: {remedy(folder)}"))
    for path in sorted(folder.iterdir()):
        if path.name != "lock":
            parts.append(Text(str(path)))
    return Group(*parts)


def headline(folder: Path, record: dict[str, Any] | None) -> str:
    """Which cell it is, how far it is or how it ended, and its cost."""
    cell = f"{folder.parent.parent.name}/{folder.parent.name}/{folder.name}"
    if record is None:
        state = progress_of(folder)
        return f"{cell}: running, {state}" if state.word == "running" else f"{cell}: {state}"
    status = record["status"]
    words = "done" if status == "done" else failure(status)
    if record["reason"]:
        words += f": {record['reason']}"
    words += f"; {record['cost']['seconds']:g} s"
    steps = record["cost"].get("steps")
    if steps:
        words += f", {steps} steps, {record['cost']['flops'] / 1e12:.3g} TFLOP"
    return f"{cell}: {words}"


def starts_and_deaths(lines: list[dict[str, Any]]) -> list[str]:
    """When processes began to train a cell, and how they died, by its journal."""
    found = []
    for line in lines:
        if "start" in line:
            when = datetime.fromtimestamp(line["time"], UTC).strftime("%Y-%m-%d %H:%M:%S")
            found.append(f"start at step {line['start']} of {line['steps']}, {when} UTC")
        elif "died" in line:
            found.append(f"died: {line['died']} {line['at']}")
    return found


def step_table(steps: list[dict[str, Any]]) -> Table:
    """Scalars of steps, one step a row."""
    columns = list(dict.fromkeys(key for line in steps for key in line))
    table = Table(*columns, box=None)
    for line in steps:
        table.add_row(*(f"{line[key]:g}" if key in line else "" for key in columns))
    return table


def remedy(folder: Path) -> str:
    """The commands that train a failed cell once more."""
    seed = folder.name.partition("-")[0].removeprefix("seed")
    words = f"{folder.parent.parent.name} {folder.parent.name} --seeds {seed}"
    return f"rm {folder / 'result.json'} && distillbench train {words}"
