"""Runs the commands of tests in forks of a process that has imported what they import.

A test that starts `distillbench`, `snakemake` or one of our modules by `python -m` gets a process
of its own with that command's arguments, folder, environment, streams and signals, as if it had
been executed, less the seconds that every import of torch takes. The zygote itself does nothing
but import, so no state passes from one command to another.

`python -m tests.zygote SOCKET` serves until its standard input ends. Linux only.
"""

from __future__ import annotations

import array
import atexit
import contextlib
import importlib
import io
import json
import os
import runpy
import selectors
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import NoReturn

from tests.shim import CONSTANTS, REAL, SOCKET

ROOT = Path(__file__).parents[1]
PROGRAMS = ("distillbench", "snakemake")
OURS = ("distillbench", "eval", "snakemake")  # packages whose modules `python -m` runs here
TREES = ("distillbench", "eval")  # all of whose modules are imported
LATE = (  # what others import only where they use it
    *("torch._dynamo", "torch.distributed", "torch.optim", "torch.utils.flop_counter"),
    *("sklearn.datasets", "scipy.linalg", "matplotlib.pyplot", "pandas", "tabulate"),
    *("snakemake.cli", "snakemake.api", "snakemake.workflow", "snakemake.executors.local"),
)


def module_of(command: list[str]) -> str | None:
    """The program or module that a command runs, None where that is not known here."""
    program, *words = command
    if program in PROGRAMS:
        return program
    if program == "python" and words[:1] == ["-c"]:
        return words[0]
    if len(words) > 1 and words[0] == "-m" and words[1].partition(".")[0] in OURS:
        return words[1]
    return None


class Zygote:
    """Serves requests of tests/shim.py, one connection for each command."""

    def __init__(self, listener: socket.socket):
        self.listener = listener
        self.selector = selectors.DefaultSelector()
        self.commands: dict[socket.socket, int] = {}  # pid of each connection's command

    def serve(self) -> None:
        """Fork for every request, and answer it with the process id and, at its end, its status."""
        own_path = os.environ["PYTHONPATH"]
        self.selector.register(self.listener, selectors.EVENT_READ)
        self.selector.register(sys.stdin, selectors.EVENT_READ)
        while True:
            for key, _ in self.selector.select():
                if key.fileobj is sys.stdin:
                    return
                if key.fileobj is self.listener:
                    connection, _ = self.listener.accept()
                    self.start(connection, own_path)
                elif isinstance(key.fileobj, socket.socket):
                    self.abandon(key.fileobj)
                else:
                    self.finish(*key.data)

    def start(self, connection: socket.socket, own_path: str) -> None:
        """Fork for the command that a connection asks for."""
        try:
            size, control, _, _ = connection.recvmsg(4, socket.CMSG_SPACE(12))
            streams = array.array("i", control[0][2])
            asked = json.loads(received(connection, int.from_bytes(size, "big")))
        except (OSError, EOFError, IndexError):
            connection.close()
            return
        module = module_of(asked["command"])
        if module is None or asked["environment"].get("PYTHONPATH") != own_path:
            connection.sendall(b"0\n")
            connection.close()
        else:
            pid = os.fork()
            if pid == 0:
                self.become(module, asked, list(streams))
            handle = os.pidfd_open(pid)
            self.commands[connection] = pid
            self.selector.register(connection, selectors.EVENT_READ)
            self.selector.register(handle, selectors.EVENT_READ, (pid, handle, connection))
            connection.sendall(f"{pid}\n".encode())
        for stream in streams:
            os.close(stream)

    def abandon(self, connection: socket.socket) -> None:
        """Whoever asked is dead: its command dies as it would have, without a word."""
        self.selector.unregister(connection)
        os.kill(self.commands.pop(connection), signal.SIGKILL)

    def finish(self, pid: int, handle: int, connection: socket.socket) -> None:
        """Say how a command ended."""
        _, status = os.waitpid(pid, 0)
        self.selector.unregister(handle)
        os.close(handle)
        if self.commands.pop(connection, None) is not None:
            self.selector.unregister(connection)
            with contextlib.suppress(OSError):
                connection.sendall(f"{status}\n".encode())
        connection.close()

    def become(self, module: str, asked: dict, streams: list[int]) -> NoReturn:
        """In the fork: be the command, to its exit."""
        code = 1
        try:
            for connection in (*self.commands, self.listener):
                connection.close()
            self.selector.close()
            for number, stream in enumerate(streams):
                os.dup2(stream, number)
                os.close(stream)
            if asked["new_session"]:
                os.setsid()
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.chdir(asked["folder"])
            os.environ.clear()
            os.environ.update(asked["environment"])
            set_constants(json.loads(os.environ.get(CONSTANTS, "{}")))
            sys.stdin, sys.stdout, sys.stderr = opened()
            sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
            code = ran(module, asked["command"])
        finally:
            os._exit(code)


def set_constants(values: dict[str, float]) -> None:
    """Give constants of modules under test, such as the seconds between two looks, other values."""
    for path, value in values.items():
        module, _, name = path.rpartition(".")
        assert hasattr(sys.modules[module], name), path
        setattr(sys.modules[module], name, value)


def opened() -> tuple[io.TextIOWrapper, io.TextIOWrapper, io.TextIOWrapper]:
    """Standard streams as a new interpreter opens them."""
    line = bool(os.environ.get("PYTHONUNBUFFERED"))
    return (
        open(0, encoding="utf-8", closefd=False),
        io.TextIOWrapper(open(1, "wb", closefd=False), "utf-8", write_through=line),
        io.TextIOWrapper(
            open(2, "wb", closefd=False), "utf-8", "backslashreplace", line_buffering=True
        ),
    )


def ran(module: str, command: list[str]) -> int:
    """Exit code of a command."""
    words = command[1:]
    sys.executable = os.path.join(os.path.dirname(os.environ[SOCKET]), "python")
    try:
        if command[0] in PROGRAMS:
            script = os.path.join(os.environ[REAL], module)
            sys.argv = [script, *words]
            runpy.run_path(script, run_name="__main__")
        elif module == "-c":
            sys.argv = ["-c", *words[2:]]
            exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv = words[1:]
            sys.path.insert(0, os.getcwd())
            own = hasattr(sys.modules.get(module), "__path__")
            sys.modules.pop(f"{module}.__main__" if own else module, None)
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        return 0
    except SystemExit as e:
        return exit_code(e)
    except BaseException as e:
        sys.excepthook(type(e), e, e.__traceback__)
        return 130 if isinstance(e, KeyboardInterrupt) else 1
    finally:
        leave()


def exit_code(error: SystemExit) -> int:
    """As the interpreter takes it."""
    if error.code is None:
        return 0
    if isinstance(error.code, int):
        return error.code & 0xFF
    print(error.code, file=sys.stderr)
    return 1


def leave() -> None:
    """What an interpreter does at its end, less taking modules apart."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()


def received(connection: socket.socket, size: int) -> bytes:
    """`size` bytes; EOFError where there are fewer."""
    data = b""
    while len(data) < size:
        part = connection.recv(size - len(data))
        if not part:
            raise EOFError
        data += part
    return data


def ours() -> list[str]:
    """Modules of the packages under test, less what is run as a script or copied as a text."""
    found = []
    for file in sorted(file for tree in TREES for file in (ROOT / tree).rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        if not {"__main__", "__init__", "template"} & set(parts):
            found.append(".".join(parts))
    return found


def main(path: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    for name in (*ours(), *LATE):
        importlib.import_module(name)
    assert len(list(Path("/proc/self/task").iterdir())) == 1, "a fork has no other threads"
    listener.bind(path)
    listener.listen(64)
    Zygote(listener).serve()


if __name__ == "__main__":
    main(sys.argv[1])
