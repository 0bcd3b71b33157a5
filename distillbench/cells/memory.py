"""How much memory there is, a limit on what a worker may take of it, and signs that it ran out. Imports no torch."""

from __future__ import annotations

import errno
import re
import resource
from pathlib import Path

MEMORY_SHARE = 0.8  # of what is available when a cell starts


def limit_memory() -> None:
    """A process that asks for more than a share of the memory there is gets a MemoryError, instead of the kernel killing it and
    its neighbours (Linux; counts private writable memory, as RLIMIT_DATA does)."""
    used = _number("/proc/self/status", r"VmData:\s+(\d+) kB")
    free = available()
    if used is not None and free is not None:
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        limit = int(1024 * used + MEMORY_SHARE * free)
        resource.setrlimit(
            resource.RLIMIT_DATA,
            (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard),
        )


def is_out_of_memory(error: BaseException) -> bool:
    """torch says so in the text of a RuntimeError on a CPU."""
    text = str(error)
    return (
        isinstance(error, MemoryError)
        or (
            isinstance(error, RuntimeError)
            and any(
                s in text for s in ("DefaultCPUAllocator", "can't allocate memory", "bad_alloc")
            )
        )
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    )


def available() -> int | None:
    """Bytes that this process and its children may still use: of the machine, and of the control groups it is in."""
    free, swap = (
        _number("/proc/meminfo", rf"{name}:\s+(\d+) kB") for name in ("MemAvailable", "SwapFree")
    )
    if free is None:
        return None
    rooms = [1024 * (free + (swap or 0))]
    for line in _text("/proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            old = Path("/sys/fs/cgroup/memory" if controllers else "/sys/fs/cgroup")
            names = (
                ("memory.limit_in_bytes", "memory.usage_in_bytes")
                if controllers
                else ("memory.max", "memory.current")
            )
            for group in (here := old / path.lstrip("/"), *here.parents):
                limit, now = (_number(group / name, r"^(\d+)$") for name in names)
                if limit is not None and now is not None:
                    cache = (
                        _number(group / "memory.stat", r"^inactive_file (\d+)$") or 0
                    )  # given back when needed
                    rooms.append(max(limit - now + cache, 0))
                if group == old:
                    break
    return min(rooms)


def oom_kills() -> int:
    """Processes that the kernel has killed for lack of memory since it started; 0 where it does not say."""
    return _number("/proc/vmstat", r"oom_kill (\d+)") or 0


def _text(path: str | Path) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _number(path: str | Path, pattern: str) -> int | None:
    found = re.search(pattern, _text(path).strip(), re.MULTILINE)
    return int(found[1]) if found else None
