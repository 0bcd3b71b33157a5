"""DMD, distribution matching distillation (Yin et al., arXiv 2311.18828): a one-step generator, a critic, ODE pairs."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from distillbench import times
from distillbench.matching import critic_loss, matching_gradient, pseudo_loss
from distillbench.method import Batch, Condition, Method, Needs, Pairs, Step, Task
from distillbench.paths import denoiser, noised
from distillbench.players import PlayerConfig
from distillbench.seeds import Rng


def regression_loss(x: Tensor, y: Tensor) -> Tensor:
    """Mean squared distance of generated x to the teacher's ODE samples y of the same noise, both [B, ...] (Eq. 9; App. I)."""
    return (x - y).square().mean()


class DMD(Method):
    class Config(BaseModel):
        model_config = ConfigDict(extra="forbid")
        batch: int = Field(gt=0)
        weighting: Literal["residual", "alpha_residual", "sigma_alpha", "sigma3_alpha", "velocity"]
        time_low: float = Field(
            ge=0, lt=1, description="t ~ U(low, high) in the distribution-matching loss"
        )
        time_high: float = Field(gt=0, le=1)
        regression: float = Field(ge=0, description="lambda_reg; 0 trains without pairs")
        pairs: int = Field(gt=0)
        pair_heun_steps: int = Field(gt=0)
        pair_batch: int = Field(gt=0)
        student: PlayerConfig
        critic: PlayerConfig

    @classmethod
    def needs(cls, config: Config) -> Needs:
        pairs = (
            Pairs(config.pairs, config.pair_heun_steps, config.pair_batch)
            if config.regression
            else None
        )
        return Needs(batch=config.batch, nfe=(1,), headline_nfe=1, pairs=pairs)

    def __init__(self, task: Task, config: Config):
        self.task, self.config = task, config
        self.net, self.fake = task.network("teacher"), task.network("teacher")
        self.student = task.player("student", config.student, self.net)
        self.critic = task.player("critic", config.critic, self.fake)

    def generate(self, net: torch.nn.Module, z: Tensor, labels: Tensor | None) -> Tensor:
        """G(z) = the network's denoised image at t = 1 (section 3.1)."""
        one = z.new_ones(len(z))
        return denoiser(z, net(z, one, labels), one)

    def train_step(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """Algorithm 1: the generator first, then the critic on the same samples."""
        c, n, labels = self.config, batch.size, batch.cond.labels
        z = step.rng("z").normal(n, *self.task.shape)

        # Generator: both of its batches in one evaluation.
        y = None
        if batch.pairs is not None:
            z_ref, y, ref = batch.pairs
            z, labels = (
                torch.cat([z, z_ref]),
                None if labels is None else torch.cat([labels, ref.labels]),
            )
        x_all = self.generate(self.net, z, labels)
        x, cond = x_all[:n], batch.cond
        t = times.uniform(step.rng("t"), n, c.time_low, c.time_high)
        e = step.rng("e").normal(*x.shape)
        with torch.no_grad():  # Algorithm 2
            x_t = noised(x, e, t)
            v_fake, v_real = (
                self.fake(x_t, t, cond.labels),
                self.task.teacher.velocity(x_t, t, cond),
            )
            g = matching_gradient(v_real, v_fake, x, e, t, c.weighting)
        loss = matching = pseudo_loss(x, g)
        logged = {"matching_gradient": g.square().mean().sqrt()}
        if y is not None:
            regression = regression_loss(x_all[n:], y)
            loss = matching + c.regression * regression
            logged["regression"] = regression.detach()
        self.student.update(loss)

        # Critic: fresh noise and times over the full range; it is never guided.
        t = times.uniform(step.rng("critic t"), n)
        e = step.rng("critic e").normal(*x.shape)
        x = x.detach()
        fake = critic_loss(self.fake(noised(x, e, t), t, cond.labels), x, e)
        self.critic.update(fake)
        return logged | {"critic": fake.detach()}

    def sample(self, noise: Tensor, cond: Condition, nfe: int, rng: Rng) -> Tensor:
        return self.generate(self.student.averaged(), noise, cond.labels)
