"""SiD, score identity distillation (Zhou et al., arXiv 2404.04057), and its adversarial form SiDA (arXiv 2410.14919).

x is the generator's sample, D_real and D_fake the denoised images of x_t = (1-t) x + t e by the teacher and by the critic.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from distillbench import times
from distillbench.adversarial import softplus_discriminator, softplus_generator
from distillbench.method import Batch, Condition, Method, Needs, Step, Task
from distillbench.paths import denoiser, noised, over
from distillbench.players import PlayerConfig
from distillbench.seeds import Rng

SIGMA_MIN, SIGMA_MAX, RHO, U_MAX = (
    0.002,
    80.0,
    7,
    0.8,
)  # the generator's noise levels (official sid_loss.py; tmax = 800)
P_MEAN, P_STD = -1.2, 1.2  # of ln sigma, the critic's (EDM)
PAPER_STD = 0.5  # of the data for which all these are meant
FLOOR = 1e-5  # of W
CLAMP = 10.0  # of SiDA's logits in the generator's loss


def difference(v_fake: Tensor, v_real: Tensor, t: Tensor) -> Tensor:
    """delta = D_real - D_fake = t (v_fake - v_real), [B, ...]; t: [B] in [0, 1]. The score difference without a division by t."""
    return over(t, v_fake) * (v_fake - v_real)


def normaliser(x: Tensor, d_real: Tensor) -> Tensor:
    """W = sg mean |x - D_real|, one number of at least 1e-5 for each sample, [B, 1, ...]: the only stop-gradient (sid_loss.py)."""
    return (
        (x - d_real)
        .detach()
        .abs()
        .mean(dim=tuple(range(1, x.dim())), keepdim=True)
        .clamp_min(FLOOR)
    )


def projected_loss(delta: Tensor, x: Tensor, d_real: Tensor, w: Tensor, alpha: float) -> Tensor:
    """L2 - alpha L1 = mean (1/W) delta [(D_real - x) - alpha delta], delta, x, D_real: [B, ...] with their graphs (sid_loss.py).

    A scalar of either sign, 0 where delta is. L1 is delta^2; in L2 one of its factors D_real - D_fake has become D_real - x,
    which has the same mean for the optimal critic: E[g(x_t) (D_fake - x)] = 0 for every g.
    """
    return (delta * (d_real - x - alpha * delta) / w).mean()


def naive_loss(delta: Tensor, w: Tensor) -> Tensor:
    """L1 = mean (1/W) |delta|^2, the Fisher divergence with the critic taken for a constant: the ablation that fails."""
    return (delta.square() / w).mean()


def critic_loss(v_fake: Tensor, x: Tensor, e: Tensor, weight: Tensor) -> Tensor:
    """mean weight |v_fake - (e - sg x)|^2; weight [B], EDM's is weight(t) = (1-t)^2 + t^2 / std^2 (SiDLoss; `edm_weight`)."""
    return (over(weight, x) * (v_fake - (e - x.detach())).square()).mean()


def edm_weight(t: Tensor, std: float) -> Tensor:
    """t^2 lambda(sigma), which turns EDM's weight 1/sigma^2 + 1/std^2 on a denoised image into one on a velocity; [B]."""
    return (1 - t) ** 2 + t**2 / std**2


def karras(u: Tensor) -> Tensor:
    """sigma of u in [0, 1] on EDM's grid, from the clean end: sigma(0) = 0.002, sigma(1) = 80 (sid_loss.py)."""
    low, high = SIGMA_MIN ** (1 / RHO), SIGMA_MAX ** (1 / RHO)
    return (high + (1 - u) * (low - high)) ** RHO


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """(BCE(D(real), 1) + BCE(D(fake), 0)) / 2 from logits, log 2 at D = 0 (sida_loss.py)."""
    return 0.5 * softplus_discriminator(real, fake)


def adversarial_loss(fake: Tensor, w: Tensor) -> Tensor:
    """BCE(D(x_t), 1) mean(1/W), logits clamped to [-10, 10]: no gradient beyond (sida_loss.py)."""
    return softplus_generator(fake.clamp(-CLAMP, CLAMP)) * (1 / w).mean()


class SiD(Method):
    class Config(BaseModel):
        model_config = ConfigDict(extra="forbid")
        batch: int = Field(
            gt=0, description="samples of the critic's update, and as many of the generator's"
        )
        loss: Literal["projected", "naive", "detached"] = Field(
            description="detached: no gradient through teacher and critic"
        )
        alpha: float
        normalised: bool = Field(description="divide by W; false: W = 1")
        law: Literal["uniform", "edm"] = Field(
            description="of t: U(low, high), critic U(0, 1) with unit weight; or the paper's"
        )
        time_low: float = Field(ge=0, lt=1)
        time_high: float = Field(gt=0, le=1)
        data_std: float = Field(
            gt=0, description="law: edm has noise levels and weight in proportion to it"
        )
        input_time: float = Field(
            gt=0, le=1, description="t_i, the level at which the generator sees t_i z"
        )
        adversarial: float = Field(
            ge=0, description="weight of SiDA's term in the generator's loss; 0: SiD, without data"
        )
        discriminator: float = Field(ge=0, description="weight of SiDA's loss in the critic's")
        parts: int = Field(
            ge=1,
            description="of the run: in the first only the critic moves, in the second SiD's loss stands alone; 1: neither",
        )
        student: PlayerConfig
        critic: PlayerConfig

    @classmethod
    def needs(cls, config: Config) -> Needs:
        # A cycle has one step of every part: that is what the meter sees of the run.
        return Needs(
            batch=2 * config.batch,
            nfe=(1,),
            headline_nfe=1,
            data=config.adversarial > 0,
            cycle=config.parts,
        )

    def __init__(self, task: Task, config: Config):
        self.task, self.config = task, config
        self.net, self.fake = task.network("teacher"), task.network("teacher")
        self.middle = (len(self.fake.blocks) + 1) // 2
        self.student = task.player("student", config.student, self.net)
        self.critic = task.player("critic", config.critic, self.fake)

    def generate(self, net: torch.nn.Module, z: Tensor, labels: Tensor | None) -> Tensor:
        """G(z): the network's denoised image of t_i z at t_i. The input holds no data (sid_training_loop.py)."""
        t = z.new_full((len(z),), self.config.input_time)
        x_t = self.config.input_time * z
        return denoiser(x_t, net(x_t, t, labels), t)

    def judged(self, x_t: Tensor, t: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """One evaluation of the critic: its velocity, and SiDA's logits [B], the mean over the width of its middle block."""
        kept: list[Tensor] = []
        hook = self.fake.blocks[self.middle - 1].register_forward_hook(
            lambda _block, _inputs, h: kept.append(h)
        )
        v = self.fake(x_t, t, labels)
        hook.remove()
        return v, kept[0].mean(1)

    def generator_times(self, rng: Rng, n: int) -> Tensor:
        """t [n] of the generator's loss."""
        c = self.config
        if c.law == "uniform":
            return times.uniform(rng, n, c.time_low, c.time_high)
        sigma = c.data_std / PAPER_STD * karras(times.uniform(rng, n, 0, U_MAX))
        return sigma / (1 + sigma)

    def critic_times(self, rng: Rng, n: int) -> tuple[Tensor, Tensor]:
        """t and weight, [n] each, of the critic's loss."""
        if self.config.law == "uniform":
            t = times.uniform(rng, n)
            return t, torch.ones_like(t)
        std = self.config.data_std
        t = times.logit_normal(
            rng, n, P_MEAN + math.log(std / PAPER_STD), P_STD
        )  # logit t = ln sigma
        return t, edm_weight(t, std)

    def train_step(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """Critic, then generator, once each, on samples of their own (sid_training_loop.py, sida_training_loop.py)."""
        c, n, labels = self.config, batch.size // 2, batch.cond.labels
        own, cond = (
            Condition(None if labels is None else labels[i : i + n], batch.cond.guidance)
            for i in (0, n)
        )
        part = step.index * c.parts // step.total if c.parts > 1 else 2

        z = step.rng("critic z").normal(n, *self.task.shape)
        with torch.no_grad():
            x = self.generate(self.net, z, own.labels)
        t, weight = self.critic_times(step.rng("critic t"), n)
        e = step.rng("critic e").normal(*x.shape)
        v_fake, fake = self.judged(noised(x, e, t), t, own.labels)
        loss = critic = critic_loss(v_fake, x, e, weight)
        logged = {"critic": critic.detach()}
        if c.adversarial:  # real images under the same t and e
            assert batch.x is not None
            real = self.fake(noised(batch.x[:n], e, t), t, own.labels, features=self.middle)[
                -1
            ].mean(1)
            discriminator = discriminator_loss(real, fake)
            loss = loss + c.discriminator * discriminator
            logged["discriminator"] = discriminator.detach()
        self.critic.update(loss)
        if part == 0:
            return logged

        x = self.generate(self.net, step.rng("z").normal(n, *self.task.shape), cond.labels)
        t = self.generator_times(step.rng("t"), n)
        e = step.rng("e").normal(*x.shape)
        with torch.set_grad_enabled(c.loss != "detached"):  # neither network is a constant in x_t
            x_t = noised(x, e, t)
            v_fake, fake = self.judged(x_t, t, cond.labels)
            v_real = self.task.teacher.velocity(x_t, t, cond)
            delta, d_real = difference(v_fake, v_real, t), denoiser(x_t, v_real, t)
        w = normaliser(x, d_real) if c.normalised else torch.ones_like(over(t, x))
        loss = (
            naive_loss(delta, w)
            if c.loss == "naive"
            else projected_loss(delta, x, d_real, w, c.alpha)
        )
        logged["delta"] = delta.detach().square().mean().sqrt()
        if c.adversarial:
            adversarial = adversarial_loss(fake, w)
            logged["adversarial"] = adversarial.detach()
            loss = loss if part == 1 else 0.5 * loss + 0.5 * c.adversarial * adversarial
        self.student.update(loss)
        return logged

    def sample(self, noise: Tensor, cond: Condition, nfe: int, rng: Rng) -> Tensor:
        return self.generate(self.student.averaged(), noise, cond.labels)
