"""DMD2 (Yin et al., arXiv 2405.14867): distribution matching without pairs, a critic that moves more often, a GAN on its features,
a student of one or a few steps trained on its own intermediate samples.
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
    class Config(BaseModel):
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
                    "inputs: noised_real needs input_time: 1, whose first step sees noise without data, as in sampling"
                )
            return self

    @classmethod
    def needs(cls, config: Config) -> Needs:
        n = config.steps  # the grid of a divisor of N is part of the grid trained on
        nfe = tuple(k for k in range(1, n + 1) if n % k == 0)
        data = config.gan > 0 or config.inputs == "noised_real"
        return Needs(
            batch=config.batch,
            nfe=nfe,
            headline_nfe=n,
            data=data,
            cycle=config.every * (n if config.inputs == "simulated" else 1),
        )

    def __init__(self, task: Task, config: Config):
        self.task, self.config = task, config
        self.net, self.fake = (
            task.network("teacher"),
            task.network("teacher", second_time=config.conditioned),
        )
        self.student = task.player("student", config.student, self.net)
        guidance: list[nn.Module] = [self.fake]
        if config.gan:
            self.config = config.model_copy(
                update={"blocks": min(config.blocks, len(self.fake.blocks))}
            )  # of a shallow network all
            self.head = VectorHead(self.fake.enter.out_features, config.head_width, task.classes)
            # A copy of the teacher's network: where the teacher is a closed form it has no features.
            self.trunk = (
                self.fake
                if config.features == "critic"
                else task.network("teacher").requires_grad_(False)
            )
            guidance.append(self.head)
        self.critic = task.player("critic", config.critic, *guidance)

    def generate(self, net: nn.Module, x_t: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        """G(x_t, t) = the network's denoised image x_t - t v(x_t, t)."""
        return denoiser(x_t, net(x_t, t, labels), t)

    def train_step(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """The student on every r-th step, then always the critic with the classifier, on the same samples (section 4.2)."""
        c, cond = self.config, batch.cond
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
                adversarial = softplus_generator(
                    self.logits(x, t_k, cond.labels, step, "adversarial")
                )
                terms.append(c.gan * adversarial)
                logged["adversarial"] = adversarial.detach()
            self.student.update(torch.stack(terms).sum())

        if not (turn and c.disjoint):
            x = x.detach()
            t, e = (
                times.uniform(step.rng("critic t"), len(x)),
                step.rng("critic e").normal(*x.shape),
            )
            fake = loss = critic_loss(self.fake(noised(x, e, t), t, cond.labels, s=t - t_k), x, e)
            if c.gan:
                assert batch.x is not None
                labels = None if cond.labels is None else torch.cat([cond.labels, cond.labels])
                both = self.logits(
                    torch.cat([batch.x, x]), torch.cat([t_k, t_k]), labels, step, "classifier"
                )
                classifier = softplus_discriminator(*both.chunk(2))
                loss = fake + c.classifier * classifier
                logged["classifier"] = classifier.detach()
            self.critic.update(loss)
            logged["critic"] = fake.detach()
        return logged

    def student_input(self, batch: Batch, step: Step) -> tuple[Tensor, Tensor]:
        """(x_t, t) of one of the student's N steps: on its own path (section 4.5) or, k drawn per row, of noised real images."""
        n, steps, labels = batch.size, self.config.steps, batch.cond.labels
        z = step.rng("z").normal(n, *self.task.shape)
        if self.config.inputs == "noised_real":
            assert batch.x is not None
            t = self.config.input_time * (1 - step.rng("k").integers(n, steps) / steps)
            return noised(batch.x, z, t), t
        k, fresh = drawn_step(step, steps, self.config.every), step.rng("renoise")
        denoise = lambda x, t: self.generate(self.net, x, t, labels)
        return simulated_input(
            denoise, z, steps, k, lambda: fresh.normal(*z.shape), self.config.input_time
        )

    @torch.no_grad()
    def matching(self, x: Tensor, t_k: Tensor, cond: Condition, step: Step) -> Tensor:
        """Gradient of the distribution-matching loss at the student's samples (Eq. 1, DMD Algorithm 2); the critic is never guided."""
        c = self.config
        t, e = (
            times.uniform(step.rng("matching t"), len(x), c.time_low, c.time_high),
            step.rng("matching e").normal(*x.shape),
        )
        x_t = noised(x, e, t)
        v_fake, v_real = (
            self.fake(x_t, t, cond.labels, s=t - t_k),
            self.task.teacher.velocity(x_t, t, cond),
        )
        return matching_gradient(v_real, v_fake, x, e, t, c.weighting)

    def logits(self, x: Tensor, t_k: Tensor, labels: Tensor | None, step: Step, use: str) -> Tensor:
        """D [B]: the head on features of x, every row with noise and t ~ U(0, 1) of its own and of this `use` (Eq. 4).

        s: the critic's second time, where it has one, is told t - s = t_k.
        """
        t, e = times.uniform(step.rng(f"{use} t"), len(x)), step.rng(f"{use} e").normal(*x.shape)
        features = self.trunk(noised(x, e, t), t, labels, s=t - t_k, features=self.config.blocks)
        return self.head(features[-1], labels)

    def sample(self, noise: Tensor, cond: Condition, nfe: int, rng: Rng) -> Tensor:
        """Denoise, noise anew, denoise, ... (section 4.4)."""
        net = self.student.averaged()
        denoise = lambda x, t: self.generate(net, x, t, cond.labels)
        return renoising(
            denoise, noise, nfe, lambda: rng.normal(*noise.shape), start=self.config.input_time
        )
