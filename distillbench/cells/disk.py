"""Files and locks in folders of results: all of a file is written or nothing. Imports no torch."""

from __future__ import annotations

import fcntl
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from distillbench.errors import UserError

# Names of files in the folder of a cell: the last two checkpoints of its training, why it failed.
LAST = "checkpoint.safetensors"
PREVIOUS = "checkpoint.previous.safetensors"
TRACEBACK = "traceback.txt"

_held: set[IO[str]] = set()


def _release_held() -> None:
    for file in _held:
        file.close()


# A lock lives as long as any copy of its file is open: a process that a method forks must not keep
# it.
os.register_at_fork(after_in_child=_release_held)


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold the file `path` for this process alone; says so when it has to wait."""
    make_folder(path.parent)
    with writing(path):
        file = open(path, "w", encoding="utf-8")  # noqa: SIM115
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with suppress(OSError):
                print(f"waiting for another process to release {path}", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        _held.add(file)
        try:
            yield
        finally:
            _held.discard(file)


def is_locked(path: Path) -> bool:
    """Whether some process holds the lock now; that the file exists says nothing."""
    try:
        with open(path, encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """A block whose errors of the file system become a UserError with `path` and the remedy."""
    try:
        yield
    except OSError as e:
        raise UserError(
            f"{path}: cannot be written ({e.strerror}): make room or make it writable, then rerun"
        ) from None


def make_folder(folder: Path) -> None:
    """Create a results folder; UserError where that is not allowed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as e:
        raise UserError(
            f"{folder}: cannot write there ({e.strerror}): "
            "make it writable or free space, then rerun"
        ) from None


def write_atomically(path: Path, data: bytes, previous: Path | None = None) -> None:
    """Write all of a file or nothing of it; the old file becomes `previous`, if that is given.

    UserError on a full or read-only disk.
    """
    with writing(path):
        replace_file(path, data, previous)


def replace_file(path: Path, data: bytes, previous: Path | None = None) -> None:
    """Write a file as `write_atomically` does; OSError on a full or read-only disk."""
    # Processes on several nodes may write into one folder, with equal ids.
    temporary = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.is_file():
            os.replace(path, previous)
        os.replace(temporary, path)
    except BaseException:  # a full disk, and Ctrl-C in the middle
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def remove_leftovers(folder: Path) -> None:
    """Remove files that an earlier process left half written, and its traceback."""
    _remove([*folder.glob(".*"), *folder.glob(TRACEBACK)])


def remove_progress(folder: Path) -> None:
    """Remove a cell's checkpoints, which it needs no more once it is finished."""
    _remove([*folder.glob(LAST), *folder.glob(PREVIOUS)])


def _remove(paths: list[Path]) -> None:
    for path in paths:
        with writing(path):
            path.unlink(missing_ok=True)


def json_bytes(value: Any) -> bytes:
    """Indented JSON with a final newline, in UTF-8."""
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON with a final newline, atomically; UserError as `write_atomically`."""
    write_atomically(path, json_bytes(value))
