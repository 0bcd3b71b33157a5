"""Where a worker is, in memory shared with its watcher; errors of time limits. Imports no torch."""

from __future__ import annotations

import ctypes
import mmap
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import ClassVar

# Phases of a cell, and their names in a record's reason.
SETUP, TRAINING, SAMPLING = range(3)
PHASES = ("set-up", "training", "sampling")

# Causes for which a watcher ends a cell; 0 is none.
TIMED_OUT = 1
HUNG = 2


class TimedOut(BaseException):
    """The cell's time is up (a BaseException, so that a method's `except Exception` misses it)."""


class Hung(BaseException):
    """No step and no batch of samples ended for too long; a BaseException as TimedOut is."""


class Pulse(ctypes.Structure):
    """Where a worker is, in memory that it shares with its watcher (`Pulse.shared()`)."""

    _fields_: ClassVar = [
        # 1 + index of the cell it is at; 0: none yet
        ("cell", ctypes.c_longlong),
        # the step at which this process began to train the cell
        ("begun", ctypes.c_longlong),
        ("phase", ctypes.c_longlong),
        # steps, or batches of samples, that ended
        ("step", ctypes.c_longlong),
        # time.monotonic() when this process came to the cell
        ("started", ctypes.c_double),
        # seconds since then in which it was stopped (Ctrl-Z)
        ("stopped", ctypes.c_double),
        # seconds that the steps before `begun` took
        ("earlier", ctypes.c_double),
        # changes with everything that ends
        ("beats", ctypes.c_longlong),
        # the method's code runs: limits apply
        ("limited", ctypes.c_longlong),
        # work of the suite's own in which no step ends
        ("patient", ctypes.c_longlong),
        # TIMED_OUT or HUNG: why SIGALRM is sent
        ("cause", ctypes.c_longlong),
        # by the user, whatever the method makes of it
        ("interrupted", ctypes.c_longlong),
        # asked to save a checkpoint at the end of the step and to end
        ("leaving", ctypes.c_longlong),
        # the worker ends in order: its exit code is its own word
        ("ended", ctypes.c_longlong),
    ]

    @classmethod
    def shared(cls) -> Pulse:
        """A pulse in memory that processes forked from this one share with it."""
        return cls.from_buffer(mmap.mmap(-1, ctypes.sizeof(cls)))

    def enter(self, index: int) -> None:
        """Note that the worker is at the cell of this index.

        Raises KeyboardInterrupt where it was asked to leave.
        """
        if self.leaving:
            raise KeyboardInterrupt
        self.begun = 0
        self.phase = 0
        self.step = 0
        self.started = time.monotonic()
        self.stopped = 0.0
        self.earlier = 0.0
        self.cell = index + 1

    def seconds(self) -> float:
        """Seconds that the cell has taken so far, in all its processes."""
        return self.earlier + time.monotonic() - self.started - self.stopped

    def begin(self, step: int) -> None:
        """Note that training begins at this step."""
        self.begun = step
        self.beat(TRAINING, step)

    def beat(self, phase: int, step: int) -> None:
        """Note that a step has ended, cheaply enough for every one.

        Raises KeyboardInterrupt where the user interrupted the worker and the method swallowed it,
        or where it is to leave; in training a checkpoint is saved first, so the loop does that.
        """
        self.phase = phase
        self.step = step
        self.beats += 1
        if self.interrupted or (self.leaving and phase != TRAINING):
            raise KeyboardInterrupt

    @contextmanager
    def patience(self) -> Iterator[None]:
        """A block in which no step ends, which is no stall."""
        self.patient += 1
        try:
            yield
        finally:
            self.patient -= 1
            self.beats += 1

    @contextmanager
    def limits(self) -> Iterator[None]:
        """A block in which limits of time apply: the watcher's SIGALRM raises Hung or TimedOut."""

        def ring(_signal: int, _frame: FrameType | None) -> None:
            if self.cause:
                raise TimedOut if self.cause == TIMED_OUT else Hung

        before = signal.signal(signal.SIGALRM, ring)
        self.cause = 0
        self.limited = 1
        self.beats += 1
        try:
            yield
            if self.interrupted:
                raise KeyboardInterrupt
        finally:
            self.limited = 0
            self.cause = 0
            signal.signal(signal.SIGALRM, before)

    def where(self) -> str:
        """Phase and step in a record's words: `in training after 12 steps`."""
        if not self.phase:
            return f"in {PHASES[self.phase]}"
        what = "batches" if self.phase == SAMPLING else "steps"
        return f"in {PHASES[self.phase]} after {self.step} {what}"
