"""FSF-DMD (Kim et al., arXiv 2605.19256): the student's own flow map stands for DMD's critic.

RECONSTRUCTION: of the paper the abstract and Eq. 12 are known, v_fake(x_t, t) = u(x_t, t, 0).
Everything else here is ours; alternatives are arms (README).
"""

from __future__ import annotations

from typing import Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from distillbench import times
from distillbench.flowmaps import adaptive_loss, meanflow_target
from distillbench.matching import critic_loss, matching_gradient, pseudo_loss
from distillbench.method import Batch, Condition, Method, Needs, Step, Task
from distillbench.paths import jump, noised, over
from distillbench.players import Player, PlayerConfig
from distillbench.samplers import Velocity, drawn_step, jumps, simulated_input
from distillbench.seeds import Rng


def unrolled(velocity: Velocity, x_t: Tensor, t: Tensor, steps: int) -> Tensor:
    """(x_t - Phi(x_t)) / t, the average velocity of `steps` Euler steps from t to 0.

    x_t [B, ...], t [B] -> [B, ...]. One step is the velocity at x_t itself. The mean of the slopes:
    nothing is divided by t.
    """
    x = x_t
    slopes = []
    for i in range(steps):
        slope = velocity(x, t * (1 - i / steps))
        slopes.append(slope)
        x = x - over(t / steps, x) * slope
    return torch.stack(slopes).mean(0)


def surrogate_loss(u: Tensor, delta: Tensor) -> Tensor:
    """Mean over the batch of |u - sg(u + Delta)|^2, summed over a sample's elements: a scalar.

    u, Delta: [B, ...]; the gradient in u is -2 Delta / B. Delta = v_teacher - v_fake at the noised
    sample is added to the velocity that made it: x = x_tau - tau u moves by -tau Delta.
    """
    return (u - (u + delta).detach()).square().flatten(1).sum(1).mean()


class FSFDMD(Method):
    """Flow map trained by MeanFlow's loss and by matching against its own endpoint velocity."""

    class Config(BaseModel):
        """Settings of FSF-DMD."""

        model_config = ConfigDict(extra="forbid")
        init: Literal["start", "teacher", "random"] = Field(
            description="the student's weights: a flow map's, the teacher's, none"
        )
        velocity: Literal["teacher", "data"] = Field(
            description="of the flow-map loss: the teacher's at x_t, or e - x"
        )
        batch: int = Field(gt=0, description="rows of each of the two losses")
        time_mean: float = Field(
            description="of the logit-normal law of t and s in the flow-map loss"
        )
        time_std: float = Field(gt=0)
        diagonal: float = Field(ge=0, lt=1, description="share of rows with s = t")
        p: float = Field(ge=0, description="power of its adaptive weight")
        c: float = Field(gt=0)
        matching: float = Field(ge=0, description="lambda; 0: the flow-map loss alone")
        real: Literal["teacher", "start", "self"] = Field(
            description="whose velocity is the real one: the teacher's, "
            "the initial flow map's from t to 0, the student's own at s = t"
        )
        unroll: int = Field(
            gt=0,
            description="n Euler steps of the teacher from t to 0 that make its velocity; "
            "1: at x_t itself",
        )
        fake: Literal["endpoint", "average", "diagonal", "sample", "critic"] = Field(
            description="u(x_t, t, 0) of Eq. 12; of the averaged weights; u(x_t, t, t); "
            "e - x (SDS); a critic network"
        )
        every: int = Field(
            gt=0, description="a critic moves on every step, the student on every r-th"
        )
        weighting: Literal["flow", "residual"] = Field(
            description="unit weight on the velocity, or DMD's normaliser on the sample"
        )
        time_low: float = Field(ge=0, lt=1, description="t ~ U(low, high) of the noised samples")
        time_high: float = Field(gt=0, le=1)
        steps: int = Field(gt=0, description="S of the backward simulation; 1: from noise alone")
        simulation: Literal["jumps", "renoising"] = Field(
            description="of the earlier steps: along the flow map, or as DMD2 does"
        )
        student: PlayerConfig
        critic: PlayerConfig

        @model_validator(mode="after")
        def _fits(self) -> Self:
            if times.off_diagonal(self.batch, self.diagonal) == 0:
                raise ValueError(
                    f"diagonal {self.diagonal:g} leaves no row of {self.batch} with s < t"
                )
            if self.every > 1 and (self.fake != "critic" or not self.matching):
                raise ValueError(
                    f"every {self.every} needs fake: critic and matching above 0, "
                    "there is nothing else to move in between"
                )
            if self.unroll > 1 and self.real != "teacher":
                raise ValueError(f"unroll {self.unroll} needs real: teacher")
            if self.real == "start" and self.init != "start":
                raise ValueError("real: start needs init: start")
            return self

    @classmethod
    def needs(cls, config: Config) -> Needs:
        matched_to_teacher = config.matching > 0 and config.real == "teacher"
        cycle = 1
        if config.matching:
            cycle = config.steps
            if config.fake == "critic":
                cycle *= config.every
        return Needs(
            batch=config.batch,
            nfe=(1, 2, 4),
            headline_nfe=2,
            data=True,
            teacher=matched_to_teacher or "teacher" in (config.init, config.velocity),
            cycle=cycle,
        )

    def __init__(self, task: Task, config: Config):
        self.task = task
        self.config = config
        self.net = task.network(config.init, second_time=True)
        self.student = task.player("student", config.student, self.net)
        if config.matching and config.real == "start":
            self.initial = task.network("start", second_time=True).requires_grad_(False)
        self.critic: Player | None = None
        if config.matching and config.fake == "critic":
            self.g = task.network("teacher")
            self.critic = task.player("critic", config.critic, self.g)

    def train_step(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """The flow-map loss (MeanFlow Algorithm 1) on noised data, and matching on samples."""
        c = self.config
        x = batch.x
        cond = batch.cond
        n = batch.size
        assert x is not None
        turn = step.index % c.every == 0
        start, tau = x[:0], x.new_zeros(0)
        if c.matching:
            start, tau = self.simulated(n, cond, step)
        if not turn:  # a critic's step alone
            with torch.no_grad():
                sample = jump(start, self.net(start, tau, cond.labels, s=0 * tau), tau, 0 * tau)
            return self.follow(sample, cond, step)

        t, s = times.sorted_pair(step.rng("t, s"), n, c.time_mean, c.time_std, c.diagonal)
        e = step.rng("e").normal(*x.shape)
        x_t = noised(x, e, t)
        v = self.task.teacher.velocity(x_t, t, cond) if c.velocity == "teacher" else e - x
        # Both losses' rows in one pass of the network: first those with a tangent along (v, 1, 0),
        # last those from `start` to 0.
        m = times.off_diagonal(n, c.diagonal)
        labels = None if cond.labels is None else cond.labels.repeat(1 + len(tau) // n)
        rows = (torch.cat([x_t, start]), torch.cat([t, tau]), torch.cat([s, 0 * tau]))
        tangents = (v[:m], t.new_ones(m), t.new_zeros(m))
        u, du = self.task.jvp(self.net, rows, tangents, Condition(labels, cond.guidance))
        target = v.clone()
        target[:m] = meanflow_target(v[:m], du, t[:m], s[:m])
        flow_map = adaptive_loss(u[:n], target, c.p, c.c)
        loss = flow_map
        logged = {"flow_map": flow_map.detach()}
        if c.matching:
            sample = jump(start, u[n:], tau, 0 * tau)
            matching, size = self.matching(u[n:], sample, cond, step)
            loss = loss + c.matching * matching
            logged["delta"] = size
            logged["std"] = sample.detach().std()
        self.student.update(loss)
        if self.critic is None:
            return logged
        return logged | self.follow(sample.detach(), cond, step)

    def simulated(self, n: int, cond: Condition, step: Step) -> tuple[Tensor, Tensor]:
        """(x_tau [n, ...], tau [n]) of one of the student's S steps, without a gradient.

        z at 1, or what k steps of the student's own sampler make of it.
        """
        c = self.config
        z = step.rng("z").normal(n, *self.task.shape)
        k = drawn_step(step, c.steps, c.every)

        def average(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
            return self.net(x, t, cond.labels, s=s)

        if c.simulation == "renoising":
            rng = step.rng("renoise")

            def denoise(x: Tensor, t: Tensor) -> Tensor:
                return jump(x, average(x, t, 0 * t), t, 0 * t)

            def fresh() -> Tensor:
                return rng.normal(*z.shape)

            return simulated_input(denoise, z, c.steps, k, fresh)
        with torch.no_grad():
            return jumps(average, z, c.steps, done=k), z.new_full((n,), 1 - k / c.steps)

    def matching(
        self, u: Tensor, sample: Tensor, cond: Condition, step: Step
    ) -> tuple[Tensor, Tensor]:
        """The term that replaces DMD's (b.3 of the reconstruction), and the size of Delta: scalars.

        u, sample: [B, ...]; the term's gradient passes through `u` alone.
        """
        c = self.config
        x = sample.detach()
        t = times.uniform(step.rng("matching t"), len(x), c.time_low, c.time_high)
        e = step.rng("matching e").normal(*x.shape)
        x_t = noised(x, e, t)
        with torch.no_grad():
            real = self.real(x_t, t, cond)
            fake = self.fake(x_t, t, e - x, cond)
        size = (real - fake).square().mean().sqrt()
        if c.weighting == "flow":
            return surrogate_loss(u, real - fake), size
        return pseudo_loss(sample, matching_gradient(real, fake, x, e, t, c.weighting)), size

    def real(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """The velocity that the samples should have at x_t [B, ...], t [B]."""
        if self.config.real == "start":
            return self.initial(x_t, t, cond.labels, s=0 * t)
        if self.config.real == "self":
            return self.net(x_t, t, cond.labels, s=t)

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            return self.task.teacher.velocity(x, t, cond)

        return unrolled(velocity, x_t, t, self.config.unroll)

    def fake(self, x_t: Tensor, t: Tensor, v: Tensor, cond: Condition) -> Tensor:
        """The velocity that the samples have at x_t [B, ...], t [B]; v = e - x, like x_t.

        By Eq. 12, or by what it is compared with.
        """
        kind = self.config.fake
        if kind == "sample":
            return v
        if kind == "critic":
            return self.g(x_t, t, cond.labels)
        net = self.student.averaged() if kind == "average" else self.net
        s = t if kind == "diagonal" else 0 * t
        return net(x_t, t, cond.labels, s=s)

    def follow(self, x: Tensor, cond: Condition, step: Step) -> dict[str, Tensor]:
        """The critic's update on the student's samples x (DMD2 without its classifier)."""
        assert self.critic is not None
        t = times.uniform(step.rng("critic t"), len(x))
        e = step.rng("critic e").normal(*x.shape)
        loss = critic_loss(self.g(noised(x, e, t), t, cond.labels), x, e)
        self.critic.update(loss)
        return {"critic": loss.detach()}

    def sample(self, noise: Tensor, cond: Condition, nfe: int, rng: Rng) -> Tensor:
        """Jumps of the flow map along a uniform grid."""
        net = self.student.averaged()
        return jumps(lambda x, t, s: net(x, t, cond.labels, s=s), noise, nfe)
