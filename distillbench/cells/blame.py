"""Which line a failure is charged to, and a watched ending in words. Imports no torch."""

from __future__ import annotations

import re
import traceback
from pathlib import Path

from distillbench.cells import pulse as signals
from distillbench.cells.cell import Cell
from distillbench.cells.pulse import TIMED_OUT, Pulse

PACKAGE = Path(__file__).parents[1]
FAULTHANDLER_FRAME = re.compile(r'File "(.+)", line (\d+)')
Frame = tuple[str, int]  # file, line


def line_of(error: BaseException, cell: Cell) -> str:
    """`method.py:83`: the innermost line of the method's code on the way to `error`.

    Of ours where the method has none on the way, or of any.
    """
    frames = []
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.filename != signals.__file__:  # where an alarm is turned into an error
            frames.append((frame.filename, frame.lineno or 0))
    return _innermost(frames, cell)


def line_in(text: str, cell: Cell) -> str:
    """`method.py:83` from the words of faulthandler, as `line_of` from an error; '' of none."""
    frames = [(file, int(line)) for file, line in FAULTHANDLER_FRAME.findall(text)]
    return _innermost(frames, cell)


def _innermost(frames: list[Frame], cell: Cell) -> str:
    """Of the frames, innermost first, the first of the method, of ours, or of any; '' of none."""
    folder = None if cell.arm is None else cell.arm.folder.path
    own = [] if folder is None else _within(folder, frames)
    ours = _within(PACKAGE, frames)
    real = [frame for frame in frames if not frame[0].startswith("<")]  # `<frozen importlib>`
    for file, line in own or ours or real:
        return f"{Path(file).name}:{line}"
    return ""


def _within(folder: Path, frames: list[Frame]) -> list[Frame]:
    return [frame for frame in frames if Path(frame[0]).is_relative_to(folder)]


def at_line(pulse: Pulse, line: str) -> str:
    """Where the worker was, with the line where it is known."""
    return f"{pulse.where()} ({line})" if line else pulse.where()


def reason_of(cause: int, cell: Cell, pulse: Pulse, line: str) -> tuple[str, str]:
    """Status and reason of a cell that its watcher ended; cause: TIMED_OUT or HUNG."""
    at = at_line(pulse, line)
    if cause == TIMED_OUT:
        return "timeout", f"more than {cell.benchmark.timeout_s:g} s, {at}"
    return "hung", f"nothing ended for {cell.benchmark.stall_s:g} s {at}"
