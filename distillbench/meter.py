"""What a method spends: network evaluations by role, floating-point operations, memory."""

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
    """Stand-in for the tracker of modules in torch's FlopCounterMode.

    Only the total is needed, and the tracker's hooks fail where a loss is differentiated in a leaf
    that some module was given (R1 on images, spectrally normalised weights).
    """

    parents = frozenset({"Global"})

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


class Meter:
    """Counts of calls and rows by role while a block of it is open, and of FLOPs while measured.

    Roles are such as 'student', 'student.tangent', 'critic.backward'; `flops` is the total of the
    measured blocks and of the operations charged by `watch`.
    """

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.rows: Counter[str] = Counter()
        self.flops = 0
        self._open = False

    def watch(self, network: nn.Module, role: Callable[[], str], row_flops: int = 0) -> None:
        """Count every forward of `network`, and of later copies of it, under `role()`.

        Rows are the first dimension of the first argument; `row_flops` for each of them are charged
        on top.
        """

        def hook(_module: nn.Module, args: tuple, kwargs: dict, _out: object) -> None:
            inputs = args or tuple(kwargs.values())
            rows = inputs[0].shape[0]
            self.count(role(), rows)
            if self._open:
                self.flops += row_flops * rows

        network.register_forward_hook(hook, with_kwargs=True)

    def count(self, role: str, rows: int) -> None:
        """Add one evaluation of `rows` samples; nothing outside a block."""
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
        """Count calls, rows and FLOPs inside the block.

        FLOPs are those of torch's own counter: matrix products and convolutions.
        """
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
