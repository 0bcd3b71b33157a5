"""Template (arXiv 0000.00000): a one-step student of the teacher's samples. Say here what is new.

It learns the sample that the teacher makes of the same noise.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from distillbench.method import Batch, Condition, Method, Needs, Pairs, Step, Task
from distillbench.paths import denoiser
from distillbench.players import PlayerConfig
from distillbench.seeds import Rng


def regression_loss(x: Tensor, y: Tensor) -> Tensor:
    """Mean squared distance of generated x to the teacher's samples y (Eq. 1): a scalar.

    x, y: [B, ...], of the same noise.
    """
    # YOUR IDEA: the losses of your paper, as functions of tensors, each with its equation. What
    # other methods use as well is in distillbench: matching (distribution matching), adversarial,
    # jvp, samplers, times, paths.
    return (x - y).square().mean()


class Template(Method):
    """One-step student trained by regression on pairs. YOUR IDEA: yours, in a line."""

    class Config(BaseModel):
        """Settings of Template."""

        model_config = ConfigDict(extra="forbid")
        # YOUR IDEA: your settings; their values stand in config.yaml.
        batch: int = Field(gt=0)
        pairs: int = Field(
            gt=0, description="pairs of noise and the teacher's sample, made before training"
        )
        pair_heun_steps: int = Field(gt=0)
        student: PlayerConfig

    @classmethod
    def needs(cls, config: Config) -> Needs:
        # YOUR IDEA: what you are given. Ask for no more than you use: the table says what a method
        # was given, and all of it is charged to the budget. data=True puts images into batch.x; nfe
        # are the network evaluations your sampler supports.
        pairs = Pairs(config.pairs, config.pair_heun_steps, config.batch)
        return Needs(batch=config.batch, nfe=(1,), headline_nfe=1, pairs=pairs)

    def __init__(self, task: Task, config: Config):
        self.task = task
        self.config = config
        self.net = task.network("teacher")
        # YOUR IDEA: more networks and players (a critic, a discriminator). 'student' is the one
        # that is saved and sampled.
        self.student = task.player("student", config.student, self.net)

    def generate(self, net: nn.Module, z: Tensor, labels: Tensor | None) -> Tensor:
        """The network's denoised image at t = 1, pure noise, like z [B, ...]."""
        one = z.new_ones(len(z))
        return denoiser(z, net(z, one, labels), one)

    def train_step(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """YOUR IDEA: one iteration of your algorithm box.

        Random numbers come from step.rng("a name") only.
        """
        assert batch.pairs is not None
        z, y, cond = batch.pairs
        loss = regression_loss(self.generate(self.net, z, cond.labels), y)
        self.student.update(loss)
        return {"regression": loss.detach()}

    def sample(self, noise: Tensor, cond: Condition, nfe: int, rng: Rng) -> Tensor:
        """The averaged student's sample of each noise."""
        return self.generate(self.student.averaged(), noise, cond.labels)
