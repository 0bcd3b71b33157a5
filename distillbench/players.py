"""A player: what one optimiser steps, with its schedule, clipping, moving averages and averaging across ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

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
        0.0, ge=0, lt=1, description="linear warm-up, as a share of the player's own updates"
    )
    final_lr: float = Field(
        1.0, ge=0, le=1, description="cosine decay ends at this share of lr; 1 keeps lr constant"
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
        self.name, self.config, self.meter = name, config, meter
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
        self.averages = {
            key: AveragedModel(self.networks, multi_avg_fn=self._average(half_life)).requires_grad_(
                False
            )
            for key, half_life in config.half_lives.items()
        }

    def _average(self, half_life: float) -> Callable[..., None]:
        def move(averaged: list[Tensor], current: list[Tensor], count: Tensor) -> None:
            decay = 0.5 ** (1 / max(half_life * self.total_updates, 1e-9))
            # The plain mean until it spans the average's memory, so that the start does not linger.
            torch._foreach_lerp_(averaged, current, max(1 - decay, 1 / (int(count) + 1)))

        return move

    def averaged(self, name: str = EVALUATION) -> nn.Module:
        """The first network with the weights of the moving average `name`, or its own where there is no such average."""
        return (
            self.averages[name].get_submodule("module.0")
            if name in self.averages
            else self.networks[0]
        )

    def learning_rate(self) -> float:
        """Rate of the coming update from the player's own progress."""
        c, progress = self.config, self.updates / self.total_updates
        warm = min(1.0, (self.updates + 1) / (c.warmup * self.total_updates)) if c.warmup else 1.0
        return (
            c.lr
            * warm
            * (c.final_lr + (1 - c.final_lr) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))
        )

    def update(self, loss: Tensor) -> None:
        """One optimiser step on a scalar `loss`, differentiated in this player's parameters only.

        Raises Diverged before anything moves where the loss or the norm of its gradient is not finite.
        """
        self.meter.count(f"{self.name}.backward", 0)
        gradients = list(
            torch.autograd.grad(loss, self.parameters, allow_unused=True, materialize_grads=True)
        )
        if (world := ranks()[1]) > 1:
            flat = torch.cat([g.flatten() for g in gradients])
            dist.all_reduce(flat)
            flat /= world
            gradients = [
                f.view_as(g) for f, g in zip(flat.split([g.numel() for g in gradients]), gradients)
            ]
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
        """Everything that moves, flat: networks, optimiser moments, averages, the number of updates."""
        state = {f"networks.{k}": v for k, v in self.networks.state_dict().items()}
        for key, average in self.averages.items():
            state |= {f"averages.{key}.{k}": v for k, v in average.state_dict().items()}
        for i, p in enumerate(self.parameters):
            state |= {f"optimizer.{i}.{k}": v for k, v in self.optimizer.state[p].items()}
        return state | {"updates": torch.tensor(self.updates)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Inverse of `state_dict`."""

        def under(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}

        self.networks.load_state_dict(under("networks."))
        for key, average in self.averages.items():
            average.load_state_dict(under(f"averages.{key}."))
        for i, p in enumerate(self.parameters):
            if moments := under(f"optimizer.{i}."):
                self.optimizer.state[p] = {k: v.clone() for k, v in moments.items()}
        self.updates = int(state["updates"])
