"""The near end of tests/zygote.py: `shim.py PROGRAM ARGUMENTS...` is PROGRAM without its imports.

Run as a script it is what tests have as `python`, `distillbench` and `snakemake` in their PATH. It
passes signals on, and its own death by SIGKILL is the command's. What the zygote does not know is
run by the real program. Imports no package, so that it starts in milliseconds.
"""

from __future__ import annotations

import array
import json
import os
import signal
import socket
import sys
from collections.abc import Sequence

SOCKET = "DISTILLBENCH_TEST_ZYGOTE"  # where the zygote listens
REAL = "DISTILLBENCH_TEST_BIN"  # folder of the real programs
# Set where the zygote runs what a job of SLURM runs, less jobs with this in their folder's path.
JOBS = "DISTILLBENCH_TEST_JOBS"
CONSTANTS = "DISTILLBENCH_TEST_CONSTANTS"  # JSON: module.NAME -> value, for the zygote's commands
SUBMITTED = ("-u", "-m", "submitit.core._submit")  # python's arguments in a job
PASSED_ON = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")


def request(
    command: Sequence[str],
    folder: str,
    environment: dict[str, str],
    streams: tuple[int, int, int],
    new_session: bool = False,
) -> tuple[socket.socket, int] | None:
    """Connection to the zygote, and the process id of a command that it started.

    None where it does not know the command, or has gone.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    asked = {
        "command": list(command),
        "folder": folder,
        "environment": environment,
        "new_session": new_session,
    }
    message = json.dumps(asked).encode()
    descriptors = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", streams))]
    try:
        connection.connect(environment[SOCKET])
        connection.sendmsg([len(message).to_bytes(4, "big")], descriptors)
        connection.sendall(message)
        pid = int(answer(connection))
    except (OSError, KeyError, EOFError):
        pid = 0
    if pid:
        return connection, pid
    connection.close()
    return None


def answer(connection: socket.socket) -> str:
    """One line from the zygote; EOFError where it has gone."""
    line = b""
    while not line.endswith(b"\n"):
        byte = connection.recv(1)
        if not byte:
            raise EOFError("the zygote has gone")
        line += byte
    return line.decode()


def real_arguments(arguments: list[str]) -> list[str]:
    """What the real program is given.

    A job of SLURM is a real process below slurmstepd; where JOBS says so it starts its command by a
    shim, which is below slurmstepd as well and so gets SLURM's signals.
    """
    if tuple(arguments[:3]) != SUBMITTED or os.environ.get(JOBS, "") in arguments[3]:
        return arguments
    python = os.path.join(os.path.dirname(os.environ[SOCKET]), "python")
    module = SUBMITTED[-1]
    code = (
        f"import runpy, sys; sys.executable = {python!r}; "
        f"runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    )
    return ["-u", "-c", code, *arguments[3:]]


def main(command: list[str]) -> None:
    """Be the command: its streams, signals and exit code."""
    found = request(command, os.getcwd(), dict(os.environ), (0, 1, 2))
    if found is None:
        program = os.path.join(os.environ[REAL], command[0])
        os.execv(program, [program, *real_arguments(command[1:])])
    connection, pid = found
    for name in PASSED_ON:
        signal.signal(getattr(signal, name), lambda number, _: os.kill(pid, number))
    code = os.waitstatus_to_exitcode(int(answer(connection)))
    if code < 0:
        signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    main(sys.argv[1:])
