"""A cell is (benchmark, arm, seed): its key, its folder, its record. Imports no torch.

The key is a hash of everything that determines the result. If the record stands in the keyed folder the cell is fresh;
nothing else decides.
"""

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

LAST, PREVIOUS = (
    "checkpoint.safetensors",
    "checkpoint.previous.safetensors",
)  # of a cell in training


_held: set[IO[str]] = set()
# A lock lives as long as any copy of its file is open: a process that a method forks must not keep it.
os.register_at_fork(after_in_child=lambda: [f.close() for f in _held])


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold the file `path` for this process alone; says so when it has to wait."""
    make_folder(path.parent)
    with writing(path):
        f = open(path, "w")  # noqa: SIM115
    with f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with suppress(OSError):
                print(f"waiting for another process to release {path}", file=sys.stderr, flush=True)
            fcntl.flock(f, fcntl.LOCK_EX)
        _held.add(f)
        try:
            yield
        finally:
            _held.discard(f)


def is_locked(path: Path) -> bool:
    """Some process holds the lock now; a lock file alone says nothing."""
    try:
        with open(path) as f:
            fcntl.flock(f, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """An error of the file system in this block is a UserError that names `path` and the remedy."""
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
            f"{folder}: cannot write there ({e.strerror}): make it writable or free space, then rerun"
        ) from None


def write_atomically(path: Path, data: bytes, previous: Path | None = None) -> None:
    """All of the file or nothing of it; UserError on a full or read-only disk. The old file becomes `previous`, if that is given."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with writing(path):
        try:
            with open(temporary, "wb") as f:
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
            if previous is not None and path.is_file():
                os.replace(path, previous)
            os.replace(temporary, path)
        except BaseException:  # a full disk, and Ctrl-C in the middle
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


def remove_leftovers(folder: Path) -> None:
    """Files that an earlier process left half written, and its traceback."""
    _remove([*folder.glob(".*"), *folder.glob("traceback.txt")])


def remove_progress(folder: Path) -> None:
    """A finished cell needs no checkpoint."""
    _remove([*folder.glob(LAST), *folder.glob(PREVIOUS)])


def _remove(paths: list[Path]) -> None:
    for path in paths:
        with writing(path):
            path.unlink(missing_ok=True)


def json_bytes(value: Any) -> bytes:
    """Indented JSON with a final newline, in UTF-8."""
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def write_json(path: Path, value: Any) -> None:
    """Indented JSON with a final newline, atomically."""
    write_atomically(path, json_bytes(value))
