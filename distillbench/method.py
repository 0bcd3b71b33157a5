"""The whole contract between a method and the suite, on one screen: Method, Task, Needs, Batch, Condition, Step.

A method lives in one folder (`methods/<name>/method.py`) and imports `distillbench` only. The harness owns seeds,
budget, metering, checkpoints, progress and the record; the method owns its networks, its losses, the order of its
updates and its sampler.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from pydantic import BaseModel
from torch import Tensor, nn

from distillbench.jvp import value_and_tangent
from distillbench.meter import Meter
from distillbench.networks import Norms, VelocityNetwork, copy_weights
from distillbench.players import Player, PlayerConfig
from distillbench.seeds import Rng, derive, ranks


@dataclass(frozen=True)
class Pairs:
    """Regression pairs (noise, teacher's ODE sample): how many, by how many Heun steps, how many in a batch."""

    count: int
    heun_steps: int
    batch: int


@dataclass(frozen=True)
class Needs:
    """What a method asks for; anything it does not name is withheld."""

    batch: int  # rows of every batch
    nfe: tuple[int, ...]  # network evaluations per sample its sampler supports and the table shows
    headline_nfe: int  # the one the paper is about; fixed before anything is measured
    data: bool = False  # real images
    teacher: bool = True
    pairs: Pairs | None = None
    features: Literal["self_supervised", "random"] | None = None  # frozen features for a discriminator: `task.features`
    cycle: int = 1  # train steps after which the pattern of updates, and so their cost, repeats

    def __post_init__(self) -> None:
        if list(self.nfe) != sorted(set(self.nfe)) or not self.nfe or self.nfe[0] < 1 or self.headline_nfe not in self.nfe:
            raise ValueError(f"needs: nfe {self.nfe} must be increasing counts with headline_nfe {self.headline_nfe} among them")
        if self.batch < 1 or self.cycle < 1:
            raise ValueError(f"needs: batch {self.batch} and cycle {self.cycle} must be positive")


@dataclass(frozen=True)
class Condition:
    """What a sample is conditioned on: labels [B] int64 (None where the data have no classes), guidance weight, one or [B]."""

    labels: Tensor | None
    guidance: float | Tensor = 1.0


@dataclass(frozen=True)
class Batch:
    """One training batch. x: [B, *shape] in the data's range, None unless needed; pairs: (noise, image, condition)."""

    size: int
    cond: Condition
    x: Tensor | None = None
    pairs: tuple[Tensor, Tensor, Condition] | None = None


@dataclass
class Step:
    """Where training stands. `rng(name)` is a stream of this step alone: equal after a resume and on any number of ranks."""

    index: int
    total: int
    seed: int
    device: torch.device
    _streams: dict[str, Rng] = field(default_factory=dict)

    @property
    def progress(self) -> float:
        """Share of the steps already done, in [0, 1)."""
        return self.index / self.total

    def rng(self, name: str) -> Rng:
        if name not in self._streams:
            rank, world = ranks()
            self._streams[name] = Rng(self.seed, "step", self.index, name, rank=rank, world=world, device=self.device)
        return self._streams[name]

    def mean_across_ranks(self, value: Tensor) -> Tensor:
        """Mean of a detached tensor over all ranks."""
        if (world := ranks()[1]) > 1:
            value = value.detach().clone()
            dist.all_reduce(value)
            value /= world
        return value


class Task:
    """What the harness hands a method: the teacher, networks, players and the metered derivative."""

    def __init__(
        self, shape: tuple[int, ...], classes: int, network: dict[str, int], teacher: Any, teacher_weights: nn.Module | None,
        seed: int, device: torch.device, meter: Meter, features: nn.Module | None = None, start: dict[str, Tensor] | None = None,
        make: Callable[..., Any] = VelocityNetwork,
    ):  # fmt: skip
        self.shape, self.classes, self.device, self.meter = shape, classes, device, meter
        self.teacher = teacher  # has .velocity(x, t, cond); None when the method does not need one
        self.features = features  # images [B, *shape] -> list of tokens [B, T, width], frozen; None unless needed
        self._network, self._make, self._seed = network, make, seed  # the architecture: its sizes and its class
        self._weights = {"teacher": None if teacher_weights is None else teacher_weights.state_dict(), "start": start}
        self._roles: dict[nn.Module, str] = {}
        self.players: dict[str, Player] = {}

    def network(
        self, init: Literal["teacher", "start", "random"], second_time: bool = False, guidance: bool = False, norms: Norms = "layer"
    ) -> VelocityNetwork:
        """A network of the benchmark's architecture; from the teacher, or from the arm named by `start` in config.yaml, added
        inputs start without effect."""
        torch.manual_seed(derive(self._seed, "network", len(self._roles)))
        net = self._make(self.shape, self.classes, **self._network, second_time=second_time, guidance=guidance, norms=norms)
        if init != "random":
            if (weights := self._weights[init]) is None:
                lacks = "needs(teacher=True)" if init == "teacher" else "`start` in config.yaml"
                raise ValueError(f"init='{init}' without {lacks}")
            copy_weights(weights, net)
        self._roles[net] = "network"
        self.meter.watch(net, lambda: self._roles[net])
        return net.to(self.device)

    def player(self, name: str, config: PlayerConfig, *networks: nn.Module) -> Player:
        """Register what one optimiser moves. The player named 'student' is the one saved and sampled."""
        for i, net in enumerate(networks):
            if net not in self._roles:  # a module of the method's own
                self.meter.watch(net.to(self.device), lambda net=net: self._roles[net])  # type: ignore[misc]
            self._roles[net] = name if i == 0 else f"{name}.{i}"
        self.players[name] = Player(name, networks, config, self.meter)
        return self.players[name]

    def jvp(
        self, net: nn.Module, primals: tuple[Tensor, Tensor, Tensor], tangents: tuple[Tensor, Tensor, Tensor],
        cond: Condition, graph: bool = False,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """u = net(x, t, s) with its graph and du along `tangents` (of x, t, s), on the first m rows that these have.

        One evaluation of the value and one of the tangent, both metered, float32; see distillbench.jvp.
        """
        self.meter.count(f"{self._roles[net]}.tangent", tangents[0].shape[0])
        w = cond.guidance if isinstance(cond.guidance, Tensor) else None  # an input of networks trained on a range of weights
        return value_and_tangent(lambda x, t, s: net(x, t, cond.labels, s=s, guidance=w), primals, tangents, graph)


class Method:
    """What one paper contributes: the networks it trains, their losses and updates, and how its student samples."""

    Config: ClassVar[type[BaseModel]]  # the settings it takes; extra="forbid", so that a typo is found

    @classmethod
    def needs(cls, config: Any) -> Needs:
        """What it asks for under these settings."""
        raise NotImplementedError

    def __init__(self, task: Task, config: Any):
        """Create the players with `task.network` and `task.player`."""
        raise NotImplementedError

    def train_step(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """Update the players in the order the paper says; returns scalars to log."""
        raise NotImplementedError

    def sample(self, noise: Tensor, cond: Condition, nfe: int, rng: Rng) -> Tensor:
        """Images like `noise` [B, *shape] from standard normal noise, with exactly `nfe` network evaluations."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Tensor]:
        """Anything that changes over training besides the players: tensors only."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Inverse of `state_dict`."""
