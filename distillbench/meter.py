"""What a method spends: network evaluations by role, floating-point operations, images, seconds, memory."""

from __future__ import annotations

import resource
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


class NoModules:
    """In place of torch's tracker of modules in FlopCounterMode: we need the total, and its hooks fail where a loss is differentiated
    in a leaf that some module was given (R1 on images, spectrally normalised weights)."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


class Meter:
    """Counts while a block of it is open: calls and rows by role ('student', 'student.tangent', 'critic.backward')."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.rows: Counter[str] = Counter()
        self.flops = 0
        self._open = False

    def watch(self, network: nn.Module, role: Callable[[], str], row_flops: int = 0) -> None:
        """Count every forward of `network`, and of later copies of it, under `role()`; `row_flops` are charged on top."""

        def hook(_module: nn.Module, args: tuple, kwargs: dict, _out: object) -> None:
            rows = (args or tuple(kwargs.values()))[0].shape[0]
            self.count(role(), rows)
            self.flops += row_flops * rows if self._open else 0

        network.register_forward_hook(hook, with_kwargs=True)

    def count(self, role: str, rows: int) -> None:
        """Add one evaluation of `rows` samples."""
        if self._open:
            self.calls[role] += 1
            self.rows[role] += rows

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count calls and rows inside the block."""
        self._open = True
        try:
            yield
        finally:
            self._open = False

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Count calls, rows and FLOPs (torch's own counter: matrix products and convolutions) inside the block."""
        counter = FlopCounterMode(display=False)
        counter.mod_tracker = NoModules()  # type: ignore[assignment]
        with self.counting(), counter:
            yield
        self.flops += counter.get_total_flops()


def peak_memory_mb(device: torch.device) -> float:
    """Largest memory so far in MiB: of the accelerator, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 2**20
