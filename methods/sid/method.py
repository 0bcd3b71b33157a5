"""SiD, score identity distillation (Zhou et al., arXiv 2404.04057), and SiDA (arXiv 2410.14919).

SiDA is its adversarial form.
x is the generator's sample, D_real and D_fake the denoised images of x_t = (1-t) x + t e by the
teacher and by the critic.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from distillbench import times
from distillbench.adversarial import softplus_discriminator, softplus_generator
from distillbench.method import Batch, Condition, Method, Needs, Step, Task
from distillbench.paths import denoiser, noised, over
from distillbench.players import PlayerConfig
from distillbench.seeds import Rng

# The generator's noise levels (official sid_loss.py; tmax = 800).
SIGMA_MIN = 0.002
SIGMA_MAX = 80.0
RHO = 7
U_MAX = 0.8
# Of ln sigma, the critic's (EDM).
P_MEAN = -1.2
P_STD = 1.2
PAPER_STD = 0.5  # of the data for which all these are meant
FLOOR = 1e-5  # of W
CLAMP = 10.0  # of SiDA's logits in the generator's loss


def difference(v_fake: Tensor, v_real: Tensor, t: Tensor) -> Tensor:
    """delta = D_real - D_fake = t (v_fake - v_real), [B, ...]; t: [B] in [0, 1].

    The score difference without a division by t.
    """
    return over(t, v_fake) * (v_fake - v_real)


def normaliser(x: Tensor, d_real: Tensor) -> Tensor:
    """W = sg mean |x - D_real|, at least 1e-5, one number for each sample: [B, 1, ...].

    x, D_real: [B, ...]. The only stop-gradient (sid_loss.py).
    """
    elements = tuple(range(1, x.dim()))
    distance = (x - d_real).detach().abs().mean(dim=elements, keepdim=True)
    return distance.clamp_min(FLOOR)


def projected_loss(delta: Tensor, x: Tensor, d_real: Tensor, w: Tensor, alpha: float) -> Tensor:
    """L2 - alpha L1 = mean (1/W) delta [(D_real - x) - alpha delta] (sid_loss.py).

    delta, x, D_real: [B, ...] with their graphs; W: [B, 1, ...]. A scalar of either sign, 0 where
    delta is. L1 is delta^2; in L2 one of its factors D_real - D_fake has become D_real - x, which
    has the same mean for the optimal critic: E[g(x_t) (D_fake - x)] = 0 for every g.
    """
    return (delta * (d_real - x - alpha * delta) / w).mean()


def naive_loss(delta: Tensor, w: Tensor) -> Tensor:
    """L1 = mean (1/W) |delta|^2, the Fisher divergence with the critic taken for a constant.

    delta: [B, ...], W: [B, 1, ...]; a scalar. The ablation that fails.
    """
    return (delta.square() / w).mean()


def critic_loss(v_fake: Tensor, x: Tensor, e: Tensor, weight: Tensor) -> Tensor:
    """mean weight |v_fake - (e - sg x)|^2: a scalar; v_fake, x, e: [B, ...], weight: [B].

    EDM's is weight(t) = (1-t)^2 + t^2 / std^2 (SiDLoss; `edm_weight`).
    """
    error = v_fake - (e - x.detach())
    return (over(weight, x) * error.square()).mean()


def edm_weight(t: Tensor, std: float) -> Tensor:
    """t^2 lambda(sigma), EDM's weight 1/sigma^2 + 1/std^2 as one on velocities; t: [B] -> [B]."""
    return (1 - t) ** 2 + t**2 / std**2


def karras(u: Tensor) -> Tensor:
    """sigma of u in [0, 1] on EDM's grid, from the clean end, like u (sid_loss.py).

    sigma(0) = 0.002, sigma(1) = 80.
    """
    low = SIGMA_MIN ** (1 / RHO)
    high = SIGMA_MAX ** (1 / RHO)
    return (high + (1 - u) * (low - high)) ** RHO


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """(BCE(D(real), 1) + BCE(D(fake), 0)) / 2 from logits [B], log 2 at D = 0 (sida_loss.py)."""
    return 0.5 * softplus_discriminator(real, fake)


def adversarial_loss(fake: Tensor, w: Tensor) -> Tensor:
    """BCE(D(x_t), 1) mean(1/W), a scalar; fake: logits [B], W: [B, 1, ...] (sida_loss.py).

    Logits are clamped to [-10, 10]: no gradient beyond.
    """
    return softplus_generator(fake.clamp(-CLAMP, CLAMP)) * (1 / w).mean()


class SiD(Method):
    """One-step generator trained by score identity; with `adversarial` it is SiDA."""

    class Config(BaseModel):
        """Settings of SiD and SiDA."""

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
            description="of the run: in the first only the critic moves, "
            "in the second SiD's loss stands alone; 1: neither",
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
        self.task = task
        self.config = config
        self.net = task.network("teacher")
        self.fake = task.network("teacher")
        blocks = self.fake.blocks
        assert isinstance(blocks, nn.ModuleList)
        self.middle = (len(blocks) + 1) // 2  # blocks below SiDA's logits
        self.middle_block = blocks[self.middle - 1]
        self.student = task.player("student", config.student, self.net)
        self.critic = task.player("critic", config.critic, self.fake)

    def generate(self, net: nn.Module, z: Tensor, labels: Tensor | None) -> Tensor:
        """G(z): the network's denoised image of t_i z at t_i, like z [B, ...].

        The input holds no data (sid_training_loop.py).
        """
        t = z.new_full((len(z),), self.config.input_time)
        x_t = self.config.input_time * z
        return denoiser(x_t, net(x_t, t, labels), t)

    def judged(self, x_t: Tensor, t: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """The critic's velocity, like x_t [B, ...], and SiDA's logits [B], by one evaluation.

        The logits are the mean over the width of its middle block.
        """
        kept: list[Tensor] = []

        def keep(_block: nn.Module, _inputs: tuple[Tensor, ...], h: Tensor) -> None:
            kept.append(h)

        hook = self.middle_block.register_forward_hook(keep)
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
        mean = P_MEAN + math.log(std / PAPER_STD)
        t = times.logit_normal(rng, n, mean, P_STD)  # logit t = ln sigma
        return t, edm_weight(t, std)

    def train_step(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """Critic, then generator, once each, on samples of their own.

        As in sid_training_loop.py and sida_training_loop.py.
        """
        c = self.config
        n = batch.size // 2
        labels = batch.cond.labels
        own = Condition(None if labels is None else labels[:n], batch.cond.guidance)
        cond = Condition(None if labels is None else labels[n : 2 * n], batch.cond.guidance)
        part = step.index * c.parts // step.total if c.parts > 1 else 2

        z = step.rng("critic z").normal(n, *self.task.shape)
        with torch.no_grad():
            x = self.generate(self.net, z, own.labels)
        t, weight = self.critic_times(step.rng("critic t"), n)
        e = step.rng("critic e").normal(*x.shape)
        v_fake, fake = self.judged(noised(x, e, t), t, own.labels)
        critic = critic_loss(v_fake, x, e, weight)
        loss = critic
        logged = {"critic": critic.detach()}
        if c.adversarial:  # real images under the same t and e
            assert batch.x is not None
            x_t = noised(batch.x[:n], e, t)
            features = self.fake(x_t, t, own.labels, features=self.middle)
            real = features[-1].mean(1)
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
            delta = difference(v_fake, v_real, t)
            d_real = denoiser(x_t, v_real, t)
        w = normaliser(x, d_real) if c.normalised else torch.ones_like(over(t, x))
        if c.loss == "naive":
            loss = naive_loss(delta, w)
        else:
            loss = projected_loss(delta, x, d_real, w, c.alpha)
        logged["delta"] = delta.detach().square().mean().sqrt()
        if c.adversarial:
            adversarial = adversarial_loss(fake, w)
            logged["adversarial"] = adversarial.detach()
            if part > 1:
                loss = 0.5 * loss + 0.5 * c.adversarial * adversarial
        self.student.update(loss)
        return logged

    def sample(self, noise: Tensor, cond: Condition, nfe: int, rng: Rng) -> Tensor:
        """G(noise) of the averaged generator."""
        return self.generate(self.student.averaged(), noise, cond.labels)
