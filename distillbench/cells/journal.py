"""`train.jsonl`: what happened in a cell, one JSON object a line, only appended to.

    {"start": k, "steps": n, "time": t}   a process begins training at step k of n (0, or a
                                          checkpoint's); t: UTC seconds
    {"step": i, <scalar>: value, ...}     scalars of step i, for about 200 steps of a run; steps
                                          after a resume come again
    {"checkpoint": k}                     the checkpoint of the first k steps is on disk
    {"died": "SIGSEGV", "at": "...", "begun": k}   the process, which began at step k, ended
                                          without a record

Lines are written at once but not synced: a kill loses none, a power failure may lose the last ones.
An unfinished last line is cut when the next process begins. Imports no torch.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from distillbench.cells.disk import writing

NAME = "train.jsonl"
LOGGED = 200  # about how many steps of a run have their scalars in it


class Journal:
    """The journal of the cell in `folder`.

    A full or read-only disk is a UserError and leaves no half line.
    """

    def __init__(self, folder: Path):
        self.path = folder / NAME

    def cut(self) -> None:
        """Remove an unfinished last line."""
        with writing(self.path):
            if not self.path.is_file():
                return
            data = self.path.read_bytes()
            if data and not data.endswith(b"\n"):
                os.truncate(self.path, data.rfind(b"\n") + 1)

    def add(self, **line: Any) -> None:
        """Append one line."""
        data = (json.dumps(line) + "\n").encode()
        with writing(self.path):
            length = self.path.stat().st_size if self.path.is_file() else 0
            try:
                with open(self.path, "ab", buffering=0) as f:
                    written = f.write(data)
                    if written < len(data):  # a disk that is nearly full takes a part
                        f.write(data[written:])
            except OSError:
                if self.path.is_file():
                    os.truncate(self.path, length)
                raise

    def start(self, step: int, steps: int) -> None:
        """Note that a process begins training at `step`, after an unfinished line is cut."""
        self.cut()
        self.add(start=step, steps=steps, time=round(time.time(), 2))


def read(folder: Path) -> list[dict[str, Any]]:
    """Every whole line of a cell's journal, oldest first; none where there is no journal."""
    lines: list[dict[str, Any]] = []
    try:
        text = (folder / NAME).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return lines
    for line in text.splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:  # unfinished
            continue
    return lines
