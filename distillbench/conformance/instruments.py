"""Instruments of the conformance check, which watch a method's code from outside.

They change no bit of what it computes.
"""

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

# Files that a method may open.
CODE = (".py", ".pyc", ".so")
SYSTEM = ("/dev/", "/proc/", "/sys/")
FIELDS = ("x", "pairs", "cond")  # of a batch, that needs ask for


class FlopCounter(TorchDispatchMode):
    """FLOPs by torch's formulas while it is entered.

    all: of everything; forward: of forward passes; outside: of those outside of watched networks.
    depth: of a `WatchingMeter`. Unlike torch's FlopCounterMode it decomposes nothing, so a run
    under it has the same bits as one without.
    """

    def __init__(self, depth: list[int]):
        super().__init__()
        self.depth = depth
        self.all = 0
        self.forward = 0
        self.outside = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        formula = flop_registry.get(func._overloadpacket)
        if formula is None and torch.is_inference_mode_enabled():
            with self:  # there aten.linear and its kind arrive whole
                out = func.decompose(*args, **kwargs)
                if out is not NotImplemented:
                    return out
        out = func(*args, **kwargs)
        if formula is not None:
            self._add(formula(*args, **kwargs, out_val=out))
        return out

    def _add(self, flops: int) -> None:
        self.all += flops
        if torch._C._current_graph_task_id() == -1:  # no backward pass is running
            self.forward += flops
            if not self.depth[0]:
                self.outside += flops


class WatchingMeter(Meter):
    """A meter that also knows when a network it watches is being evaluated.

    depth: of one entry, how many of their evaluations are under way, one within another.
    """

    def __init__(self) -> None:
        super().__init__()
        self.depth = [0]

    def watch(self, network: nn.Module, role: Callable[[], str], row_flops: int = 0) -> None:
        """Count a network's evaluations as `Meter` does, and note while one is under way."""
        super().watch(network, role, row_flops)
        depth = self.depth

        def enter(_module: nn.Module, _args: Any) -> None:
            depth[0] += 1

        def leave(_module: nn.Module, _args: Any, _out: Any) -> None:
            depth[0] -= 1

        network.register_forward_pre_hook(enter)
        network.register_forward_hook(leave, always_call=True)


@dataclass(frozen=True)
class WatchedBatch(Batch):
    """A batch that notes in `read` which of its fields are read."""

    read: set[str] = field(default_factory=set)

    def __getattribute__(self, name: str) -> Any:
        if name in FIELDS:
            object.__getattribute__(self, "read").add(name)
        return object.__getattribute__(self, name)


_opened: list[str] | None = None  # files opened while a method's code runs


def _audit(event: str, arguments: tuple) -> None:
    if event != "open" or _opened is None or not isinstance(arguments[0], (str, bytes)):
        return
    path = arguments[0].decode() if isinstance(arguments[0], bytes) else arguments[0]
    if not path.endswith(CODE) and not path.startswith(SYSTEM):
        _opened.append(path)


@contextmanager
def opened_files() -> Iterator[list[str]]:
    """A block in which paths of files that are opened, other than code, are listed."""
    global _opened
    if not getattr(sys, "_distillbench_audit", False):
        sys.addaudithook(_audit)
        sys._distillbench_audit = True  # type: ignore[attr-defined]
    paths: list[str] = []
    _opened = paths
    try:
        yield paths
    finally:
        _opened = None


def global_state() -> tuple[Any, ...]:
    """States of every stream that a method must not draw from."""
    numpy: Any = np.random.get_state()
    return torch.get_rng_state().numpy().tobytes(), numpy[1].tobytes(), numpy[2], random.getstate()


def weights(run: Run) -> dict[str, Tensor]:
    """Copies of everything that training moves: players, and the method's own state."""
    state = {}
    for player_name, player in run.task.players.items():
        for name, value in player.state_dict().items():
            state[f"{player_name}.{name}"] = value.clone()
    for name, value in run.method.state_dict().items():
        state[f"method.{name}"] = value.clone()
    return state


def first_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> str | None:
    """Name of the first entry in which two states differ; None where they are equal."""
    for name in a:
        if name not in b or not torch.equal(a[name], b[name]):
            return name
    for name in b:
        if name not in a:
            return name
    return None


def fingerprint(run: Run) -> str:
    """Hash of the weights of the teacher and the features, which no method may change."""
    teacher = None if run.task.teacher is None else run.task.teacher.network
    sha256 = hashlib.sha256()
    for network in (teacher, run.task.features):
        if network is not None:
            for value in network.state_dict().values():
                sha256.update(value.detach().cpu().contiguous().numpy().tobytes())
    return sha256.hexdigest()
