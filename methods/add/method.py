"""ADD, adversarial diffusion distillation (Sauer et al., arXiv 2311.17042).

Heads on frozen features judge the student's samples, and so does the teacher.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor, nn

from distillbench import times
from distillbench.adversarial import TokenHead, VectorHead, hinge_discriminator, hinge_generator, r1
from distillbench.method import Batch, Condition, Method, Needs, Step, Task
from distillbench.paths import denoiser, noised, over
from distillbench.players import PlayerConfig
from distillbench.samplers import renoising
from distillbench.seeds import Rng

# c(t) of Eq. 4 (App. A). "sds" is c = (1-t) w(t) / (2t) with w(t) = t^2: nothing is divided by t.
WEIGHTINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "exponential": lambda t: 1 - t,
    "sds": lambda t: (1 - t) * t / 2,
}


def generator_loss(fake: list[Tensor]) -> Tensor:
    """-sum_k mean D_k(F_k(x_hat)) from each head's logits, [B] or [B, tokens] (Eq. 2): a scalar."""
    return torch.stack([hinge_generator(f) for f in fake]).sum()


def discriminator_loss(real: list[Tensor], fake: list[Tensor]) -> Tensor:
    """sum_k mean max(0, 1 - D_k(real)) + mean max(0, 1 + D_k(fake)), Eq. 3 without R1: a scalar.

    real, fake: logits of each head, [B] or [B, tokens]; 2 for each head at D = 0.
    """
    return torch.stack([hinge_discriminator(r, f) for r, f in zip(real, fake)]).sum()


def penalty(logits: list[Tensor], features: list[Tensor]) -> Tensor:
    """sum_k R1 of head k with respect to what it is given, not to pixels (Eq. 3): a scalar.

    `features`, from which each head's logits were computed, require a gradient.
    """
    return torch.stack([r1(d, f) for d, f in zip(logits, features)]).sum()


def distillation_loss(x: Tensor, v: Tensor, x_t: Tensor, t: Tensor, weighting: str) -> Tensor:
    """mean c(t) (x_hat - sg x_psi)^2 (Eq. 4): a scalar.

    x_psi = x_t - t v is the teacher's denoised image of the re-noised x_hat. x = x_hat, v, x_t:
    [B, ...]; t: [B] in [0, 1]; `weighting`: a key of WEIGHTINGS (KeyError otherwise). With
    x_t = (1-t) x_hat + t e its gradient in x_hat is 2 c(t) t (v - (e - x_hat)) / elements.
    """
    c = over(WEIGHTINGS[weighting](t), x)
    x_psi = denoiser(x_t, v, t).detach()
    return (c * (x - x_psi).square()).mean()


def draw_level(rng: Rng, n: int, law: tuple[float, ...]) -> Tensor:
    """[n] student times s from {1, 1 - 1/N, ..., 1/N}, N = len(law) (section 3.1).

    `law`: their probabilities in this order.
    """
    u = rng.uniform(n)
    edges = torch.tensor(law, device=u.device).cumsum(0)[:-1]
    return 1 - torch.searchsorted(edges, u, right=True) / len(law)


class ADD(Method):
    """Student on real images noised to N levels, heads on frozen features, the teacher as judge."""

    class Config(BaseModel):
        """Settings of ADD."""

        model_config = ConfigDict(extra="forbid")
        batch: int = Field(gt=0)
        init: Literal["teacher", "random"] = Field(description="of the student")
        levels: tuple[float, ...] = Field(
            min_length=1, description="probabilities of s = 1, 1 - 1/N, ..., 1/N"
        )
        adversarial: bool = Field(description="false: the distillation loss alone")
        features: Literal["self_supervised", "random"] = Field(
            description="the frozen network below the heads"
        )
        kernel: int | None = Field(
            ge=1,
            description="of the heads' convolution over tokens, odd; "
            "null: one hidden layer on all tokens",
        )
        pixel: bool = Field(description="one more head, on the image itself")
        conditional: bool = Field(description="heads are projected on the class")
        hidden: int = Field(gt=0, description="width of the heads")
        r1: float = Field(ge=0, description="gamma")
        distillation: float = Field(ge=0, description="lambda; 0: the adversarial loss alone")
        weighting: Literal["exponential", "sds"] = Field(description="c(t)")
        student: PlayerConfig
        discriminator: PlayerConfig

        @field_validator("levels")
        @classmethod
        def _law(cls, levels: tuple[float, ...]) -> tuple[float, ...]:
            if min(levels) <= 0 or abs(sum(levels) - 1) > 1e-6:  # samplers may visit any of them
                raise ValueError("not positive probabilities that sum to 1")
            return levels

    @classmethod
    def needs(cls, config: Config) -> Needs:
        n = len(config.levels)
        return Needs(
            batch=config.batch,
            nfe=tuple(k for k in range(1, n + 1) if n % k == 0),  # all their levels are trained
            headline_nfe=1,
            data=config.adversarial or n > 1,  # the distillation loss at s = 1 alone sees none
            features=config.features if config.adversarial else None,
        )

    def __init__(self, task: Task, config: Config):
        self.task = task
        self.config = config
        self.net = task.network(config.init)
        self.student = task.player("student", config.student, self.net)
        if config.adversarial:
            probe = self.features(torch.zeros(1, *task.shape, device=task.device))
            classes = task.classes if config.conditional else 0
            self.heads = [self.head(f.shape[-1], classes) for f in probe]
            self.discriminator = task.player("discriminator", config.discriminator, *self.heads)

    def head(self, width: int, classes: int) -> nn.Module:
        """D_k on features of this width, projected on the class unless `classes` is 0."""
        c = self.config
        if c.kernel is None:
            return VectorHead(width, c.hidden, classes)
        return TokenHead(width, c.hidden, c.kernel, classes)

    def features(self, x: Tensor) -> list[Tensor]:
        """F_k(x [B, ...]) for every head, by one evaluation of the frozen network.

        Tokens [B, T, width]; flattened to [B, T width] for heads without a kernel.
        """
        assert self.task.features is not None
        tokens = list(self.task.features(x))
        if self.config.pixel:
            tokens.append(x.flatten(1)[:, None])
        if self.config.kernel is None:
            return [f.flatten(1) for f in tokens]
        return tokens

    def judge(self, features: list[Tensor], labels: Tensor | None) -> list[Tensor]:
        """Logits D_k(F_k(x)) of every head, [B] or [B, tokens].

        Real and generated rows go in calls of their own: heads may normalise over rows.
        """
        return [head(f, labels) for head, f in zip(self.heads, features)]

    def denoise(self, net: nn.Module, labels: Tensor | None) -> Callable[[Tensor, Tensor], Tensor]:
        """x_hat(x_s, s) = x_s - s v(x_s, s) (section 3.1); at s = 1 its input is pure noise."""

        def x_hat(x_s: Tensor, s: Tensor) -> Tensor:
            return denoiser(x_s, net(x_s, s, labels), s)

        return x_hat

    def train_step(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """Section 3.1: the student, then the heads on the same samples."""
        c = self.config
        n = batch.size
        labels = batch.cond.labels
        x_0 = batch.x
        logged = {}
        s = draw_level(step.rng("s"), n, c.levels)
        e = step.rng("e").normal(n, *self.task.shape)
        x_s = e if x_0 is None else noised(x_0, e, s)
        x = self.denoise(self.net, labels)(x_s, s)

        loss = x.new_zeros(())
        if c.adversarial:  # Eq. 2
            fake = self.features(x)
            adversarial = generator_loss(self.judge(fake, labels))
            loss = loss + adversarial
            logged["generator"] = adversarial.detach()
        if c.distillation:  # Eq. 4: the teacher sees the student's own sample, noised again
            t = times.uniform(step.rng("t"), n)
            e_t = step.rng("teacher e").normal(*x.shape)
            x_t = noised(x.detach(), e_t, t)
            with torch.no_grad():
                v = self.task.teacher.velocity(x_t, t, batch.cond)
            distillation = distillation_loss(x, v, x_t, t, c.weighting)
            loss = loss + c.distillation * distillation
            logged["distillation"] = distillation.detach()
        self.student.update(loss)

        # Eq. 3, real images against samples. The features are frozen: those of the samples need no
        # second evaluation.
        if c.adversarial:
            assert x_0 is not None
            real = self.features(x_0.detach().requires_grad_(c.r1 > 0))
            d_real = self.judge(real, labels)
            d_fake = self.judge([f.detach() for f in fake], labels)
            loss = discriminator_loss(d_real, d_fake)
            logged["discriminator"] = loss.detach()
            if c.r1:
                r = penalty(d_real, real)
                loss = loss + c.r1 * r
                logged["r1"] = r.detach()
            self.discriminator.update(loss)
        return logged

    def sample(self, noise: Tensor, cond: Condition, nfe: int, rng: Rng) -> Tensor:
        """Predict, noise again to the next level, predict: s = 1, 1 - 1/nfe, ... (section 3)."""

        def fresh() -> Tensor:
            return rng.normal(*noise.shape)

        return renoising(self.denoise(self.student.averaged(), cond.labels), noise, nfe, fresh)
