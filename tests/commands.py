"""Processes of tests: the real command lines, begun by the zygote or, where that matters, anew."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from functools import cache
from pathlib import Path
from typing import IO

from tests import shim

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
LONG = 600.0  # seconds after which a command is stuck, on however busy a machine
SHIMS = ("python", "distillbench", "snakemake")


def real_environment() -> dict[str, str]:
    """Of a checkout's commands: the packages under test, one thread each."""
    return os.environ | {
        "PYTHONPATH": str(ROOT),
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }


@cache
def zygote_environment() -> dict[str, str]:
    """Variables by which a command finds this process's zygote, started here; {} without one."""
    if sys.platform != "linux":
        return {}
    folder = Path(tempfile.mkdtemp(prefix="zygote-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for name in SHIMS:
        program = folder / name
        program.write_text(
            f'#!/bin/sh\nexec "{sys.executable}" -ISE "{shim.__file__}" {name} "$@"\n'
        )
        program.chmod(0o755)
    address = folder / "socket"
    command = [sys.executable, "-m", "tests.zygote", str(address)]
    log = open(folder / "log", "wb")  # noqa: SIM115 (until this process ends)
    server = subprocess.Popen(
        command, cwd=ROOT, env=real_environment(), stdin=subprocess.PIPE, stdout=log, stderr=log
    )
    atexit.register(_stop, server)
    while not address.exists():
        assert server.poll() is None, (folder / "log").read_text(encoding="utf-8")
        time.sleep(0.02)
    return {shim.SOCKET: str(address), shim.REAL: str(BIN)}


def _stop(server: subprocess.Popen) -> None:
    """End of the zygote, which comes with the end of its standard input."""
    assert server.stdin is not None
    server.stdin.close()
    server.wait()


def environment() -> dict[str, str]:
    """Of a checkout's commands, begun by the zygote wherever they are begun from."""
    found = real_environment()
    ours = zygote_environment()
    if ours:
        folder = Path(ours[shim.SOCKET]).parent
        found |= ours | {"PATH": f"{folder}{os.pathsep}{found['PATH']}"}
    return found


class Command:
    """A running process, of the zygote's or anew, as subprocess.Popen; its output is in files."""

    def __init__(
        self,
        command: tuple[str, ...],
        folder: Path,
        environment: dict[str, str],
        new_session: bool = False,
    ):
        self.command = command
        self.returncode: int | None = None
        self._files: tuple[IO[bytes], IO[bytes]] = (
            tempfile.TemporaryFile(),  # noqa: SIM115
            tempfile.TemporaryFile(),  # noqa: SIM115
        )
        self._ended = threading.Event()
        out, err = self._files
        with open(os.devnull, "rb") as nothing:
            found = shim.request(
                command,
                str(folder),
                environment,
                (nothing.fileno(), out.fileno(), err.fileno()),
                new_session,
            )
            if found is None:
                process = subprocess.Popen(
                    command,
                    cwd=folder,
                    env=environment,
                    stdin=nothing,
                    stdout=out,
                    stderr=err,
                    start_new_session=new_session,
                )
        if found is None:
            self.pid = process.pid
            waiter = threading.Thread(target=self._wait_for, args=(process,), daemon=True)
        else:
            connection, self.pid = found
            waiter = threading.Thread(target=self._listen, args=(connection,), daemon=True)
        waiter.start()

    def _wait_for(self, process: subprocess.Popen) -> None:
        self.returncode = process.wait()
        self._ended.set()

    def _listen(self, connection: socket.socket) -> None:
        try:
            self.returncode = os.waitstatus_to_exitcode(int(shim.answer(connection)))
        except (OSError, EOFError):
            self.returncode = -signal.SIGKILL
        connection.close()
        self._ended.set()

    def poll(self) -> int | None:
        """Exit code, or None while it runs."""
        return self.returncode if self._ended.is_set() else None

    def wait(self, timeout: float = LONG) -> int:
        """Exit code; subprocess.TimeoutExpired where it goes on."""
        if not self._ended.wait(timeout):
            raise subprocess.TimeoutExpired(self.command, timeout, *self.output())
        assert self.returncode is not None
        return self.returncode

    def output(self) -> tuple[str, str]:
        """All that it has written to its standard output and error so far."""
        texts = []
        for stream in self._files:
            size = os.fstat(stream.fileno()).st_size
            texts.append(os.pread(stream.fileno(), size, 0).decode("utf-8", "replace"))
        return texts[0], texts[1]

    def communicate(self, timeout: float = LONG) -> tuple[str, str]:
        """Its output when it has ended."""
        self.wait(timeout)
        return self.output()

    def send_signal(self, number: int) -> None:
        """To the process alone; nothing where it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it at once."""
        self.send_signal(signal.SIGKILL)


def run(
    command: tuple[str, ...], folder: Path, environment: dict[str, str], timeout: float = LONG
) -> subprocess.CompletedProcess[str]:
    """A command to its end; killed after `timeout` seconds."""
    started = Command(command, folder, environment)
    try:
        out, err = started.communicate(timeout)
    except BaseException:
        started.kill()
        raise
    assert started.returncode is not None
    return subprocess.CompletedProcess(command, started.returncode, out, err)
