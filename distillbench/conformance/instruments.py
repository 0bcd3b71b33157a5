"""Instruments of the conformance check: they watch a method's code from outside and change no bit of what it computes."""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from distillbench.cells.build import Run
from distillbench.meter import Meter
from distillbench.method import Batch

CODE = (".py", ".pyc", ".so")


class Counting(TorchDispatchMode):
    """FLOPs by torch's formulas while it is entered: all, those of forward passes, and those outside of watched networks.

    Unlike torch's FlopCounterMode it decomposes nothing, so a run under it has the same bits as one without.
    """

    def __init__(self, depth: list[int]):
        super().__init__()
        self.depth, self.all, self.forward, self.outside = depth, 0, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.is_inference_mode_enabled() and func._overloadpacket not in flop_registry:
            with self:  # there aten.linear and its kind arrive whole
                if (out := func.decompose(*args, **(kwargs or {}))) is not NotImplemented:
                    return out
        out = func(*args, **(kwargs or {}))
        if (formula := flop_registry.get(func._overloadpacket)) is not None:
            flops = formula(*args, **(kwargs or {}), out_val=out)
            self.all += flops
            if torch._C._current_graph_task_id() == -1:  # no backward pass is running
                self.forward += flops
                self.outside += 0 if self.depth[0] else flops
        return out


class Watching(Meter):
    """A meter that also knows when a network it watches is being evaluated."""

    def __init__(self) -> None:
        super().__init__()
        self.depth = [0]

    def watch(self, network: nn.Module, role: Callable[[], str], row_flops: int = 0) -> None:
        super().watch(network, role, row_flops)
        depth = self.depth

        def enter(_module: nn.Module, _args: Any) -> None:
            depth[0] += 1

        def leave(_module: nn.Module, _args: Any, _out: Any) -> None:
            depth[0] -= 1

        network.register_forward_pre_hook(enter)
        network.register_forward_hook(leave, always_call=True)


@dataclass(frozen=True)
class Seen(Batch):
    """A batch that notes which of its fields are read."""

    read: set[str] = field(default_factory=set)

    def __getattribute__(self, name: str) -> Any:
        if name in ("x", "pairs", "cond"):
            object.__getattribute__(self, "read").add(name)
        return object.__getattribute__(self, name)


_opened: list[str] | None = None  # files opened while a method's code runs


def _audit(event: str, arguments: tuple) -> None:
    if event == "open" and _opened is not None and isinstance(arguments[0], (str, bytes)):
        path = arguments[0].decode() if isinstance(arguments[0], bytes) else arguments[0]
        if not path.endswith(CODE) and not path.startswith(("/dev/", "/proc/", "/sys/")):
            _opened.append(path)


@contextmanager
def method_code() -> Iterator[list[str]]:
    """Note every file that is opened in this block, other than code."""
    global _opened
    if not getattr(sys, "_distillbench_audit", False):
        sys.addaudithook(_audit)
        sys._distillbench_audit = True  # type: ignore[attr-defined]
    found: list[str] = []
    _opened = found
    try:
        yield found
    finally:
        _opened = None


def global_state() -> tuple[Any, ...]:
    """Of every stream that a method must not draw from."""
    numpy: Any = np.random.get_state()
    return torch.get_rng_state().numpy().tobytes(), numpy[1].tobytes(), numpy[2], random.getstate()


def weights(run: Run) -> dict[str, Tensor]:
    """Copies of everything that moves."""
    state = {
        f"{n}.{k}": v.clone()
        for n, p in run.task.players.items()
        for k, v in p.state_dict().items()
    }
    return state | {f"method.{k}": v.clone() for k, v in run.method.state_dict().items()}


def first_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> str | None:
    """The first entry in which two states differ."""
    return next((k for k in a if k not in b or not torch.equal(a[k], b[k])), None) or next(
        (k for k in b if k not in a), None
    )


def fingerprint(run: Run) -> str:
    """Of the teacher's weights and those of the features: what no method may change."""
    teacher = run.task.teacher.network if run.task.teacher is not None else None
    states = [m.state_dict().values() for m in (teacher, run.task.features) if m is not None]
    return hashlib.sha256(
        b"".join(v.detach().cpu().contiguous().numpy().tobytes() for state in states for v in state)
    ).hexdigest()
