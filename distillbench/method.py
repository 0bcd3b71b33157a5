"""The whole contract between a method and the suite: Method, Task, Teacher, Needs, Batch, Step.

A method lives in one folder (`methods/<name>/method.py`) and imports `distillbench` only. The
harness owns seeds, budget, metering, checkpoints, progress and the record; the method owns its
networks, its losses, the order of its updates and its sampler.
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
from distillbench.paths import guided, over
from distillbench.players import Player, PlayerConfig
from distillbench.seeds import Rng, derive, ranks

Norms = Literal["layer", "rms"]  # of a velocity network; rms: TVM's (arXiv 2511.19797, Eq. 16)


@dataclass(frozen=True)
class Pairs:
    """Regression pairs (noise, teacher's ODE sample): how many, Heun steps of each, batch size."""

    count: int
    heun_steps: int
    batch: int


@dataclass(frozen=True)
class Needs:
    """What a method asks for; anything it does not name is withheld.

    Raises ValueError where `nfe` does not increase, lacks `headline_nfe`, or a count is below 1.
    """

    batch: int  # rows of every batch
    nfe: tuple[int, ...]  # network evaluations per sample that its sampler supports
    headline_nfe: int  # the one the paper is about; fixed before anything is measured
    data: bool = False  # real images
    teacher: bool = True
    pairs: Pairs | None = None
    features: Literal["self_supervised", "random"] | None = None  # frozen: `task.features`
    cycle: int = 1  # train steps after which the pattern of updates, and so their cost, repeats

    def __post_init__(self) -> None:
        increasing = list(self.nfe) == sorted(set(self.nfe)) and bool(self.nfe) and self.nfe[0] >= 1
        if not increasing or self.headline_nfe not in self.nfe:
            raise ValueError(
                f"needs: nfe {self.nfe} must be increasing counts "
                f"with headline_nfe {self.headline_nfe} among them"
            )
        if self.batch < 1 or self.cycle < 1:
            raise ValueError(f"needs: batch {self.batch} and cycle {self.cycle} must be positive")


@dataclass(frozen=True)
class Condition:
    """What a sample is conditioned on.

    labels: [B] int64, or None where the data have no classes; guidance: one weight, or [B] float32.
    """

    labels: Tensor | None
    guidance: float | Tensor = 1.0


class Teacher:
    """A frozen velocity field v(x, t), as a method sees it. Differentiable in x."""

    def __init__(self, network: nn.Module, classes: int):
        self.network = network.requires_grad_(False).eval()
        self._classes = classes

    def velocity(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """v like x [B, *shape] float32 at times t [B] in [0, 1].

        Guided with weight w: v_null + w (v_cond - v_null), by a second evaluation; none where the
        data have no classes, or where w is the number 1.
        """
        v = self.network(x, t, cond.labels)
        w = cond.guidance
        if cond.labels is None or (not isinstance(w, Tensor) and w == 1):
            return v
        null = self.network(x, t, torch.full_like(cond.labels, self._classes))
        return guided(null, v, over(w, x) if isinstance(w, Tensor) else w)


@dataclass(frozen=True)
class Batch:
    """One training batch of `size` rows; what the method's needs do not name is None.

    x: [size, *shape] float32 in [-1, 1] for images; pairs: (noise, teacher's sample, condition).
    """

    size: int
    cond: Condition
    x: Tensor | None = None
    pairs: tuple[Tensor, Tensor, Condition] | None = None


@dataclass
class Step:
    """Train step `index` of `total`, and its random numbers."""

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
        """Stream of this step alone: equal after a resume and on any number of ranks."""
        if name not in self._streams:
            rank, world = ranks()
            names = ("step", self.index, name)
            self._streams[name] = Rng(self.seed, *names, rank=rank, world=world, device=self.device)
        return self._streams[name]

    def mean_across_ranks(self, value: Tensor) -> Tensor:
        """Mean over all ranks of a detached tensor of any shape; itself on one rank."""
        world = ranks()[1]
        if world > 1:
            value = value.detach().clone()
            dist.all_reduce(value)
            value /= world
        return value


class Task:
    """What the harness hands a method: the teacher, networks, players and the metered derivative.

    architecture: makes a network with random weights, given `second_time`, `guidance` and `norms`.
    teacher_weights, start: state dicts of the teacher's network and of the arm that `start` in
    config.yaml names; shape: of one sample, batches are [B, *shape] float32; classes: 0 where the
    data have none.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        classes: int,
        architecture: Callable[..., nn.Module],
        teacher: Teacher | None,
        teacher_weights: dict[str, Tensor] | None,
        seed: int,
        device: torch.device,
        meter: Meter,
        features: nn.Module | None = None,
        start: dict[str, Tensor] | None = None,
    ):
        self.shape = shape
        self.classes = classes
        self.device = device
        self.meter = meter
        self.features = features  # images [B, *shape] -> list of tokens [B, T, width], frozen
        self.players: dict[str, Player] = {}
        self._architecture = architecture
        self._teacher = teacher
        self._weights = {"teacher": teacher_weights, "start": start}
        self._seed = seed
        self._roles: dict[nn.Module, str] = {}

    @property
    def has_teacher(self) -> bool:
        """Whether `teacher` is there."""
        return self._teacher is not None

    @property
    def teacher(self) -> Teacher:
        """The teacher; ValueError where the method's needs do not name it."""
        if self._teacher is None:
            raise ValueError("task.teacher without needs(teacher=True)")
        return self._teacher

    def network(
        self,
        init: Literal["teacher", "start", "random"],
        second_time: bool = False,
        guidance: bool = False,
        norms: Norms = "layer",
    ) -> nn.Module:
        """A velocity network of the benchmark's architecture on the task's device.

        Inputs that the teacher, or the arm it starts from, does not have (`second_time`,
        `guidance`) start without effect. Raises ValueError where there are no such weights.
        """
        torch.manual_seed(derive(self._seed, "network", len(self._roles)))
        net = self._architecture(second_time=second_time, guidance=guidance, norms=norms)
        if init != "random":
            weights = self._weights[init]
            if weights is None:
                source = {"teacher": "needs(teacher=True)", "start": "`start` in config.yaml"}[init]
                raise ValueError(f"init='{init}' without {source}")
            copy_weights(weights, net)
        self._roles[net] = "network"
        self.meter.watch(net, lambda: self._roles[net])
        return net.to(self.device)

    def player(self, name: str, config: PlayerConfig, *networks: nn.Module) -> Player:
        """Register what one optimiser moves. The player 'student' is the one saved and sampled."""
        for i, net in enumerate(networks):
            if net not in self._roles:  # a module of the method's own
                self.meter.watch(
                    net.to(self.device),
                    lambda net=net: self._roles[net],  # type: ignore[misc]
                )
            self._roles[net] = name if i == 0 else f"{name}.{i}"
        self.players[name] = Player(name, networks, config, self.meter)
        return self.players[name]

    def jvp(
        self,
        net: nn.Module,
        primals: tuple[Tensor, Tensor, Tensor],
        tangents: tuple[Tensor, Tensor, Tensor],
        cond: Condition,
        graph: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """u = net(x, t, s) [B, *shape] with its graph, and du along `tangents`, float32.

        primals, tangents: of x [B, *shape], t [B], s [B]; tangents of the first m <= B rows give du
        [m, *shape], without a graph unless asked. One evaluation of the value and one of the
        tangent, both metered; see distillbench.jvp.
        """
        self.meter.count(f"{self._roles[net]}.tangent", tangents[0].shape[0])
        # Rows of weights are an input of networks that are trained on a range of weights.
        w = cond.guidance if isinstance(cond.guidance, Tensor) else None

        def average_velocity(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
            return net(x, t, cond.labels, s=s, guidance=w)

        return value_and_tangent(average_velocity, primals, tangents, graph)


def copy_weights(source: dict[str, Tensor], target: nn.Module) -> None:
    """Load the state dict `source` into `target`.

    Further inputs that `target` has (second time, guidance) keep their start. Raises ValueError
    where anything else is missing or left over.
    """
    missing, unexpected = target.load_state_dict(source, strict=False)
    lacking = [k for k in missing if not k.startswith(("gap.", "guidance."))]
    if lacking or unexpected:
        raise ValueError(f"weights do not fit: missing {lacking}, unexpected {unexpected}")


class Method:
    """What one paper contributes: its networks, their losses and updates, and its sampler."""

    Config: ClassVar[type[BaseModel]]  # the settings; extra="forbid", so that a typo is found

    @classmethod
    def needs(cls, config: Any) -> Needs:
        """What it asks for under these settings. Raises Refused where it cannot run."""
        raise NotImplementedError

    def __init__(self, task: Task, config: Any):
        """Create the players with `task.network` and `task.player`. Raises Refused as `needs`."""
        raise NotImplementedError

    def train_step(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """Update the players in the paper's order; returns detached scalars to log, by name."""
        raise NotImplementedError

    def sample(self, noise: Tensor, cond: Condition, nfe: int, rng: Rng) -> Tensor:
        """Samples like `noise` [B, *shape], standard normal float32, by exactly `nfe` evaluations.

        Images are in [-1, 1]; `rng` is for noise that the sampler adds on its way.
        """
        raise NotImplementedError

    def state_dict(self) -> dict[str, Tensor]:
        """State dict of what changes over training besides the players; tensors of any shape."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load a state dict that `state_dict` returned."""
