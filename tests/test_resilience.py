"""Every way a cell can end, checkpoints and journals that were damaged."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from distillbench.cells import journal, loop, memory, progress, sampling, train, validate
from distillbench.cells.cell import Cell
from distillbench.cells.checkpoint import (
    CHECKPOINTS,
    Damaged,
    checksum,
    read_tensors,
    save_progress,
    write_tensors,
)
from distillbench.cells.disk import LAST, PREVIOUS, is_locked, lock, write_atomically, write_json
from distillbench.cells.journal import NAME
from distillbench.cells.pulse import TRAINING, Pulse, TimedOut
from distillbench.cells.record import describe, finish, provenance
from distillbench.cells.steps import one_step
from distillbench.cells.supervisor import supervise
from distillbench.cells.train import MACHINE
from distillbench.errors import UserError
from tests.commands import LONG, ROOT, Command
from tests.conftest import RING, Checkout
from tests.test_cells import cell, edit

AT = 7  # the step at which the broken methods break
# Limits of time in seconds, tried one after the other: at a low one a busy machine itself is what
# hangs, and proves nothing. A fault of ours shows at every one.
LIMITS = (5, 20, 80)
FIRST = "        c = self.config\n"  # of a step
LOSS = "        self.student.update(loss)\n"
NEEDS = "        pairs = Pairs(config.pairs,"
# In training, not in the cycle that is metered.
TRIGGER = f"if step.index == {AT} and step.total > {AT}: "
SLEEP = "import time; time.sleep(1000)"


def before(line: str, *code: str) -> tuple[str, str]:
    """An edit of methods/dmd/method.py: `code` before `line`."""
    indent = line[: len(line) - len(line.lstrip())]
    return line, "".join(f"{indent}{c}\n" for c in code) + line


LINE = r"\(method\.py:\d+\)"
# where the time may be up between two of a method's steps
OURS = "|".join(p.stem for p in (ROOT / "distillbench").rglob("*.py"))
LAST_ONE = "        return self.generate(self.student.averaged(), noise, cond.labels)\n"
INIT = "        self.task = task\n"
# name: (edit, status, pattern of the reason). All in one process, since none harms it.
RAISED = {
    "raise": (
        before(FIRST, TRIGGER + "raise ValueError('step seven')"),
        "failed",
        rf"ValueError: step seven {LINE}",
    ),
    "keyboard": (
        before(FIRST, TRIGGER + "raise KeyboardInterrupt('mine')"),
        "failed",
        rf"^KeyboardInterrupt: mine {LINE}$",
    ),
    "stop": (
        before(FIRST, "class Stop(BaseException): pass", TRIGGER + "raise Stop('enough')"),
        "failed",
        rf"^Stop: enough {LINE}$",
    ),
    "stop_at_import": (
        before("import torch\n", "raise GeneratorExit('no')"),
        "failed",
        rf"^GeneratorExit: no {LINE}$",
    ),
    "sys_exit": (
        before(FIRST, TRIGGER + "raise SystemExit(0)"),
        "failed",
        rf"SystemExit: 0 {LINE}",
    ),
    "nan_loss": (
        before(LOSS, TRIGGER + "g = v_real / 0 * 0; loss = loss * g.mean()"),
        "diverged",
        "^student: loss is nan at update 7, step 7, first in `g`$",
    ),
    "nan_gradient": (
        before(LOSS, TRIGGER + "loss = loss + (x * 0).sum().abs().sqrt()"),
        "diverged",
        "^student: gradient norm is nan at update 7, step 7$",
    ),
    "nan_scalar": (
        before(FIRST, TRIGGER + "return {'fine': torch.ones(()), 'spread': torch.ones(()) / 0}"),
        "diverged",
        "^spread is inf at step 7$",
    ),
    "nan_weights": (
        before(
            LOSS,
            "if step.index == step.total - 1 > 0:",
            "    for p in self.student.averaged().parameters():",
            "        p.data.fill_(float('nan'))",
        ),
        "diverged",
        "samples at nfe=1 are not finite",
    ),
    "shape": ((LAST_ONE, "        return noise[:, :1]\n"), "failed", "sample returned"),
    "oom": (before(FIRST, TRIGGER + "torch.empty(1 << 50)"), "oom", rf"allocate memory.*{LINE}"),
    "oom_python": (before(FIRST, TRIGGER + "bytearray(1 << 60)"), "oom", "^MemoryError"),
    "refused_needs": (
        before(NEEDS, "from distillbench.errors import Refused as R; raise R('no labels')"),
        "refused",
        "^no labels$",
    ),
    "refused_init": (
        before(
            INIT,
            "from distillbench.errors import Refused",
            "if not task.classes: raise Refused('no classes')",
        ),
        "refused",
        "^no classes$",
    ),
}

# Through the command line, since these need a watcher.
DEADLY = {
    "os_exit": (
        before(FIRST, TRIGGER + "import os; os._exit(0)"),
        "failed",
        "^the process died 2 times: exit code 0 in training after 7 steps$",
    ),
    "os_exit_2": (
        before(FIRST, TRIGGER + "import os; os._exit(2)"),
        "failed",
        "exit code 2 in training after 7 steps",
    ),
    "segfault": (
        before(FIRST, TRIGGER + "import ctypes; ctypes.string_at(0)"),
        "failed",
        rf"SIGSEGV in training after 7 steps {LINE}$",
    ),
    "abort": (
        before(FIRST, TRIGGER + "import os; os.abort()"),
        "failed",
        rf"SIGABRT in training after 7 steps {LINE}$",
    ),
    "dies_at_import": (
        before("import torch\n", "import os; os._exit(3)"),
        "failed",
        "exit code 3 in set-up",
    ),
}
# Through the command line too, all at once, since they take long.
SLOW = {
    "hang": (
        before(FIRST, TRIGGER + SLEEP),
        "hung",
        rf"^nothing ended for STALL s in training after 7 steps {LINE}$",
    ),
    "hang_in_sampling": (
        before(LAST_ONE, SLEEP),
        "hung",
        rf"^nothing ended for STALL s in sampling after 0 batches {LINE}$",
    ),
    # a loop in C that neither releases the interpreter's lock nor looks for signals
    "hang_native": (
        before(
            FIRST,
            TRIGGER
            + "import itertools, collections; collections.deque(itertools.repeat(0), maxlen=0)",
        ),
        "hung",
        rf"^nothing ended for STALL s in training after 7 steps {LINE}$",
    ),
    "hang_stubborn": (
        before(
            FIRST,
            TRIGGER.strip(),
            "    while True:",
            "        try:",
            f"            {SLEEP}",
            "        except BaseException: pass",
        ),
        "hung",
        rf"in training after 7 steps {LINE}$",
    ),
    "own_alarm": (
        before(
            FIRST, "import signal; signal.signal(signal.SIGALRM, lambda *_: None)", TRIGGER + SLEEP
        ),
        "hung",
        rf"in training after 7 steps {LINE}$",
    ),
    "timeout": (
        before(FIRST, "import time; time.sleep(0.5 * (step.total > 9))"),
        "timeout",
        rf"^more than TIMEOUT s, in training after \d+ steps \(({OURS})\.py:\d+\)$",
    ),
}


def limited(made: Checkout, seconds: int) -> None:
    """Benchmarks like tiny-ring, one with a limit on stalls, one on a cell's time."""
    for name, limit in (("limited", f"stall_s: {seconds}"), ("short", f"timeout_s: {2 * seconds}")):
        text = RING.replace("tiny-ring", name).replace("timeout_s: 3600", limit)
        made.write(f"workflows/benchmarks/{name}.yaml", text)


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """A checkout with a trained teacher of tiny-ring, and of its copies with limits of seconds.

    Limits are no part of a key.
    """
    made = Checkout(tmp_path_factory.mktemp("ground"))
    trained = made.run("distillbench", "train", "tiny-ring", "teacher", "--seeds", "0")
    assert trained.returncode == 0, trained.stderr
    limited(made, LIMITS[-1])
    for name in ("limited", "short"):  # the keys are those of tiny-ring
        runs = made.folder / "results/runs"
        shutil.copytree(runs / "tiny-ring", runs / name)
    for name, (change, _, _) in (RAISED | DEADLY | SLOW).items():
        shutil.copytree(made.folder / "methods/dmd", made.folder / f"methods/{name}")
        edit(made.folder / f"methods/{name}/method.py", *change)
    return made


@pytest.fixture
def here(ground: Checkout, monkeypatch: pytest.MonkeyPatch) -> Checkout:
    monkeypatch.chdir(ground.folder)
    return ground


def quiet(*_: object) -> None:
    pass


def record_of(made: Cell) -> dict:
    return json.loads(made.record.read_text())


@pytest.mark.parametrize("name", list(RAISED))
def test_what_a_method_raises_costs_its_own_row(
    here: Checkout, monkeypatch: pytest.MonkeyPatch, name: str
):
    monkeypatch.setattr(train, "limit_memory", quiet)  # of this process
    monkeypatch.setattr(torch, "set_flush_denormal", quiet)
    _, status, reason = RAISED[name]
    made = cell(arm=name)
    with made.locked():
        train.run_cell(made, quiet)
    record = record_of(made)
    assert record["status"] == status and re.search(reason, record["reason"]), record["reason"]
    assert not list(made.folder.glob(".*"))
    if name == "stop_at_import":
        assert "does not import (GeneratorExit: no)" in str(
            validate.validate_here(made.benchmark, made.arm)
        )


@pytest.mark.parametrize("name", list(DEADLY))
def test_what_kills_the_process_costs_its_own_row(here: Checkout, name: str):
    """A record, exit code 0, no traceback on the terminal."""
    _, status, reason = DEADLY[name]
    done = here.run(
        "distillbench",
        "train",
        "tiny-ring",
        name,
        "--seeds",
        "0,1" if name == "dies_at_import" else "0",
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    record = record_of(cell(arm=name))
    assert record["status"] == status and re.search(reason, record["reason"]), record["reason"]
    if name == "dies_at_import":
        assert record_of(cell(arm=name, seed=1))["status"] == "failed"
        assert record_of(cell(arm=None, seed=1))["status"] == "done", "its teacher is not blamed"
        return
    starts = [line["start"] for line in journal.read(cell(arm=name).folder) if "start" in line]
    assert starts == [0, AT, AT], (
        "it is tried again from its checkpoint until it dies twice at one step"
    )
    if name in ("segfault", "abort"):  # faulthandler's own words
        assert f"methods/{name}/method.py" in (cell(arm=name).folder / "traceback.txt").read_text()


def test_what_hangs_or_takes_too_long_costs_its_own_row(here: Checkout):
    left = list(SLOW)
    for seconds in LIMITS:
        limited(here, seconds)
        left = [name for name in left if not found_slow(here, left, seconds)[name]]
        if not left:
            break
        for name in left if seconds != LIMITS[-1] else ():
            shutil.rmtree(slow_cell(name).folder)
    limited(here, LIMITS[-1])
    assert not left, {name: record_of(slow_cell(name)) for name in left}


def slow_cell(name: str) -> Cell:
    return cell("short" if name == "timeout" else "limited", name)


def found_slow(here: Checkout, names: list[str], seconds: int) -> dict[str, bool]:
    """Whether each of these methods of SLOW, run together, ends as it should under these limits.

    Whatever ends it, it has a record of a limit that it met, and the command ends in order.
    """
    found = {}
    with ExitStack() as stack:
        running = {name: launched(here, slow_cell(name).benchmark.name, name) for name in names}
        for process in running.values():
            stack.enter_context(until_end(process))
        for name, process in running.items():
            _, errors = process.communicate()
            assert process.returncode == 0 and "Traceback" not in errors, errors
            _, status, words = SLOW[name]
            made = slow_cell(name)
            record = record_of(made)
            assert record["status"] in ("hung", "timeout"), record
            reason = words.replace("STALL", str(seconds)).replace("TIMEOUT", str(2 * seconds))
            found[name] = record["status"] == status and bool(re.search(reason, record["reason"]))
            if found[name]:
                lines = journal.read(made.folder)
                assert [line["start"] for line in lines if "start" in line] == [0]
            if found[name] and name in ("hang_native", "hang_stubborn", "own_alarm"):
                text = (made.folder / "traceback.txt").read_text()
                assert f"methods/{name}/method.py" in text
    return found


def test_the_watcher_of_a_healthy_method_does_nothing(here: Checkout):
    """A cell that takes longer than the limit on stalls, none of whose steps does, is done."""
    made = cell("limited", "dmd")
    for seconds in (1, *LIMITS):
        limited(here, seconds)
        done = here.run("distillbench", "train", "limited", "dmd", "--seeds", "0")
        assert done.returncode == 0, done.stderr
        if record_of(made)["status"] == "done" or seconds == LIMITS[-1]:
            break
        shutil.rmtree(made.folder)
    assert record_of(made)["status"] == "done", done.stderr
    assert not list(made.folder.glob("checkpoint*")), "a finished cell keeps no checkpoint"
    lines, steps = journal.read(made.folder), record_of(made)["cost"]["steps"]
    assert [line["step"] for line in lines if "step" in line] == list(range(steps))
    assert lines[0]["start"] == 0 and lines[-1] == {"checkpoint": steps}


def finished(made: Cell) -> None:
    """A record, as a worker without torch may write it."""
    made.folder.mkdir(parents=True, exist_ok=True)
    write_json(made.record, {"status": "done"})


def brief(folder: Path, seed: int = 0, timeout_s: float = 2, stall_s: float = 2) -> Cell:
    """A cell with these limits, in a folder of its own."""
    made = cell(seed=seed)
    limits = {"timeout_s": timeout_s, "stall_s": stall_s}
    made = Cell(made.benchmark.model_copy(update=limits), made.arm, seed)
    vars(made)["folder"] = folder / str(seed)
    return made


def waits_for_the_lock(pulse: Pulse, seconds: float) -> None:
    pulse.enter(0)
    with pulse.limits():
        pass
    time.sleep(seconds)
    pulse.enter(0)


def is_stopped(pulse: Pulse, seconds: float) -> None:
    """By Ctrl-Z, and then fg."""
    pulse.enter(0)
    later = ["sh", "-c", f"sleep {seconds}; kill -CONT {os.getpid()}"]
    with pulse.limits(), subprocess.Popen(later):
        os.kill(os.getpid(), signal.SIGSTOP)


@pytest.mark.parametrize("idle", [waits_for_the_lock, is_stopped])
def test_time_in_which_nothing_can_happen_is_not_counted(
    here: Checkout, tmp_path: Path, idle: Callable[[Pulse, float], None]
):
    """Idle for longer than the limit, at work for a part of it, whatever the limit is."""
    for limit in (2, *LIMITS):
        made = brief(tmp_path / str(limit), timeout_s=limit, stall_s=limit)

        def work(pulse: Pulse, limit: float = limit, made: Cell = made) -> None:
            idle(pulse, 1.5 * limit)
            with pulse.limits():
                time.sleep(0.25 * limit)
            if pulse.seconds() < limit:
                finished(made)

        supervise([made], work)
        if made.result() == {"status": "done"}:
            return
    raise AssertionError(made.result())


def test_earlier_processes_count_for_the_time_limit(here: Checkout, tmp_path: Path):
    def work(pulse: Pulse) -> None:
        pulse.enter(0)
        pulse.earlier = 2 * LONG
        with pytest.raises(TimedOut), pulse.limits():
            time.sleep(LONG)
        finished(made)

    made = brief(tmp_path, timeout_s=2 * LONG + 0.1, stall_s=LONG)
    supervise([made], work)
    assert made.result() == {"status": "done"}


@pytest.mark.parametrize("recorded", [False, True])
def test_deaths_outside_of_a_cell_end_the_command_and_leave_no_record(
    here: Checkout, tmp_path: Path, capsys, recorded: bool
):
    """A worker that dies importing torch, say, once or again and again."""
    first, second = brief(tmp_path), brief(tmp_path, 1)
    if recorded:
        finished(first)

    def work(pulse: Pulse) -> None:
        if recorded:
            pulse.enter(0)
        if os.environ.get("ONCE") and (tmp_path / "died").exists():
            for one in (first, second):
                finished(one)
            return
        (tmp_path / "died").touch()
        os._exit(3)

    with pytest.raises(
        UserError, match=r"^the process died 2 times before any cell began: exit code 3: "
    ):
        supervise([first, second], work)
    assert second.result() is None and (first.result() is None) != recorded
    assert capsys.readouterr().err.count("starting it again") == 1
    (tmp_path / "died").unlink()
    with pytest.MonkeyPatch.context() as m:
        m.setenv("ONCE", "1")
        supervise([first, second], work)
    assert second.result() == {"status": "done"}


class Gone:
    """A terminal that was closed."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    def flush(self) -> None:
        raise OSError(errno.EIO, "Input/output error")

    def isatty(self) -> bool:
        return False


@pytest.mark.parametrize(
    "error,code", [(UserError("no"), 2), (KeyboardInterrupt(), 130), (GeneratorExit(), 1)]
)
def test_a_worker_ends_in_order_without_a_terminal(
    here: Checkout, tmp_path: Path, error: BaseException, code: int
):
    def work(pulse: Pulse) -> None:
        sys.stderr = Gone()  # type: ignore[assignment]
        raise error

    with pytest.raises(SystemExit) as ended:
        supervise([brief(tmp_path)], work)
    assert ended.value.code == code


def test_progress_without_a_terminal_is_no_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0)
    monkeypatch.setattr(sys, "stderr", Gone())
    report = progress.reporter("a cell")
    report("training", 0, 2)
    report("training", 1, 2)


def test_a_command_whose_reader_is_gone_goes_on(here: Checkout):
    done = here.run(
        "bash", "-c", "distillbench train tiny-ring meanflow --seeds 0 2> >(exec true); echo $?"
    )
    assert done.stdout == "0\n" and record_of(cell())["status"] == "done"
    shutil.rmtree(cell().folder)


@pytest.mark.parametrize("number", MACHINE)
def test_an_error_of_the_machine_leaves_no_record(
    here: Checkout, monkeypatch: pytest.MonkeyPatch, number: int
):
    def broken(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(train, "price", broken)
    leaves_no_record(monkeypatch, Pulse(), UserError, re.escape(os.strerror(number)))


@pytest.mark.parametrize("method", ["swallows", "converts"])
def test_what_a_method_makes_of_ctrl_c_leaves_no_record(
    here: Checkout, monkeypatch: pytest.MonkeyPatch, method: str
):
    original, pulse = one_step, Pulse()

    def step(*args: Any) -> dict[str, torch.Tensor]:
        pulse.interrupted = 1
        if method == "converts":
            raise ValueError("stopped")
        return original(*args)

    monkeypatch.setattr(loop, "one_step", step)
    leaves_no_record(monkeypatch, pulse, KeyboardInterrupt, "^$")


def leaves_no_record(
    monkeypatch: pytest.MonkeyPatch, pulse: Pulse, error: type[BaseException], words: str
) -> None:
    monkeypatch.setattr(train, "limit_memory", quiet)
    monkeypatch.setattr(torch, "set_flush_denormal", quiet)
    made = cell()
    with made.locked(), pytest.raises(error, match=words):
        train.run_cell(made, quiet, pulse)
    assert made.result() is None and not list(made.folder.glob("checkpoint*")), (
        "a step that was cut short is not saved"
    )


def test_a_process_that_a_method_forks_does_not_keep_the_lock(tmp_path: Path):
    with lock(tmp_path / "lock"):
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
        assert is_locked(tmp_path / "lock")
    try:
        end = time.monotonic() + LONG
        while is_locked(tmp_path / "lock"):  # until the child came to its first instruction
            assert time.monotonic() < end
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_failed_teacher_costs_the_rows_of_its_seed(checkout: Checkout):
    """Its students are refused, those of other seeds are not, and the table says so."""
    checkout.write(
        "workflows/tables/tiny-ring.yaml",
        "{name: tiny-ring, title: t, benchmarks: [tiny-ring], methods: [dmd]}\n",
    )
    teacher, student = cell(arm=None), cell(arm="dmd")
    teacher.folder.mkdir(parents=True)
    finish(
        teacher, describe(teacher) | {"status": "hung", "reason": "nothing ended"}, None, 1, None
    )
    done = checkout.run("distillbench", "train", "tiny-ring", "dmd")
    assert done.returncode == 0, done.stderr
    reason = "its teacher ended as hung: nothing ended"
    assert (record_of(student)["status"], record_of(student)["reason"]) == ("refused", reason)
    assert (
        f"REFUSED: {reason} in " in done.stderr
        and f"; to try again delete {teacher.record} and {student.record}\n" in done.stderr
    )
    other = cell(arm="dmd", seed=1)
    assert record_of(other)["status"] == "done"
    assert re.search(
        r"tiny-ring/dmd +REFUSED +trained",
        checkout.run("distillbench", "status", "tiny-ring").stdout,
    )
    for arm in ("teacher", "dmd"):
        assert checkout.run("distillbench", "evaluate", "tiny-ring", arm).returncode == 0
    assert checkout.run("distillbench", "table", "tiny-ring").returncode == 0
    page = checkout.folder / "results/tiny-ring.md"
    assert f"1 of 2 REFUSED: {reason}" in page.read_text()


def test_provenance_without_git(here: Checkout, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "")
    found = provenance(cell())
    assert found["commit"] is None and not found["dirty"] and found["versions"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGUSR2, signal.SIGINT])
@pytest.mark.parametrize("whom", ["worker", "watcher"])
def test_somebody_who_ends_the_process_leaves_no_record(here: Checkout, whom: str, number: int):
    """A process ended from outside leaves no record, however often at one step, and can go on.

    Asked to leave, a process saves the step it was at.
    """
    process, folder = started(here, f"{whom}{number}", "time.sleep(0.06)")
    with until_end(process):
        wait_for(folder / LAST)
        (worker,) = children(process.pid)
        os.kill(worker if whom == "worker" else process.pid, number)
        _, errors = process.communicate()
        assert not (folder / "result.json").exists() and "Traceback" not in errors
        wait_for_no(Path(f"/proc/{worker}"))
    if number == signal.SIGKILL:
        assert process.returncode == (2 if whom == "worker" else -9)
        assert "continues" in errors or whom == "watcher"
    else:
        assert (
            process.returncode == 130
            and errors.strip() == "distillbench: interrupted; the same command continues"
        )
    assert (folder / LAST).is_file() and not list(folder.glob(".*"))
    lines = journal.read(folder)
    checkpoints = [line["checkpoint"] for line in lines if "checkpoint" in line]
    if number in (signal.SIGTERM, signal.SIGUSR2):
        # not one of the twenty: nothing is repeated
        assert lines[-1] == {"checkpoint": lines[-2]["step"] + 1}
    done = here.run("distillbench", "train", "tiny-ring", f"{whom}{number}", "--seeds", "0")
    assert done.returncode == 0 and record_of(cell(arm=f"{whom}{number}"))["status"] == "done"
    starts = [line["start"] for line in journal.read(folder) if "start" in line]
    assert len(starts) == 2 and starts[1] in (checkpoints[-1], checkpoints[-1] + 1)


def started(here: Checkout, name: str, every_step: str) -> tuple[Command, Path]:
    """`distillbench train` of a copy of dmd with one more line in every step, in its own group."""
    shutil.copytree(here.folder / "methods/dmd", here.folder / f"methods/{name}")
    edit(here.folder / f"methods/{name}/method.py", *before(FIRST, f"import time; {every_step}"))
    return launched(here, "tiny-ring", name), cell(arm=name).folder


def launched(here: Checkout, benchmark: str, name: str) -> Command:
    words = ("train", benchmark, name, "--seeds", "0")
    return here.start("distillbench", *words, new_session=True)


class until_end:
    """Nothing that a failed assertion left behind keeps running."""

    def __init__(self, process: Command):
        self.process = process

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def wait_for(path: Path, seconds: float = LONG) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, path
        time.sleep(0.01)


def wait_for_no(path: Path, seconds: float = LONG) -> None:
    end = time.monotonic() + seconds
    with suppress(FileNotFoundError, ProcessLookupError):  # gone between two looks
        while (
            state := (path / "status").read_text().partition("State:")[2][:4]
        ) and "Z" not in state:
            assert time.monotonic() < end, path
            time.sleep(0.01)


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


OOM = """
import itertools, sys
from distillbench.cells import supervisor
from distillbench.cli import main
if {counted}: supervisor.oom_kills = itertools.count().__next__
sys.argv = "distillbench train tiny-ring kills_itself --seeds 0".split()
main.main()
"""


def test_a_kill_for_lack_of_memory_is_told_from_a_kill_by_somebody(here: Checkout):
    """The kernel's count of such kills decides: without it ten deaths at one step are no record."""
    shutil.copytree(here.folder / "methods/dmd", here.folder / "methods/kills_itself")
    edit(
        here.folder / "methods/kills_itself/method.py",
        *before(FIRST, TRIGGER + "import os; os.kill(os.getpid(), 9)"),
    )
    made = cell(arm="kills_itself")
    for _ in range(3):
        done = here.run("python", "-c", OOM.format(counted=False))
        assert (
            done.returncode == 2
            and "was killed (SIGKILL); the same command continues" in done.stderr
        )
        assert not made.record.exists() and len(done.stderr.strip().splitlines()) == 1
    done = here.run("python", "-c", OOM.format(counted=True))
    assert done.returncode == 0, done.stderr
    record = record_of(made)
    assert (
        record["status"] == "oom"
        and record["reason"]
        == "killed by the kernel for lack of memory 2 times, in training after 7 steps"
    )


LIMITED = """
import torch
from distillbench.cells import memory
memory.available = lambda: 1 << 28
if {limit}: memory.limit_memory()
try:
    torch.empty(1 << 29).fill_(0)[0]
except RuntimeError as e:
    print(memory.is_out_of_memory(e))
layer = torch.nn.Linear(64, 64)
layer(torch.randn(8, 64)).sum().backward()
"""


def test_a_greedy_process_gets_an_error_and_its_neighbours_live(here: Checkout):
    code = LIMITED.format(limit=True)
    assert here.run(sys.executable, "-c", code).stdout == "True\n"
    # Planted: no limit
    assert (
        here.run(
            sys.executable, "-c", code.replace("if True", "if False").replace(".fill_(0)", "")
        ).stdout
        == ""
    )


def test_memory_that_is_left_is_that_of_the_machine_and_of_the_control_groups(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    texts = {
        "/proc/meminfo": "MemTotal: 9 kB\nMemAvailable:  1000 kB\nSwapFree: 24 kB\n",
        "/proc/self/cgroup": "",
    }
    monkeypatch.setattr(memory, "_text", lambda path: texts.get(str(path), ""))
    assert memory.available() == 1 << 20
    texts["/proc/self/cgroup"] = "0::/slurm/job_1/step_0\n"
    texts |= {
        "/sys/fs/cgroup/slurm/job_1/memory.max": "500000",
        "/sys/fs/cgroup/slurm/job_1/memory.current": "300000",
    }
    assert memory.available() == 200000
    texts["/sys/fs/cgroup/slurm/job_1/memory.stat"] = (
        "anon 1\ninactive_file 100000\n"  # cache of files is given back
    )
    texts["/sys/fs/cgroup/slurm/job_1/step_0/memory.max"] = "max"
    assert memory.available() == 300000
    texts["/proc/self/cgroup"] = "5:cpu:/a\n4:memory:/a\n"
    texts |= {
        "/sys/fs/cgroup/memory/a/memory.limit_in_bytes": "70000",
        "/sys/fs/cgroup/memory/a/memory.usage_in_bytes": "60000",
    }
    assert memory.available() == 10000
    texts.clear()
    assert memory.available() is None


def test_a_beat_is_cheap():
    """Less than 1 % of a step of a millisecond, in time of this process."""
    pulse = Pulse.shared()
    start = time.process_time()
    for i in range(100_000):
        pulse.beat(TRAINING, i)
    assert (time.process_time() - start) / 100_000 < 1e-5


# What was on disk when the process ended


def interrupt(pulse: Pulse) -> None:
    """As the worker's handler of Ctrl-C does."""
    pulse.interrupted = 1
    raise KeyboardInterrupt


@pytest.fixture
def interrupted(
    here: Checkout, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Cell, list[dict[str, float]]]]:
    """meanflow, killed after 30 steps with a checkpoint each, and the uninterrupted run's lines."""
    monkeypatch.setattr(train, "limit_memory", quiet)
    monkeypatch.setattr(torch, "set_flush_denormal", quiet)
    made = cell(arm="meanflow")
    shutil.rmtree(made.folder, ignore_errors=True)
    with made.locked():
        train.run_cell(made, quiet)
        expected = [line for line in journal.read(made.folder) if "step" in line]
        shutil.rmtree(made.folder)
        original, pulse = one_step, Pulse()

        def killed(*args):
            if args[1] == 30:
                interrupt(pulse)
            return original(*args)

        with monkeypatch.context() as m:
            m.setattr(loop, "one_step", killed)
            made.folder.mkdir()
            with pytest.raises(KeyboardInterrupt):
                train.run_cell(made, quiet, pulse)
    yield made, expected
    shutil.rmtree(made.folder)


def resumed(made: Cell) -> tuple[list[int], list[dict[str, float]]]:
    """Starts and step lines after the same command."""
    with made.locked():
        assert train.run_cell(made, quiet)["status"] == "done"
    lines = journal.read(made.folder)
    return [line["start"] for line in lines if "start" in line], [
        line for line in lines if "step" in line
    ]


def save_every(made: Cell) -> int:
    (start,) = [line for line in journal.read(made.folder) if "start" in line]
    return max(1, start["steps"] // CHECKPOINTS)


def test_a_resumed_cell_repeats_what_came_after_its_checkpoint_and_nothing_else(interrupted):
    made, expected = interrupted
    k = 30 // save_every(made) * save_every(made)
    starts, steps = resumed(made)
    assert starts == [0, k]
    assert steps == expected[:30] + expected[k:], (
        "lines of steps after the checkpoint come again, and are equal"
    )


@pytest.mark.parametrize("torn", [b'{"step": 29, "lo', b"{", b'{"step": 30, "loss": 1.5}'])
def test_an_unfinished_last_line_is_cut(interrupted, torn: bytes):
    made, expected = interrupted
    k = 30 // save_every(made) * save_every(made)
    with open(made.folder / NAME, "ab") as f:
        f.write(torn)
    assert journal.read(made.folder)  # status reads it too
    _, steps = resumed(made)
    assert steps == expected[:30] + expected[k:]
    assert all(json.loads(line) for line in (made.folder / NAME).read_text().splitlines())


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "missing"])
@pytest.mark.parametrize("which", ["last", "both"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    interrupted, capsys, damage: str, which: str
):
    made, expected = interrupted
    every = save_every(made)
    k = 30 // every * every - every if which == "last" else 0
    for name in (LAST, PREVIOUS)[: 1 if which == "last" else 2]:
        path = made.folder / name
        data = path.read_bytes()
        middle = len(data) * 3 // 4
        if damage == "missing":  # killed between two renames
            path.unlink()
        else:
            flipped = data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :]
            path.write_bytes({"cut": data[:middle], "empty": b"", "flipped": flipped}[damage])
    starts, steps = resumed(made)
    assert starts == [0, k] and steps == expected[:30] + expected[k:]
    warnings = [line for line in capsys.readouterr().err.splitlines() if "damaged" in line]
    assert len(warnings) == (0 if damage == "missing" else 1 if which == "last" else 2)


def test_a_checksum_sees_one_bit():
    tensors = {"a": torch.zeros(3, 3), "b": torch.tensor(7), "c": torch.zeros(0)}
    before = checksum(tensors)
    tensors["a"][2, 2] = 1e-30
    assert checksum(tensors) != before and issubclass(Damaged, UserError)


def test_a_resumed_cell_has_the_seconds_of_all_its_processes(interrupted):
    made, _ = interrupted
    state, words = read_tensors(made.folder / LAST)
    assert 0 < float(words["seconds"]) < 600
    write_tensors(made.folder / LAST, state, **(words | {"seconds": 1000}))
    (made.folder / "traceback.txt").write_text("of an earlier failure")
    resumed(made)
    assert 1000 < record_of(made)["cost"]["seconds"] < 1600
    assert not (made.folder / "traceback.txt").exists()


def test_a_checkpoint_that_cannot_be_written_costs_none(
    interrupted, monkeypatch: pytest.MonkeyPatch
):
    made, _ = interrupted
    before = {p.name: p.read_bytes() for p in made.folder.glob("checkpoint*")}
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(UserError, match=r"checkpoint\.safetensors: cannot be written"):
        save_progress(made.folder, made.key, 31, 1.0, {}, {})
    assert (
        len(before) == 2
        and {p.name: p.read_bytes() for p in made.folder.glob("*checkpoint*")} == before
    )


def test_a_state_of_other_things_than_tensors_is_named(tmp_path):
    with pytest.raises(TypeError, match=r"state_dict\(\)\['seen'\] is of type int"):
        save_progress(tmp_path, "key", 1, 1.0, {}, {"seen": 3})


def test_a_kill_between_record_and_end_leaves_no_checkpoint(here: Checkout):
    made = cell()
    finished(made)
    (made.folder / LAST).touch()
    assert (
        here.run("distillbench", "train", "tiny-ring", "meanflow", "--seeds", "0").returncode == 0
    )
    assert not (made.folder / LAST).exists()
    shutil.rmtree(made.folder)


def test_a_kill_between_training_and_record_does_not_train_again(
    interrupted, monkeypatch: pytest.MonkeyPatch
):
    made, _ = interrupted
    with monkeypatch.context() as m:
        m.setattr(sampling, "sample", lambda *_, pulse: interrupt(pulse))
        with made.locked(), pytest.raises(KeyboardInterrupt):
            train.run_cell(made, quiet)
    trained = len([line for line in journal.read(made.folder) if "step" in line])
    starts, steps = resumed(made)
    assert len(steps) == trained and starts[-1] == journal.read(made.folder)[0]["steps"]


def test_ctrl_c_in_the_middle_of_a_write_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "a").write_bytes(b"before")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "a", b"after")
    assert [p.name for p in tmp_path.iterdir()] == ["a"] and (
        tmp_path / "a"
    ).read_bytes() == b"before"
