"""DMD2 (Yin et al., arXiv 2405.14867): distribution matching without pairs.

A critic that moves more often, a GAN on its features, and a student of one or a few steps trained
on its own intermediate samples.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from distillbench import times
from distillbench.adversarial import VectorHead, softplus_discriminator, softplus_generator
from distillbench.matching import critic_loss, matching_gradient, pseudo_loss
from distillbench.method import Batch, Condition, Method, Needs, Step, Task
from distillbench.paths import denoiser, noised
from distillbench.players import PlayerConfig
from distillbench.samplers import drawn_step, renoising, simulated_input
from distillbench.seeds import Rng


class DMD2(Method):
    """Student of N steps trained by distribution matching and a GAN, without regression pairs."""

    class Config(BaseModel):
        """Settings of DMD2."""

        model_config = ConfigDict(extra="forbid")
        batch: int = Field(gt=0)
        steps: int = Field(gt=0, description="N, denoising steps of the student")
        input_time: float = Field(
            gt=0,
            le=1,
            description="t_i, its first step, which sees t_i z; the others are i/N of it",
        )
        inputs: Literal["simulated", "noised_real"] = Field(
            description="of the student's steps in training"
        )
        every: int = Field(
            gt=0, description="r: the critic moves on every step, the student on every r-th"
        )
        disjoint: bool = Field(description="the critic rests when the student moves (FastGen)")
        matching: bool = Field(description="the student has the distribution-matching loss")
        weighting: Literal["residual", "velocity"]
        time_low: float = Field(
            ge=0, lt=1, description="t ~ U(low, high) in the distribution-matching loss"
        )
        time_high: float = Field(gt=0, le=1)
        gan: float = Field(
            ge=0, description="lambda_G; 0 trains without a classifier and without data"
        )
        classifier: float = Field(gt=0, description="lambda_D")
        features: Literal["critic", "teacher"] = Field(
            description="whose features the classifier sees"
        )
        blocks: int = Field(gt=0, description="after how many blocks it sees them")
        head_width: int = Field(gt=0)
        conditioned: bool = Field(
            description="the critic is told which step of the student it judges"
        )
        student: PlayerConfig
        critic: PlayerConfig

        @model_validator(mode="after")
        def _fits(self) -> DMD2.Config:
            if not (self.matching or self.gan):
                raise ValueError("matching: false with gan: 0 leaves the student without a loss")
            if self.disjoint and self.every == 1:
                raise ValueError("disjoint with every: 1 never trains the critic")
            if self.inputs == "noised_real" and self.input_time < 1:
                raise ValueError(
                    "inputs: noised_real needs input_time: 1, "
                    "whose first step sees noise without data, as in sampling"
                )
            return self

    @classmethod
    def needs(cls, config: Config) -> Needs:
        n = config.steps
        cycle = config.every
        if config.inputs == "simulated":
            cycle *= n
        return Needs(
            batch=config.batch,
            # The grid of a divisor of N is part of the grid trained on.
            nfe=tuple(k for k in range(1, n + 1) if n % k == 0),
            headline_nfe=n,
            data=config.gan > 0 or config.inputs == "noised_real",
            cycle=cycle,
        )

    def __init__(self, task: Task, config: Config):
        self.task = task
        self.config = config
        self.net = task.network("teacher")
        self.fake = task.network("teacher", second_time=config.conditioned)
        self.student = task.player("student", config.student, self.net)
        guidance: list[nn.Module] = [self.fake]
        if config.gan:
            blocks = self.fake.blocks
            enter = self.fake.enter
            assert isinstance(blocks, nn.ModuleList) and isinstance(enter, nn.Linear)
            # Of a shallow network all blocks.
            self.config = config.model_copy(update={"blocks": min(config.blocks, len(blocks))})
            self.head = VectorHead(enter.out_features, config.head_width, task.classes)
            self.trunk = self.fake
            if config.features == "teacher":
                # A copy of the network: where the teacher is a closed form it has no features.
                self.trunk = task.network("teacher").requires_grad_(False)
            guidance.append(self.head)
        self.critic = task.player("critic", config.critic, *guidance)

    def generate(self, net: nn.Module, x_t: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        """G(x_t, t) = the network's denoised image x_t - t v(x_t, t), like x_t [B, ...]; t: [B]."""
        return denoiser(x_t, net(x_t, t, labels), t)

    def train_step(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """Section 4.2: the student on every r-th step, then the critic with the classifier.

        The critic moves on every step (unless `disjoint`), on the same samples.
        """
        c = self.config
        cond = batch.cond
        turn = step.index % c.every == 0
        x_k, t_k = self.student_input(batch, step)
        with torch.set_grad_enabled(turn):
            x = self.generate(self.net, x_k, t_k, cond.labels)
        logged = {"brightness": x.detach().mean()}  # Figure 8

        if turn:
            terms = []
            if c.matching:
                g = self.matching(x.detach(), t_k, cond, step)
                terms.append(pseudo_loss(x, g))
                logged["matching_gradient"] = g.square().mean().sqrt()
            if c.gan:
                logits = self.logits(x, t_k, cond.labels, step, "adversarial")
                adversarial = softplus_generator(logits)
                terms.append(c.gan * adversarial)
                logged["adversarial"] = adversarial.detach()
            self.student.update(torch.stack(terms).sum())

        if not (turn and c.disjoint):
            x = x.detach()
            t = times.uniform(step.rng("critic t"), len(x))
            e = step.rng("critic e").normal(*x.shape)
            fake = critic_loss(self.fake(noised(x, e, t), t, cond.labels, s=t - t_k), x, e)
            loss = fake
            if c.gan:
                assert batch.x is not None
                labels = None if cond.labels is None else torch.cat([cond.labels, cond.labels])
                images = torch.cat([batch.x, x])
                steps = torch.cat([t_k, t_k])
                real, generated = self.logits(images, steps, labels, step, "classifier").chunk(2)
                classifier = softplus_discriminator(real, generated)
                loss = fake + c.classifier * classifier
                logged["classifier"] = classifier.detach()
            self.critic.update(loss)
            logged["critic"] = fake.detach()
        return logged

    def student_input(self, batch: Batch, step: Step) -> tuple[Tensor, Tensor]:
        """(x_t [B, ...], t [B]) of one of the student's N steps.

        On its own path (section 4.5) or, k drawn per row, of noised real images.
        """
        n = batch.size
        steps = self.config.steps
        z = step.rng("z").normal(n, *self.task.shape)
        if self.config.inputs == "noised_real":
            assert batch.x is not None
            t = self.config.input_time * (1 - step.rng("k").integers(n, steps) / steps)
            return noised(batch.x, z, t), t
        k = drawn_step(step, steps, self.config.every)
        rng = step.rng("renoise")

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            return self.generate(self.net, x, t, batch.cond.labels)

        def fresh() -> Tensor:
            return rng.normal(*z.shape)

        return simulated_input(denoise, z, steps, k, fresh, self.config.input_time)

    @torch.no_grad()
    def matching(self, x: Tensor, t_k: Tensor, cond: Condition, step: Step) -> Tensor:
        """Gradient of the distribution-matching loss at the student's samples x, like x [B, ...].

        Eq. 1 and DMD's Algorithm 2; t_k [B] are the times of the student's steps. The critic is
        never guided.
        """
        c = self.config
        t = times.uniform(step.rng("matching t"), len(x), c.time_low, c.time_high)
        e = step.rng("matching e").normal(*x.shape)
        x_t = noised(x, e, t)
        v_fake = self.fake(x_t, t, cond.labels, s=t - t_k)
        v_real = self.task.teacher.velocity(x_t, t, cond)
        return matching_gradient(v_real, v_fake, x, e, t, c.weighting)

    def logits(self, x: Tensor, t_k: Tensor, labels: Tensor | None, step: Step, use: str) -> Tensor:
        """D [B]: the head on features of x [B, ...] (Eq. 4).

        Every row has noise and t ~ U(0, 1) of its own and of this `use`. s: the critic's second
        time, where it has one, is told t - s = t_k.
        """
        t = times.uniform(step.rng(f"{use} t"), len(x))
        e = step.rng(f"{use} e").normal(*x.shape)
        features = self.trunk(noised(x, e, t), t, labels, s=t - t_k, features=self.config.blocks)
        return self.head(features[-1], labels)

    def sample(self, noise: Tensor, cond: Condition, nfe: int, rng: Rng) -> Tensor:
        """Denoise, noise anew, denoise, ... (section 4.4)."""
        net = self.student.averaged()

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            return self.generate(net, x, t, cond.labels)

        def fresh() -> Tensor:
            return rng.normal(*noise.shape)

        return renoising(denoise, noise, nfe, fresh, start=self.config.input_time)
