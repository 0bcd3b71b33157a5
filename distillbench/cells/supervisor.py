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

import contextlib
import ctypes
import faulthandler
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import IO, NoReturn

from distillbench.cells import journal, progress, ranks
from distillbench.cells.blame import line_in, reason_of
from distillbench.cells.cell import Cell
from distillbench.cells.disk import write_atomically
from distillbench.cells.journal import Journal
from distillbench.cells.memory import (
    oom_kills,
)
from distillbench.cells.progress import say
from distillbench.cells.pulse import HUNG, TIMED_OUT, TRAINING, Pulse
from distillbench.cells.record import describe, finish
from distillbench.errors import UserError

POLL = 0.1  # seconds between two looks of the watcher
LONGEST_GRACE = 10.0  # seconds for Python code to react to SIGALRM and Ctrl-C
STEP_GRACE = 45.0  # seconds for the step at hand to end, when a machine is taken away
DEATHS = 2  # of a cell at the same step, before it is recorded
INTERRUPTED = 130
SOMEBODY = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)


def supervise(cells: list[Cell], work: Callable[[Pulse], None]) -> None:
    """Run `work`, which gives every cell a record, in a worker process, and again after one that died. Exits as the worker
    does when it ends in order; UserError when somebody killed it."""
    deaths: dict[tuple[int, int], int] = {}  # (cell, step it began at): deaths there
    while any(cell.result() is None for cell in cells):
        sys.stdout.flush()
        sys.stderr.flush()
        with tempfile.TemporaryFile() as dump:
            pulse, kills = Pulse.shared(), oom_kills()
            watcher = _Watcher(pulse, cells)
            code, verdict = watcher.watch(partial(_fork, work, pulse, dump)), watcher.verdict
            if pulse.ended and not code:
                return
            if pulse.ended or watcher.interrupted:
                sys.exit(code if pulse.ended else INTERRUPTED)
            dump.seek(0)
            text = dump.read().decode(errors="replace")
        index = max(pulse.cell - 1, 0)
        began = pulse.cell > 0 and cells[index].result() is None
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        oom = code == -signal.SIGKILL and oom_kills() > kills
        if code < 0 and -code in SOMEBODY and not oom and not verdict:
            raise UserError(
                f"{cells[index].label}: the process was killed ({name}); the same command continues"
            )
        key, several = (pulse.cell, pulse.begun if began else -1), not ranks.alone()
        before = (
            sum(line.get("begun") == pulse.begun for line in journal.read(cells[index].folder))
            if began and several
            else 0
        )
        deaths[key] = deaths.get(key, before) + 1
        final = bool(verdict) or deaths[key] >= DEATHS
        if not began:  # no method's doing
            if final:
                line = line_in(text, cells[index])
                name += f" ({line})" if line else ""
                raise UserError(
                    f"the process died {DEATHS} times before any cell began: {name}: see that `import torch` works, then rerun"
                )
            say(f"the process died before any cell began ({name}); starting it again")
            continue
        _note_death(cells[index], pulse, name, verdict, oom, text, final)
        if several:  # the others cannot go on: SLURM ends them, and the next job of these cells counts this death
            sys.exit(1)


def _note_death(
    cell: Cell, pulse: Pulse, name: str, verdict: int, oom: bool, text: str, final: bool
) -> None:
    """Write down that the worker died in this cell, and the cell's record if it is not to be tried again."""
    with (
        cell.locked() if ranks.alone() else contextlib.nullcontext()
    ):  # of several ranks the first has the lock
        if cell.result() is not None:
            return
        line = line_in(text, cell)
        at = f"{pulse.where()}{f' ({line})' if line else ''}"
        if verdict:
            status, reason = reason_of(verdict, cell, pulse, line)
        elif oom:
            status, reason = "oom", f"killed by the kernel for lack of memory {DEATHS} times, {at}"
        else:
            status, reason = "failed", f"the process died {DEATHS} times: {name} {at}"
        Journal(cell.folder).cut()
        Journal(cell.folder).add(died="hung" if verdict else name, at=at, begun=pulse.begun)
        if text:
            write_atomically(cell.folder / "traceback.txt", text.encode())
        if final:
            seconds = pulse.seconds()
            finish(cell, describe(cell) | {"status": status, "reason": reason}, None, seconds, None)
            say(f"{cell.label}: {status.upper()}: {reason} in {seconds:.1f} s")
        else:
            say(
                f"{cell.label}: the process died ({name} {at})"
                + ("; starting it again" if ranks.alone() else "")
            )


def _fork(work: Callable[[Pulse], None], pulse: Pulse, dump: IO[bytes]) -> int:
    """Start a worker, with its interrupts blocked until it can answer them; returns its process id."""
    watcher = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    with contextlib.suppress(OSError, AttributeError):  # Linux: die with the watcher
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != watcher:
        os._exit(1)
    faulthandler.enable(dump, all_threads=True)
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    for number in INTERRUPTS:
        signal.signal(number, partial(_interrupt, pulse))
    _end(work, pulse)


def _interrupt(pulse: Pulse, number: int, _frame: FrameType | None) -> None:
    """Once is enough: what follows is putting things in order. A machine that is taken away leaves time for a checkpoint."""
    if number != signal.SIGINT:
        pulse.leaving = 1
        if pulse.limited and pulse.phase == TRAINING:
            return
    pulse.interrupted = 1
    for other in INTERRUPTS:
        signal.signal(other, signal.SIG_IGN)
    raise KeyboardInterrupt


def _end(work: Callable[[Pulse], None], pulse: Pulse) -> NoReturn:
    """The worker's life and its exit code."""
    code = 0
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, INTERRUPTS)
        work(pulse)
    except UserError as e:
        code = 2
        say(f"distillbench: {e}")
    except KeyboardInterrupt:  # the watcher says so
        code = INTERRUPTED
    except BaseException:
        code = 1
        say(traceback.format_exc().rstrip())
    finally:
        try:
            progress.stop()
            with contextlib.suppress(OSError):
                sys.stdout.flush()
        finally:  # whatever happened
            pulse.ended = 1
            os._exit(code)


class _Watcher:
    """Looks at one worker until it is gone."""

    def __init__(self, pulse: Pulse, cells: list[Cell]):
        self.pid, self.pulse, self.cells = 0, pulse, cells
        self.verdict = 0  # why it was ended by force
        self.interrupted: float | None = None

    def watch(self, fork: Callable[[], int]) -> int:
        """Start a worker and stay until it is gone; returns its exit code, or minus the signal it died of."""
        signal.pthread_sigmask(signal.SIG_BLOCK, INTERRUPTS)
        self.pid = fork()
        previous = {n: signal.signal(n, self._pass_on) for n in INTERRUPTS}
        signal.pthread_sigmask(signal.SIG_UNBLOCK, INTERRUPTS)
        try:
            return self._watch()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _pass_on(self, number: int, _frame: FrameType | None) -> None:
        """Ctrl-C reaches both of us, SIGTERM often only the watcher; the worker acts on the first and ignores the rest.

        The pulse is told as well: a method may have taken the signal for itself.
        """
        self.interrupted = self.interrupted or time.monotonic()
        if number == signal.SIGINT:
            self.pulse.interrupted = 1
        else:
            self.pulse.leaving = 1
        self._send(number)

    def _send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def _watch(self) -> int:
        pulse, looked, idle, asked, forced, stopped = (
            self.pulse,
            time.monotonic(),
            0.0,
            0.0,
            0.0,
            False,
        )
        cell = beats = 0
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG | os.WUNTRACED | os.WCONTINUED)
            if pid and not os.WIFSTOPPED(status) and not os.WIFCONTINUED(status):
                return os.waitstatus_to_exitcode(status)
            stopped = os.WIFSTOPPED(status) if pid else stopped
            now = time.monotonic()
            since, looked = now - looked, now
            passed = min(since, 10 * POLL)  # a watcher that was stopped itself saw nothing
            pulse.stopped += since if stopped else since - passed
            if pulse.cell != cell or not pulse.limited:
                asked = 0.0
            if (
                pulse.cell != cell
                or pulse.beats != beats
                or stopped
                or pulse.patient
                or not pulse.limited
            ):
                cell, beats, idle = pulse.cell, pulse.beats, 0.0
            idle += passed
            grace = LONGEST_GRACE if pulse.interrupted else STEP_GRACE
            if (
                self.interrupted is not None
                and now - self.interrupted > grace
                and (pulse.interrupted or not pulse.patient)
            ):
                if pulse.interrupted:
                    self._send(signal.SIGKILL)  # a method that cannot be interrupted
                else:  # its step does not end
                    self._pass_on(signal.SIGINT, None)
                    self.interrupted = now
            if pulse.limited and not stopped:
                b = self.cells[cell - 1].benchmark
                verdict = (
                    TIMED_OUT if pulse.seconds() > b.timeout_s else HUNG if idle > b.stall_s else 0
                )
                if not verdict:
                    asked = 0.0
                elif not asked:
                    asked, pulse.verdict = now, verdict
                    self._send(signal.SIGALRM)
                elif not forced and now - asked > min(LONGEST_GRACE, b.stall_s):
                    forced, self.verdict = now, verdict
                    self._send(signal.SIGABRT)
                elif forced and now - forced > LONGEST_GRACE:
                    self._send(signal.SIGKILL)
            time.sleep(POLL)
