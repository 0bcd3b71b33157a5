"""Runs cells in a worker process and watches it: time limits, hangs, deaths, memory.

The command stays as the watcher of the worker it forks. The worker says through shared memory
(`Pulse`) where it is; the watcher reads it ten times a second:

- Nothing finished for `stall_s`, or the cell's time is up: the watcher sends SIGALRM, which raises
  Hung or TimedOut in the method's Python code. Native code that never returns to Python does not
  see it: 10 s later (or `stall_s`, if that is less) the watcher sends SIGABRT, on which
  faulthandler writes down the line, and writes the record itself. A method that takes SIGALRM for
  itself is ended in this second way. Time in which the worker or the watcher is stopped (Ctrl-Z)
  counts for neither; the time of earlier processes of the cell, up to the checkpoint it continues
  from, counts for the second.
- The worker dies without a record (SIGSEGV, abort, os._exit): it is started again and continues
  from its checkpoint. A second death of a cell that began at the same step costs the cell its row.
  Outside of a cell a second death ends the command.
- The worker is killed by someone (SIGKILL, SIGTERM, SIGHUP, ...): no record ever comes of that; the
  command ends and the same command continues. A SIGKILL while the kernel's count of out-of-memory
  kills rose is a death as above, and becomes `oom`.
- SIGTERM and SIGUSR2, by which machines are taken away: the worker ends after the step it is at,
  with a checkpoint, or at once where it does not train. One that has not ended after 45 s is
  interrupted as by Ctrl-C, and 10 s later killed, but not while it saves. The same command
  continues.
- The watcher itself is killed: the kernel kills the worker (Linux).

Imports no torch.
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
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import IO, NoReturn

from distillbench.cells import journal, progress, ranks
from distillbench.cells.blame import at_line, line_in, reason_of
from distillbench.cells.cell import Cell
from distillbench.cells.disk import TRACEBACK, write_atomically
from distillbench.cells.journal import Journal
from distillbench.cells.memory import oom_kills
from distillbench.cells.progress import say
from distillbench.cells.pulse import HUNG, TIMED_OUT, TRAINING, Pulse
from distillbench.cells.record import describe, finish
from distillbench.config import Benchmark
from distillbench.errors import UserError

POLL = 0.1  # seconds between two looks of the watcher
LONGEST_LOOK = 10 * POLL  # a watcher that looks later than this was stopped itself
LONGEST_GRACE = 10.0  # seconds for Python code to react to SIGALRM and Ctrl-C
STEP_GRACE = 45.0  # seconds for the step at hand to end, when a machine is taken away
DEATHS = 2  # of a cell at the same step, before it is recorded
PR_SET_PDEATHSIG = 1  # of Linux's prctl
# Exit codes.
FAILED = 1
USER_ERROR = 2
INTERRUPTED = 130
# Signals by which somebody kills a process, which does not end so by itself.
SOMEBODY = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)

Work = Callable[[Pulse], None]


@dataclass(frozen=True)
class Death:
    """How a worker ended that did not end in order."""

    cell: Cell  # that it was at, or the first
    began: bool  # whether it was at a cell that has no record yet
    pulse: Pulse  # as the worker left it
    code: int  # exit code, or minus the signal it died of
    cause: int  # TIMED_OUT or HUNG where its watcher ended it, else 0
    out_of_memory: bool  # whether the kernel killed it for lack of memory
    dump: str  # words of faulthandler

    @property
    def name(self) -> str:
        """`SIGSEGV`, or `exit code 3`."""
        return signal.Signals(-self.code).name if self.code < 0 else f"exit code {self.code}"

    @property
    def is_by_somebody(self) -> bool:
        """Whether it was killed from outside: neither by its watcher nor for lack of memory."""
        return -self.code in SOMEBODY and not self.out_of_memory and not self.cause

    @property
    def place(self) -> tuple[int, int]:
        """What a second death has in common: the cell, and the step at which training began."""
        return self.pulse.cell, self.pulse.begun if self.began else -1

    def line(self) -> str:
        """`method.py:83`: the line at which it was; '' where that is not known."""
        return line_in(self.dump, self.cell)


def supervise(cells: list[Cell], work: Work) -> None:
    """Run `work`, which gives every cell a record, in a worker process, and again after one died.

    Exits as the worker does when it ends in order; UserError when somebody killed it, or where it
    dies before any cell begins.
    """
    deaths: dict[tuple[int, int], int] = {}  # by their place
    while any(cell.result() is None for cell in cells):
        death = _run_worker(cells, work)
        if death is None:
            return
        if death.is_by_somebody:
            raise UserError(
                f"{death.cell.label}: the process was killed ({death.name}); "
                "the same command continues"
            )
        if death.place not in deaths:
            deaths[death.place] = _earlier_deaths(death)
        deaths[death.place] += 1
        final = bool(death.cause) or deaths[death.place] >= DEATHS
        if not death.began:
            _note_death_outside(death, final)
            continue
        _note_death(death, final)
        # Other ranks cannot go on: SLURM ends them, and the next job of these cells counts this
        # death.
        if not ranks.alone():
            sys.exit(FAILED)


def _run_worker(cells: list[Cell], work: Work) -> Death | None:
    """Run a worker until it is gone; its death, or None where it has done its work.

    Exits as the worker does when it ends otherwise in order, or was interrupted.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    with tempfile.TemporaryFile() as dump:
        pulse = Pulse.shared()
        kills = oom_kills()
        watcher = _Watcher(pulse, cells)
        code = watcher.watch(partial(_fork, work, pulse, dump))
        if pulse.ended and not code:
            return None
        if pulse.ended or watcher.interrupted:
            sys.exit(code if pulse.ended else INTERRUPTED)
        dump.seek(0)
        text = dump.read().decode(errors="replace")
    cell = cells[max(pulse.cell - 1, 0)]
    return Death(
        cell=cell,
        began=pulse.cell > 0 and cell.result() is None,
        pulse=pulse,
        code=code,
        cause=watcher.cause,
        out_of_memory=code == -signal.SIGKILL and oom_kills() > kills,
        dump=text,
    )


def _earlier_deaths(death: Death) -> int:
    """Deaths of the cell's earlier jobs at the same step; each job of several ranks dies once."""
    if ranks.alone() or not death.began:
        return 0
    lines = journal.read(death.cell.folder)
    return sum(line.get("begun") == death.pulse.begun for line in lines)


def _note_death_outside(death: Death, final: bool) -> None:
    """Say that a worker died before any cell began, which is no method's doing.

    UserError if it is not to be tried again.
    """
    if not final:
        say(f"the process died before any cell began ({death.name}); starting it again")
        return
    line = death.line()
    where = f" ({line})" if line else ""
    raise UserError(
        f"the process died {DEATHS} times before any cell began: {death.name}{where}: "
        "see that `import torch` works, then rerun"
    )


def _note_death(death: Death, final: bool) -> None:
    """Write down that the worker died in its cell; the cell's record too, if that is final."""
    cell = death.cell
    pulse = death.pulse
    # Of several ranks the first has the lock.
    with cell.locked() if ranks.alone() else contextlib.nullcontext():
        if cell.result() is not None:
            return
        at = at_line(pulse, death.line())
        Journal(cell.folder).cut()
        died = "hung" if death.cause else death.name
        Journal(cell.folder).add(died=died, at=at, begun=pulse.begun)
        if death.dump:
            write_atomically(cell.folder / TRACEBACK, death.dump.encode())
        if not final:
            then = "; starting it again" if ranks.alone() else ""
            say(f"{cell.label}: the process died ({death.name} {at}){then}")
            return
        status, reason = _status_and_reason(death, at)
        record = describe(cell)
        record["status"] = status
        record["reason"] = reason
        seconds = pulse.seconds()
        finish(cell, record, None, seconds, None)
        say(f"{cell.label}: {status.upper()}: {reason} in {seconds:.1f} s")


def _status_and_reason(death: Death, at: str) -> tuple[str, str]:
    """Status and reason of a cell whose worker died for good; at: where, in words."""
    if death.cause:
        return reason_of(death.cause, death.cell, death.pulse, death.line())
    if death.out_of_memory:
        return "oom", f"killed by the kernel for lack of memory {DEATHS} times, {at}"
    return "failed", f"the process died {DEATHS} times: {death.name} {at}"


def _fork(work: Work, pulse: Pulse, dump: IO[bytes]) -> int:
    """Start a worker, its interrupts blocked until it can answer them; returns its process id."""
    watcher = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    with contextlib.suppress(OSError, AttributeError):  # Linux: die with the watcher
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != watcher:
        os._exit(FAILED)
    faulthandler.enable(dump, all_threads=True)
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    for number in INTERRUPTS:
        signal.signal(number, partial(_interrupt, pulse))
    _live(work, pulse)


def _interrupt(pulse: Pulse, number: int, _frame: FrameType | None) -> None:
    """The worker's handler of INTERRUPTS: raises KeyboardInterrupt, once.

    What follows is putting things in order. A machine that is taken away leaves time for a
    checkpoint, so in training the loop ends by itself.
    """
    if number != signal.SIGINT:
        pulse.leaving = 1
        if pulse.limited and pulse.phase == TRAINING:
            return
    pulse.interrupted = 1
    for other in INTERRUPTS:
        signal.signal(other, signal.SIG_IGN)
    raise KeyboardInterrupt


def _live(work: Work, pulse: Pulse) -> NoReturn:
    """Do the work of a worker, and exit with its code."""
    code = 0
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, INTERRUPTS)
        work(pulse)
    except UserError as e:
        code = USER_ERROR
        say(f"distillbench: {e}")
    except KeyboardInterrupt:  # the watcher says so
        code = INTERRUPTED
    except BaseException:
        code = FAILED
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
    """Looks at one worker until it is gone.

    cause: TIMED_OUT or HUNG where it ended the worker by force, else 0. interrupted: when somebody
    interrupted the watcher, on time.monotonic(), else None.
    """

    def __init__(self, pulse: Pulse, cells: list[Cell]):
        self.pulse = pulse
        self.cells = cells
        self.cause = 0
        self.interrupted: float | None = None
        self._pid = 0
        # As of the last look:
        self._looked = 0.0  # when it was
        self._stopped = False  # whether the worker was stopped
        self._cell = 0  # pulse.cell
        self._beats = 0  # pulse.beats
        self._idle = 0.0  # seconds in which nothing had finished
        # When the worker was told that it is over its limits, by SIGALRM and then by SIGABRT.
        self._asked: float | None = None
        self._forced: float | None = None

    def watch(self, fork: Callable[[], int]) -> int:
        """Start a worker and stay until it is gone; its exit code, or minus the signal."""
        signal.pthread_sigmask(signal.SIG_BLOCK, INTERRUPTS)
        self._pid = fork()
        previous = {number: signal.signal(number, self._pass_on) for number in INTERRUPTS}
        signal.pthread_sigmask(signal.SIG_UNBLOCK, INTERRUPTS)
        try:
            return self._look_until_gone()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _pass_on(self, number: int, _frame: FrameType | None) -> None:
        """The watcher's handler of INTERRUPTS: hands them on to the worker.

        Ctrl-C reaches both processes, SIGTERM often the watcher alone; the worker acts on the first
        and ignores the rest. The pulse is told as well: a method may have taken the signal for
        itself.
        """
        self.interrupted = self.interrupted or time.monotonic()
        if number == signal.SIGINT:
            self.pulse.interrupted = 1
        else:
            self.pulse.leaving = 1
        self._send(number)

    def _send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, number)

    def _look_until_gone(self) -> int:
        self._looked = time.monotonic()
        while True:
            code = self._exit_code()
            if code is not None:
                return code
            now = time.monotonic()
            self._count_time(now)
            self._press_interrupt(now)
            if self.pulse.limited and not self._stopped:
                self._enforce_limits(now)
            time.sleep(POLL)

    def _exit_code(self) -> int | None:
        """None while the worker lives; notes whether it is stopped (Ctrl-Z)."""
        pid, status = os.waitpid(self._pid, os.WNOHANG | os.WUNTRACED | os.WCONTINUED)
        if not pid:
            return None
        if os.WIFSTOPPED(status) or os.WIFCONTINUED(status):
            self._stopped = os.WIFSTOPPED(status)
            return None
        return os.waitstatus_to_exitcode(status)

    def _count_time(self, now: float) -> None:
        """Add the time since the last look to what it counts for: idle, or stopped."""
        pulse = self.pulse
        since = now - self._looked
        self._looked = now
        passed = min(since, LONGEST_LOOK)  # a watcher that was stopped itself saw nothing
        pulse.stopped += since if self._stopped else since - passed
        if pulse.cell != self._cell or not pulse.limited:
            self._asked = None
        moved = pulse.cell != self._cell or pulse.beats != self._beats
        if moved or self._stopped or pulse.patient or not pulse.limited:
            self._cell = pulse.cell
            self._beats = pulse.beats
            self._idle = 0.0
        self._idle += passed

    def _press_interrupt(self, now: float) -> None:
        """Insist where an interrupted worker has not ended in time, but not while it saves."""
        pulse = self.pulse
        grace = LONGEST_GRACE if pulse.interrupted else STEP_GRACE
        if self.interrupted is None or now - self.interrupted <= grace:
            return
        if pulse.interrupted:  # a method that cannot be interrupted
            self._send(signal.SIGKILL)
        elif not pulse.patient:  # its step does not end
            self._pass_on(signal.SIGINT, None)
            self.interrupted = now

    def _enforce_limits(self, now: float) -> None:
        """Ask a worker that is over its cell's limits to end, then end it by ever harder means."""
        benchmark = self.cells[self._cell - 1].benchmark
        cause = self._limit_reached(benchmark)
        if not cause:
            self._asked = None
        elif self._asked is None:
            self._asked = now
            self.pulse.cause = cause
            self._send(signal.SIGALRM)
        elif self._forced is None:
            if now - self._asked > min(LONGEST_GRACE, benchmark.stall_s):
                self._forced = now
                self.cause = cause
                self._send(signal.SIGABRT)
        elif now - self._forced > LONGEST_GRACE:
            self._send(signal.SIGKILL)

    def _limit_reached(self, benchmark: Benchmark) -> int:
        """TIMED_OUT, HUNG, or 0 within the limits."""
        if self.pulse.seconds() > benchmark.timeout_s:
            return TIMED_OUT
        return HUNG if self._idle > benchmark.stall_s else 0
