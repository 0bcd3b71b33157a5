"""DMD, distribution matching distillation (Yin et al., arXiv 2311.18828).

A one-step generator, a critic that follows its samples, and regression on the teacher's ODE pairs.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from distillbench import times
from distillbench.matching import critic_loss, matching_gradient, pseudo_loss
from distillbench.method import Batch, Condition, Method, Needs, Pairs, Step, Task
from distillbench.paths import denoiser, noised
from distillbench.players import PlayerConfig
from distillbench.seeds import Rng


def regression_loss(x: Tensor, y: Tensor) -> Tensor:
    """Mean squared distance of generated x to the teacher's ODE samples y (Eq. 9; App. I).

    x, y: [B, ...], of the same noise; a scalar.
    """
    return (x - y).square().mean()


class DMD(Method):
    """One-step generator trained by distribution matching and by regression on pairs."""

    class Config(BaseModel):
        """Settings of DMD."""

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
        pairs: Pairs | None = None
        if config.regression:
            pairs = Pairs(config.pairs, config.pair_heun_steps, config.pair_batch)
        return Needs(batch=config.batch, nfe=(1,), headline_nfe=1, pairs=pairs)

    def __init__(self, task: Task, config: Config):
        self.task = task
        self.config = config
        self.net = task.network("teacher")
        self.fake = task.network("teacher")
        self.student = task.player("student", config.student, self.net)
        self.critic = task.player("critic", config.critic, self.fake)

    def generate(self, net: nn.Module, z: Tensor, labels: Tensor | None) -> Tensor:
        """G(z) = the network's denoised image at t = 1 (section 3.1), like z [B, ...]."""
        one = z.new_ones(len(z))
        return denoiser(z, net(z, one, labels), one)

    def train_step(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """Algorithm 1: the generator first, then the critic on the same samples."""
        c = self.config
        n = batch.size
        cond = batch.cond
        labels = cond.labels
        z = step.rng("z").normal(n, *self.task.shape)

        # Generator: both of its batches in one evaluation.
        y: Tensor | None = None
        if batch.pairs is not None:
            z_ref, y, ref = batch.pairs
            z = torch.cat([z, z_ref])
            if labels is not None:
                assert ref.labels is not None
                labels = torch.cat([labels, ref.labels])
        x_all = self.generate(self.net, z, labels)
        x = x_all[:n]
        t = times.uniform(step.rng("t"), n, c.time_low, c.time_high)
        e = step.rng("e").normal(*x.shape)
        with torch.no_grad():  # Algorithm 2
            x_t = noised(x, e, t)
            v_fake = self.fake(x_t, t, cond.labels)
            v_real = self.task.teacher.velocity(x_t, t, cond)
            g = matching_gradient(v_real, v_fake, x, e, t, c.weighting)
        loss = pseudo_loss(x, g)
        logged = {"matching_gradient": g.square().mean().sqrt()}
        if y is not None:
            regression = regression_loss(x_all[n:], y)
            loss = loss + c.regression * regression
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
        """G(noise) of the averaged generator."""
        return self.generate(self.student.averaged(), noise, cond.labels)
