"""MeanFlow (Geng et al., arXiv 2505.13447), from a teacher's velocity or from data.

The network is the average velocity u(x_t, t, s).
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from distillbench import times
from distillbench.flowmaps import adaptive_loss, meanflow_target
from distillbench.method import Batch, Condition, Method, Needs, Step, Task
from distillbench.paths import noised
from distillbench.players import PlayerConfig
from distillbench.samplers import jumps
from distillbench.seeds import Rng


class MeanFlow(Method):
    """Average velocity trained by the MeanFlow identity."""

    class Config(BaseModel):
        """Settings of MeanFlow."""

        model_config = ConfigDict(extra="forbid")
        velocity: Literal["teacher", "data"] = Field(
            description="v: the teacher's at x_t, or e - x (from scratch)"
        )
        batch: int = Field(gt=0)
        time_mean: float = Field(description="of the logit-normal law of t and s")
        time_std: float = Field(gt=0)
        diagonal: float = Field(ge=0, lt=1, description="share of rows with s = t")
        p: float = Field(ge=0, description="power of the adaptive weight")
        c: float = Field(gt=0)
        student: PlayerConfig

        @model_validator(mode="after")
        def some_row_is_off_the_diagonal(self) -> Self:
            if times.off_diagonal(self.batch, self.diagonal) == 0:
                raise ValueError(
                    f"diagonal {self.diagonal:g} leaves no row of {self.batch} with s < t"
                )
            return self

    @classmethod
    def needs(cls, config: Config) -> Needs:
        teacher = config.velocity == "teacher"
        return Needs(batch=config.batch, nfe=(1, 2, 4), headline_nfe=1, data=True, teacher=teacher)

    def __init__(self, task: Task, config: Config):
        self.task = task
        self.config = config
        init: Literal["teacher", "random"] = "teacher" if config.velocity == "teacher" else "random"
        self.net = task.network(init, second_time=True)
        self.student = task.player("student", config.student, self.net)

    def train_step(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """Algorithm 1.

        The teacher's velocity replaces e - x both as target and as tangent (FreeFlow Eq. 5).
        """
        c = self.config
        x = batch.x
        n = batch.size
        assert x is not None
        t, s = times.sorted_pair(step.rng("t, s"), n, c.time_mean, c.time_std, c.diagonal)
        e = step.rng("e").normal(*x.shape)
        x_t = noised(x, e, t)
        v = self.task.teacher.velocity(x_t, t, batch.cond) if c.velocity == "teacher" else e - x

        # du/dt = (d_x u) v + d_t u along dx/dt = v: tangent (v, 1, 0), on the rows with s < t only,
        # which come first.
        m = times.off_diagonal(n, c.diagonal)
        tangents = (v[:m], t.new_ones(m), t.new_zeros(m))
        u, du = self.task.jvp(self.net, (x_t, t, s), tangents, batch.cond)
        target = v.clone()
        target[:m] = meanflow_target(v[:m], du, t[:m], s[:m])

        loss = adaptive_loss(u, target, c.p, c.c)
        self.student.update(loss)
        gap = (u - target).detach().square().flatten(1).mean(1)
        return {
            "loss": loss.detach(),
            "residual_s=t": gap[m:].mean() if m < n else gap.new_zeros(()),
            "residual_s<t": gap[:m].mean(),
        }

    def sample(self, noise: Tensor, cond: Condition, nfe: int, rng: Rng) -> Tensor:
        """Algorithm 2 at 1 NFE, Eq. 12 along a uniform grid above."""
        net = self.student.averaged()
        return jumps(lambda x, t, s: net(x, t, cond.labels, s=s), noise, nfe)
