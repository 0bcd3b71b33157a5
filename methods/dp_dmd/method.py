"""DP-DMD, diversity-preserved DMD (arXiv 2602.03139).

The first of a student's N steps learns the teacher's secant from the same noise, the others learn
distribution matching, and no gradient of the matching passes back through the first.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from torch import Tensor

from distillbench import times
from distillbench.matching import critic_loss, matching_gradient, pseudo_loss
from distillbench.method import Batch, Condition, Method, Needs, Step, Task
from distillbench.paths import denoiser, noised, over
from distillbench.players import PlayerConfig
from distillbench.samplers import Velocity, euler, grid, heun
from distillbench.seeds import Rng


def anchor_target(
    velocity: Velocity,
    noise: Tensor,
    time: float,
    steps: int,
    solver: Literal["euler", "heun"],
    x0: bool,
) -> Tensor:
    """What the student's velocity at (noise, t = 1) should be, like noise [B, ...].

    z_tbar: `steps` equal steps of the teacher's ODE from noise at t = 1 to tbar = `time` in [0, 1).
    Eq. 6: the secant vtilde = (noise - z_tbar) / (1 - tbar). With `x0` (App. C, Eq. 39-41) the
    student's x0 = noise - v should be the teacher's at the anchor, z_tbar - tbar v(z_tbar, tbar),
    so that its velocity should be noise less that; one evaluation more. The caller decides about
    gradients.
    """

    # The samplers go from 1 to 0: tau with t = 1 - (1 - tbar)(1 - tau), exactly 1 at the start.
    def scaled(x: Tensor, tau: Tensor) -> Tensor:
        return (1 - time) * velocity(x, 1 - (1 - time) * (1 - tau))

    solve = euler if solver == "euler" else heun
    z = solve(scaled, noise, steps)
    if x0:
        t = noise.new_full((len(noise),), time)
        return noise - denoiser(z, velocity(z, t), t)
    return (noise - z) / (1 - time)


def diversity_loss(v_1: Tensor, target: Tensor) -> Tensor:
    """L_Div = mean |v_theta(noise, 1) - sg(vtilde)|^2 over all elements of [B, ...] (Eq. 7).

    A scalar; no gradient in the target.
    """
    return (v_1 - target.detach()).square().mean()


def rollout(
    velocity: Velocity, noise: Tensor, steps: int, detach: bool, first: bool
) -> tuple[Tensor, Tensor]:
    """(x, v_1): the end of `steps` Euler steps, as in sampling, and the velocity of the first.

    Algorithm 1 on the uniform grid; noise, x, v_1: [B, ...]. With `detach` z_1 = sg(z_1): x has a
    gradient through steps 2 to N only. Without `first`, the first step has no graph at all; nobody
    may then want a gradient through it.
    """
    t, *later = grid(steps, noise)
    with torch.set_grad_enabled(first and torch.is_grad_enabled()):
        v_1 = velocity(noise, t)
    slope = v_1.detach() if detach else v_1
    x = noise - over(t - later[0], noise) * slope
    for t, s in pairwise(later):
        x = x - over(t - s, x) * velocity(x, t)
    return x, v_1


class DPDMD(Method):
    """Student of N Euler steps: the first learns the teacher's secant, the others matching."""

    class Config(BaseModel):
        """Settings of DP-DMD."""

        model_config = ConfigDict(extra="forbid")
        batch: int = Field(gt=0)
        steps: int = Field(
            description="N >= 2, steps of the student, the only number it can be sampled with"
        )
        critic_updates: int = Field(
            gt=0, description="M, moves of the critic for one of the student"
        )
        reuse: bool = Field(
            description="the critic moves on every step, on the student's turn, each M-th step, "
            "on the student's own samples; false: on the student's turn, each (M+1)-th step, "
            "it rests (the official counter)"
        )
        diversity: float = Field(ge=0, description="lambda, weight of L_Div; 0 asks for no anchor")
        anchor: Literal["velocity", "x0"] = Field(
            description="what the first step learns: Eq. 6 or Eq. 39-41"
        )
        anchor_time: float | None = Field(
            ge=0,
            lt=1,
            description="tbar, where the teacher's path is cut; null: 1 - 1/N, where step 1 ends",
        )
        anchor_steps: int = Field(gt=0, description="K, steps of the teacher from 1 to tbar")
        anchor_solver: Literal["euler", "heun"] = Field(
            description="of these steps; heun evaluates twice"
        )
        detach: bool = Field(description="no gradient of L_DMD through step 1")
        weighting: Literal[
            "noisy_residual",
            "residual",
            "alpha_residual",
            "velocity",
            "sigma_alpha",
            "sigma3_alpha",
            "reverse_kl",
        ] = Field(
            description="of the velocity difference in L_DMD, by name in distillbench.matching"
        )
        time_low: float = Field(
            ge=0, lt=1, description="t ~ U(low, high) in L_DMD and for the critic"
        )
        time_high: float = Field(gt=0, le=1)
        student: PlayerConfig
        critic: PlayerConfig

        @field_validator("steps")
        @classmethod
        def _several(cls, steps: int) -> int:
            if steps < 2:
                raise ValueError(
                    "one step leaves nothing to match: step 1 has L_Div alone; use 2 or more"
                )
            return steps

        @model_validator(mode="after")
        def _fits(self) -> DPDMD.Config:
            if self.time_low >= self.time_high:
                raise ValueError(
                    f"time_low {self.time_low:g} must be below time_high {self.time_high:g}"
                )
            if self.anchor == "x0" and self.anchor_time == 0:
                raise ValueError(
                    "anchor: x0 with anchor_time: 0 is anchor: velocity, with one evaluation more"
                )
            return self

        @property
        def cycle(self) -> int:
            """Train steps between two updates of the student."""
            return self.critic_updates + (not self.reuse)

    @classmethod
    def needs(cls, config: Config) -> Needs:
        n = config.steps
        return Needs(batch=config.batch, nfe=(n,), headline_nfe=n, cycle=config.cycle)

    def __init__(self, task: Task, config: Config):
        self.task = task
        self.config = config
        self.net = task.network("teacher")
        self.fake = task.network("teacher")
        self.student = task.player("student", config.student, self.net)
        self.critic = task.player("critic", config.critic, self.fake)

    def train_step(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """Algorithm 1, always on samples of the student as it was at the beginning of the step.

        The student moves on the last step of a cycle, by L = L_DMD + lambda L_Div in one backward
        pass (Eq. 8); the critic on the others or, with `reuse`, on all.
        """
        c = self.config
        cond = batch.cond
        turn = (step.index + 1) % c.cycle == 0
        z = step.rng("z").normal(batch.size, *self.task.shape)

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            return self.net(x, t, cond.labels)

        # With lambda = 0 and the gradient cut nothing is asked of step 1.
        first = c.diversity > 0 or not c.detach
        with torch.set_grad_enabled(turn):
            x, v_1 = rollout(velocity, z, c.steps, c.detach, first)
        logged = {}

        if turn:
            g = self.matching(x.detach(), cond, step)
            loss = pseudo_loss(x, g)
            logged["matching_gradient"] = g.square().mean().sqrt()
            if c.diversity:
                diversity = diversity_loss(v_1, self.anchor(z, cond))
                loss = loss + c.diversity * diversity
                logged["diversity"] = diversity.detach()
            self.student.update(loss)

        if c.reuse or not turn:
            x = x.detach()
            t = times.uniform(step.rng("critic t"), len(x), c.time_low, c.time_high)
            e = step.rng("critic e").normal(*x.shape)
            fake = critic_loss(self.fake(noised(x, e, t), t, cond.labels), x, e)
            self.critic.update(fake)
            logged["critic"] = fake.detach()
        return logged

    @torch.no_grad()
    def anchor(self, z: Tensor, cond: Condition) -> Tensor:
        """Target for v_theta(z, 1) from the student's own noise and labels, like z [B, ...].

        By the guided teacher, without a gradient.
        """
        c = self.config
        time = 1 - 1 / c.steps if c.anchor_time is None else c.anchor_time

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            return self.task.teacher.velocity(x, t, cond)

        return anchor_target(velocity, z, time, c.anchor_steps, c.anchor_solver, c.anchor == "x0")

    @torch.no_grad()
    def matching(self, x: Tensor, cond: Condition, step: Step) -> Tensor:
        """Gradient of L_DMD at the student's samples x, like x [B, ...].

        The teacher is guided, the critic is not; every row has a t of its own.
        """
        c = self.config
        t = times.uniform(step.rng("matching t"), len(x), c.time_low, c.time_high)
        e = step.rng("matching e").normal(*x.shape)
        x_t = noised(x, e, t)
        v_fake = self.fake(x_t, t, cond.labels)
        v_real = self.task.teacher.velocity(x_t, t, cond)
        return matching_gradient(v_real, v_fake, x, e, t, c.weighting)

    def sample(self, noise: Tensor, cond: Condition, nfe: int, rng: Rng) -> Tensor:
        """N Euler steps, deterministic: what was rolled out in training."""
        net = self.student.averaged()
        return euler(lambda x, t: net(x, t, cond.labels), noise, nfe)
