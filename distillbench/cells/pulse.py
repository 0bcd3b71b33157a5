"""Runs cells in a worker process and watches it: time limits, hangs, deaths, memory. Imports no torch.

The command stays as the watcher of the worker it forks. The worker says through shared memory (`Pulse`) where it is; the
watcher reads it ten times a second:

- Nothing finished for `stall_s`, or the cell's time is up: the watcher sends SIGALRM, which raises Hung or TimedOut in the
  method's Python code. Native code that never returns to Python does not see it: 10 s later (or `stall_s`, if that is less)
  the watcher sends SIGABRT, on which faulthandler writes down the line, and writes the record itself. A method that takes
  SIGALRM for itself is ended in this second way. Time in which the worker or the watcher is stopped (Ctrl-Z) counts for neither;
  the time of earlier processes of the cell, up to the checkpoint it continues from, counts for the second.
- The worker dies without a record (SIGSEGV, abort, os._exit): it is started again and continues from its checkpoint. A second
  death of a cell that began at the same step costs the cell its row. Outside of a cell a second death ends the command.
- The worker is killed by someone (SIGKILL, SIGTERM, SIGHUP, ...): no record ever comes of that; the command ends and the same
  command continues. A SIGKILL while the kernel's count of out-of-memory kills rose is a death as above, and becomes `oom`.
- SIGTERM and SIGUSR2, by which machines are taken away: the worker ends after the step it is at, with a checkpoint, or at once where
  it does not train. One that has not ended after 45 s is interrupted as by Ctrl-C, and 10 s later killed, but not while it saves.
  The same command continues.
- The watcher itself is killed: the kernel kills the worker (Linux).
"""

from __future__ import annotations

import ctypes
import mmap
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import ClassVar

SETUP, TRAINING, SAMPLING = range(3)
PHASES = ("set-up", "training", "sampling")
TIMED_OUT, HUNG = 1, 2


class TimedOut(BaseException):
    """The cell's time is up (a BaseException, so that no `except Exception` of a method swallows it)."""


class Hung(BaseException):
    """No step and no batch of samples ended for too long."""


class Pulse(ctypes.Structure):
    """Where a worker is, in memory that it shares with its watcher (`Pulse.shared()`)."""

    _fields_: ClassVar = [
        ("cell", ctypes.c_longlong),  # 1 + index of the cell it is at; 0: none yet
        ("begun", ctypes.c_longlong),  # the step at which this process began to train the cell
        ("phase", ctypes.c_longlong),
        ("step", ctypes.c_longlong),  # steps, or batches of samples, that ended
        ("started", ctypes.c_double),  # time.monotonic() when this process came to the cell
        ("stopped", ctypes.c_double),  # seconds in which it was stopped (Ctrl-Z) since
        ("earlier", ctypes.c_double),  # seconds that the steps before `begun` took
        ("beats", ctypes.c_longlong),  # changes with everything that ends
        ("limited", ctypes.c_longlong),  # the method's code runs: limits apply
        ("patient", ctypes.c_longlong),  # work of our own in which no step ends
        ("verdict", ctypes.c_longlong),  # why SIGALRM is sent
        ("interrupted", ctypes.c_longlong),  # by the user, whatever the method makes of it
        (
            "leaving",
            ctypes.c_longlong,
        ),  # asked to save a checkpoint at the end of the step and to end
        ("ended", ctypes.c_longlong),  # the worker ends in order: its exit code is its own word
    ]

    @classmethod
    def shared(cls) -> Pulse:
        return cls.from_buffer(mmap.mmap(-1, ctypes.sizeof(cls)))

    def enter(self, index: int) -> None:
        """The worker is now at the cell of this index; KeyboardInterrupt where it was asked to leave."""
        if self.leaving:
            raise KeyboardInterrupt
        self.begun = self.phase = self.step = 0
        self.started, self.stopped, self.earlier = time.monotonic(), 0.0, 0.0
        self.cell = index + 1

    def seconds(self) -> float:
        """That the cell has taken so far, in all its processes."""
        return self.earlier + time.monotonic() - self.started - self.stopped

    def begin(self, step: int) -> None:
        """Training begins at this step."""
        self.begun = step
        self.beat(TRAINING, step)

    def beat(self, phase: int, step: int) -> None:
        """A step has ended: cheap enough for every one."""
        self.phase, self.step = phase, step
        self.beats += 1
        if self.interrupted or (
            self.leaving and phase != TRAINING
        ):  # the method swallowed it; a step is saved first
            raise KeyboardInterrupt

    @contextmanager
    def patience(self) -> Iterator[None]:
        """No step ends in this block, and that is no stall."""
        self.patient += 1
        try:
            yield
        finally:
            self.patient -= 1
            self.beats += 1

    @contextmanager
    def limits(self) -> Iterator[None]:
        """Limits of time apply in this block: SIGALRM from the watcher raises Hung or TimedOut."""

        def ring(_signal: int, _frame: FrameType | None) -> None:
            if self.verdict:
                raise TimedOut if self.verdict == TIMED_OUT else Hung

        before = signal.signal(signal.SIGALRM, ring)
        self.verdict, self.limited = 0, 1
        self.beats += 1
        try:
            yield
            if self.interrupted:
                raise KeyboardInterrupt
        finally:
            self.limited = self.verdict = 0
            signal.signal(signal.SIGALRM, before)

    def where(self) -> str:
        """For a record's reason."""
        what = "batches" if self.phase == SAMPLING else "steps"
        return f"in {PHASES[self.phase]}" + (f" after {self.step} {what}" if self.phase else "")
