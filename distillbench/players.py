"""A player: what one optimiser steps, with its schedule, clipping and moving averages.

With several ranks the gradients are averaged over them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from distillbench.errors import Diverged
from distillbench.meter import Meter
from distillbench.seeds import ranks

EVALUATION = "evaluation"  # the average that is sampled from, saved and reported


class PlayerConfig(BaseModel):
    """How a player is optimised: AdamW, linear warm-up, cosine decay."""

    model_config = ConfigDict(extra="forbid")
    lr: float = Field(gt=0, description="peak learning rate")
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = Field(0.0, ge=0)
    warmup: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="linear warm-up, as a share of the player's own updates",
    )
    final_lr: float = Field(
        1.0,
        ge=0,
        le=1,
        description="cosine decay ends at this share of lr; 1 keeps lr constant",
    )
    clip: float | None = Field(None, gt=0, description="largest gradient norm")
    half_lives: dict[str, float] = Field(
        default_factory=dict,
        description="moving averages by name: half-life as a share of the player's own updates",
    )


class Player:
    """Networks that move together. `update(loss)` is the only way to move them."""

    def __init__(
        self, name: str, networks: Sequence[nn.Module], config: PlayerConfig, meter: Meter
    ):
        self.name = name
        self.config = config
        self.meter = meter
        self.networks = nn.ModuleList(networks)
        self.parameters = [p for p in self.networks.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=config.lr,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.updates = 0
        self.total_updates = 1  # set by the loop once the budget is known
        self.averages: dict[str, AveragedModel] = {}
        for key, half_life in config.half_lives.items():
            average = AveragedModel(self.networks, multi_avg_fn=self._average(half_life))
            self.averages[key] = average.requires_grad_(False)

    def _average(self, half_life: float) -> Callable[..., None]:
        def move(averaged: list[Tensor], current: list[Tensor], count: Tensor) -> None:
            decay = 0.5 ** (1 / max(half_life * self.total_updates, 1e-9))
            # The plain mean until it spans the average's memory, so that the start does not linger.
            torch._foreach_lerp_(averaged, current, max(1 - decay, 1 / (int(count) + 1)))

        return move

    def averaged(self, name: str = EVALUATION) -> nn.Module:
        """The first network with the weights of the moving average `name`.

        The network itself, with its current weights, where there is no such average.
        """
        if name in self.averages:
            return self.averages[name].get_submodule("module.0")
        return self.networks[0]

    def learning_rate(self) -> float:
        """Rate of the coming update, in [0, lr], from the player's own progress."""
        c = self.config
        warm = 1.0
        if c.warmup:
            warm = min(1.0, (self.updates + 1) / (c.warmup * self.total_updates))
        progress = min(self.updates / self.total_updates, 1.0)
        decay = c.final_lr + (1 - c.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))
        return c.lr * warm * decay

    def update(self, loss: Tensor) -> None:
        """One optimiser step on a scalar `loss`, differentiated in this player's parameters only.

        Raises Diverged before anything moves where the loss or the norm of its gradient is not
        finite.
        """
        self.meter.count(f"{self.name}.backward", 0)
        gradients = torch.autograd.grad(
            loss, self.parameters, allow_unused=True, materialize_grads=True
        )
        gradients = _mean_across_ranks(gradients)
        for p, g in zip(self.parameters, gradients):
            p.grad = g
        norm = nn.utils.get_total_norm(gradients)
        if not loss.isfinite():
            raise Diverged(f"{self.name}: loss is {loss.item():.3g} at update {self.updates}")
        if not norm.isfinite():
            raise Diverged(
                f"{self.name}: gradient norm is {norm.item():.3g} at update {self.updates}"
            )
        if self.config.clip is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, self.config.clip, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.updates += 1
        for average in self.averages.values():
            average.update_parameters(self.networks)

    def state_dict(self) -> dict[str, Tensor]:
        """Flat state dict of everything that moves.

        It holds the networks, the moments of the optimiser, the averages and the number of updates.
        """
        state = _prefixed("networks.", self.networks.state_dict())
        for key, average in self.averages.items():
            state |= _prefixed(f"averages.{key}.", average.state_dict())
        for i, p in enumerate(self.parameters):
            state |= _prefixed(f"optimizer.{i}.", self.optimizer.state[p])
        return state | {"updates": torch.tensor(self.updates)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Inverse of `state_dict`; RuntimeError where a state dict of other networks is given."""
        self.networks.load_state_dict(_under("networks.", state))
        for key, average in self.averages.items():
            average.load_state_dict(_under(f"averages.{key}.", state))
        for i, p in enumerate(self.parameters):
            moments = _under(f"optimizer.{i}.", state)
            if moments:
                self.optimizer.state[p] = {k: v.clone() for k, v in moments.items()}
        self.updates = int(state["updates"])


def _mean_across_ranks(gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Mean of each gradient over all ranks, by one reduction; themselves on one rank."""
    world = ranks()[1]
    if world == 1:
        return gradients
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= world
    parts = flat.split([g.numel() for g in gradients])
    return tuple(part.view_as(g) for part, g in zip(parts, gradients))


def _prefixed(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` with `prefix` before every key."""
    return {f"{prefix}{k}": v for k, v in state.items()}


def _under(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The part of `state` whose keys begin with `prefix`, which is cut off."""
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
