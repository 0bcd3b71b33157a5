"""Terminal Velocity Matching (TVM, arXiv 2511.19797), from a teacher's velocity or from data.

The network is the average velocity u(x_t, t, s). The paper's convention is ours. Its displacement
is f = (s-t) F, so its F is our u, or u = w F with the scaled form. The loss is Eqs. 12, 14 and 15
as the official code has them (lumalabs/tvm, training/wrapper.py); u(x, t) is short for u(x, t, t).
"""

from __future__ import annotations

from typing import Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from distillbench import times
from distillbench.method import Batch, Condition, Method, Needs, Norms, Step, Task
from distillbench.paths import guided, jump, noised, over
from distillbench.players import PlayerConfig
from distillbench.samplers import jumps
from distillbench.seeds import Rng

TARGET = "target"  # the average that gives u_bar: `student.half_lives` in the data form


def by_row(w: float | Tensor, x: Tensor) -> float | Tensor:
    """A guidance weight, one number or [B], as a factor of x [B, ...]."""
    return over(w, x) if isinstance(w, Tensor) else w


def terminal_velocity(u: Tensor, du: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """dX/ds = u - (t-s) du/ds of X = x_t - (t-s) u, like u.

    u, du: [B, ...]; t, s: [B]; keeps the graph of both.
    """
    return u - over(t - s, u) * du


def weighted_error(u: Tensor, target: Tensor, w: float | Tensor) -> Tensor:
    """(1/w^2) mean |u - target|^2 of each row's elements: [B] (Eqs. 14, 15).

    u, target: [B, ...]; no gradient in the target.
    """
    error = (u - target.detach()) / by_row(w, u)
    return error.square().flatten(1).mean(1)


def terminal_loss(dx_ds: Tensor, target: Tensor, t: Tensor, s: Tensor, w: float | Tensor) -> Tensor:
    """A: (1/w^2) mean |dX/ds - sg u_bar(sg X, s)|^2 by row, [B].

    Zero where s is t, rows that the code leaves to B (wrapper.py). dX/ds, target: [B, ...].
    """
    error = weighted_error(dx_ds, target, w)
    return torch.where(torch.isclose(t, s), 0.0, error)


def anchor_target(v: Tensor, null: Tensor, w: float | Tensor) -> Tensor:
    """w v + (1-w) u_bar(x, s', null), like v: the guided velocity that B regresses (Eq. 14).

    v: a sample's own e - x; null: u_bar under the null label, like v.
    """
    return guided(null, v, by_row(w, v))


class TVM(Method):
    """Average velocity trained so that its displacement ends with the right velocity."""

    class Config(BaseModel):
        """Settings of TVM."""

        model_config = ConfigDict(extra="forbid")
        velocity: Literal["teacher", "data"] = Field(
            description="velocities at the end of a path and of the anchor: the teacher's, "
            "or u_bar's own and e - x (from scratch)"
        )
        batch: int = Field(gt=0)
        law: Literal["gap", "trunc", "clamp", "one"] = Field(
            description="of (t, s): distillbench.times; one: t = 1"
        )
        time_mean: float = Field(
            description="of the logit-normal law of the gap t - s (gap) or of t (trunc, clamp)"
        )
        time_std: float = Field(gt=0)
        s_mean: float = Field(description="of the logit-normal law of s, and of s' in the anchor")
        s_std: float = Field(gt=0)
        anchor: float = Field(
            ge=0, description="weight of flow matching at s' (B); 0 leaves it out"
        )
        detach_jvp: bool = Field(description="no gradient through du/ds")
        scaled: bool = Field(description="u = w F instead of u = F")
        guidance: tuple[float, float] | None = Field(
            None, description="w ~ U(low, high), an input as 1/w; null: the benchmark's weight"
        )
        label_dropout: float = Field(
            ge=0, lt=1, description="share of rows with the null label and w = 1"
        )
        norms: Norms = Field(
            description="of the network, from scratch: layer, "
            "or rms also on modulations (semi-Lipschitz)"
        )
        student: PlayerConfig

        @model_validator(mode="after")
        def fits(self) -> Self:
            if self.velocity == "teacher" and self.norms != "layer":
                raise ValueError(
                    "norms: a student that starts from its teacher has the teacher's, layer"
                )
            if self.velocity == "teacher" and TARGET in self.student.half_lives:
                raise ValueError(
                    "student.half_lives.target: "
                    "with the teacher's velocity nothing uses this average"
                )
            if self.guidance is not None and not 0 < self.guidance[0] <= self.guidance[1]:
                raise ValueError(f"guidance {self.guidance}: must be 0 < low <= high")
            return self

    @classmethod
    def needs(cls, config: Config) -> Needs:
        return Needs(
            batch=config.batch,
            nfe=(1, 2, 4),
            headline_nfe=1,
            data=True,
            teacher=config.velocity == "teacher",
        )

    def __init__(self, task: Task, config: Config):
        if config.guidance is not None and not task.classes:
            raise ValueError("guidance: the data have no classes")
        self.task = task
        self.config = config
        init: Literal["teacher", "random"] = "teacher" if config.velocity == "teacher" else "random"
        guidance = config.guidance is not None
        self.net = task.network(init, second_time=True, guidance=guidance, norms=config.norms)
        self.student = task.player("student", config.student, self.net)

    def train_step(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """mean(A) + anchor mean(B), one backward pass; the player then moves u_bar as well."""
        c = self.config
        x = batch.x
        n = batch.size
        assert x is not None
        t, s = self.times(step.rng("t, s"), n)
        cond = self.conditions(batch.cond, step, n)
        e = step.rng("e").normal(*x.shape)
        w = cond.guidance
        x_t = noised(x, e, t)

        # du/ds at fixed (x_t, t): tangent (0, 0, 1). A's gradient goes through it, not through X or
        # the target (section 4).
        tangents = (torch.zeros_like(x_t), torch.zeros_like(t), torch.ones_like(s))
        inputs = self.inputs(cond)
        f, df = self.task.jvp(self.net, (x_t, t, s), tangents, inputs, graph=not c.detach_jvp)
        u = self.scaled(f, w)
        du = self.scaled(df, w)
        target = self.velocity(jump(x_t, u, t, s).detach(), s, cond)
        terminal = terminal_loss(terminal_velocity(u, du, t, s), target, t, s, w).mean()
        loss = terminal
        logged = {"terminal": terminal.detach()}

        if c.anchor:  # on the same image and noise, at a time of its own ("gap*")
            s_prime = times.logit_normal(step.rng("s'"), n, c.s_mean, c.s_std)
            x_s = noised(x, e, s_prime)
            diagonal = self.average(self.net, x_s, s_prime, s_prime, cond)
            velocity = self.anchor_velocity(x_s, s_prime, e - x, cond)
            anchor = weighted_error(diagonal, velocity, w).mean()
            loss = terminal + c.anchor * anchor
            logged["anchor"] = anchor.detach()
        self.student.update(loss)
        return logged | {"loss": loss.detach()}

    def times(self, rng: Rng, n: int) -> tuple[Tensor, Tensor]:
        """(t, s) of the law, [n] each. `one` is the arm t = 1 that section 5 calls unstable."""
        c = self.config
        if c.law == "one":
            s = times.logit_normal(rng, n, c.s_mean, c.s_std)
            return torch.ones_like(s), s
        laws = {"gap": times.gap_pair, "trunc": times.truncated_pair, "clamp": times.clamped_pair}
        return laws[c.law](rng, n, c.time_mean, c.time_std, c.s_mean, c.s_std)

    def conditions(self, cond: Condition, step: Step, n: int) -> Condition:
        """Labels and w of the n rows, some of them null with w = 1 (training/loss.py).

        w stays one number where all rows share it.
        """
        c = self.config
        labels = cond.labels
        w = cond.guidance
        if c.guidance is not None:
            w = times.uniform(step.rng("w"), n, *c.guidance)
        if labels is not None and c.label_dropout:
            dropped = step.rng("dropout").uniform(n) < c.label_dropout
            labels = labels.masked_fill(dropped, self.task.classes)
            if isinstance(w, Tensor) or w != 1:
                w = torch.where(dropped, 1.0, w)
        return Condition(labels, w)

    def inputs(self, cond: Condition) -> Condition:
        """What the network is given: labels, and beta = 1/w where w is drawn."""
        if self.config.guidance is None:
            return Condition(cond.labels)
        return Condition(cond.labels, 1 / cond.guidance)

    def scaled(self, f: Tensor, w: float | Tensor) -> Tensor:
        """u = w F of the scaled form (training/wrapper.py), or u = F; like f [B, ...]."""
        return by_row(w, f) * f if self.config.scaled else f

    def average(self, net: nn.Module, x: Tensor, t: Tensor, s: Tensor, cond: Condition) -> Tensor:
        """u(x, t, s) of a network under labels and w, like x [B, ...]; t, s: [B]."""
        own = self.inputs(cond).guidance
        beta = own if isinstance(own, Tensor) else None
        f = net(x, t, cond.labels, s=s, guidance=beta)
        return self.scaled(f, cond.guidance)

    @torch.no_grad()
    def velocity(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """Instantaneous velocity at x [B, ...], t [B] without a gradient, like x.

        The guided teacher's, or u_bar(x, t, t).
        """
        if self.config.velocity == "teacher":
            return self.task.teacher.velocity(x, t, cond)
        return self.average(self.student.averaged(TARGET), x, t, t, cond)

    def anchor_velocity(self, x: Tensor, t: Tensor, v: Tensor, cond: Condition) -> Tensor:
        """What B regresses at x [B, ...], t [B], like x.

        The guided teacher, or w v + (1-w) u_bar under the null label with w = 1; v = e - x.
        """
        if self.config.velocity == "teacher":
            return self.velocity(x, t, cond)
        w = cond.guidance
        if cond.labels is None or (not isinstance(w, Tensor) and w == 1):
            return v
        null = Condition(torch.full_like(cond.labels, self.task.classes), torch.ones_like(t))
        return anchor_target(v, self.velocity(x, t, null), w)

    def sample(self, noise: Tensor, cond: Condition, nfe: int, rng: Rng) -> Tensor:
        """Jumps along a uniform grid from 1 to 0 (generate_images.py).

        Guidance is in the network, so that a step is one evaluation.
        """
        net = self.student.averaged()
        w = cond.guidance
        if self.config.guidance is not None:
            low, high = self.config.guidance
            if not low <= w <= high:
                raise ValueError(
                    f"guidance {w:g} is outside the range [{low:g}, {high:g}] "
                    "the student was trained on"
                )
            w = w * noise.new_ones(len(noise))
        own = Condition(cond.labels, w)
        return jumps(lambda x, t, s: self.average(net, x, t, s, own), noise, nfe)
