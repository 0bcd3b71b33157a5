"""How much memory there is, a limit on what a worker may take of it, and signs that it ran out.

Imports no torch.
"""

from __future__ import annotations

import errno
import re
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MEMORY_SHARE = 0.8  # of what is available when a cell starts
KIB = 1024
# Words by which torch says in a RuntimeError on a CPU that memory ran out.
NO_MEMORY = ("DefaultCPUAllocator", "can't allocate memory", "bad_alloc")


@dataclass(frozen=True)
class _Hierarchy:
    """Control groups of one version: the folder of the topmost, names of its files in bytes."""

    top: Path
    limit: str
    usage: str


V1 = _Hierarchy(Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes")
V2 = _Hierarchy(Path("/sys/fs/cgroup"), "memory.max", "memory.current")
HIERARCHIES = {"memory": V1, "": V2}  # by the controllers that /proc/self/cgroup names


def limit_memory() -> None:
    """Let this process get a MemoryError when it asks for more than a share of the memory there is.

    Instead, the kernel would kill it and its neighbours. Linux only; counts private writable
    memory, as RLIMIT_DATA does.
    """
    used = _number("/proc/self/status", r"VmData:\s+(\d+) kB")
    free = available()
    if used is None or free is None:
        return
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = int(KIB * used + MEMORY_SHARE * free)
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory ran out: by Python, torch on a CPU or the system."""
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, RuntimeError):
        text = str(error)
        return any(words in text for words in NO_MEMORY)
    return isinstance(error, OSError) and error.errno == errno.ENOMEM


def available() -> int | None:
    """Bytes that this process and its children may still use; None where it is not known.

    The least of what the machine and the control groups around the process have left.
    """
    free = _number("/proc/meminfo", r"MemAvailable:\s+(\d+) kB")
    if free is None:
        return None
    swap = _number("/proc/meminfo", r"SwapFree:\s+(\d+) kB") or 0
    return min([KIB * (free + swap), *_left_in_groups()])


def _left_in_groups() -> Iterator[int]:
    """Bytes that each control group around this process has left."""
    for line in _text("/proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in HIERARCHIES:
            continue
        hierarchy = HIERARCHIES[controllers]
        own = hierarchy.top / path.lstrip("/")
        for group in (own, *own.parents):
            left = _left_in_group(group, hierarchy)
            if left is not None:
                yield left
            if group == hierarchy.top:
                break


def _left_in_group(group: Path, hierarchy: _Hierarchy) -> int | None:
    """Bytes that a control group has left; None where it has no limit."""
    limit = _number(group / hierarchy.limit, r"^(\d+)$")
    usage = _number(group / hierarchy.usage, r"^(\d+)$")
    if limit is None or usage is None:
        return None
    # Files in the page cache are counted as used and given back when needed.
    cache = _number(group / "memory.stat", r"^inactive_file (\d+)$") or 0
    return max(limit - usage + cache, 0)


def oom_kills() -> int:
    """Processes that the kernel has killed for lack of memory since it started.

    0 where it does not say.
    """
    return _number("/proc/vmstat", r"oom_kill (\d+)") or 0


def _text(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""


def _number(path: str | Path, pattern: str) -> int | None:
    """The number that `pattern` finds in a file; None where there is no file or no number."""
    match = re.search(pattern, _text(path).strip(), re.MULTILINE)
    return int(match[1]) if match else None
