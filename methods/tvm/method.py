"""Terminal Velocity Matching (TVM, arXiv 2511.19797), from a teacher's velocity or from data. Average velocity u(x_t, t, s).

The paper's convention is ours. Its displacement is f = (s-t) F, so its F is our u, or u = w F with the scaled form. The loss is
Eqs. 12, 14 and 15 as the official code has them (lumalabs/tvm, training/wrapper.py); u(x, t) is short for u(x, t, t).
"""

from __future__ import annotations

from typing import Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from distillbench import times
from distillbench.method import Batch, Condition, Method, Needs, Norms, Step, Task
from distillbench.paths import guided, jump, noised, over
from distillbench.players import PlayerConfig
from distillbench.samplers import jumps
from distillbench.seeds import Rng

TARGET = "target"  # the average that gives u_bar: `student.half_lives` in the data form


def by_row(w: float | Tensor, x: Tensor) -> float | Tensor:
    """A guidance weight, one or [B], as a factor of x [B, ...]."""
    return over(w, x) if isinstance(w, Tensor) else w


def terminal_velocity(u: Tensor, du: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """dX/ds = u - (t-s) du/ds of X = x_t - (t-s) u. u, du: [B, ...]; t, s: [B]; keeps the graph of both."""
    return u - over(t - s, u) * du


def weighted_error(u: Tensor, target: Tensor, w: float | Tensor) -> Tensor:
    """(1/w^2) mean |u - target|^2 of each row's elements: [B]. u, target: [B, ...]; no gradient in the target (Eqs. 14, 15)."""
    return ((u - target.detach()) / by_row(w, u)).square().flatten(1).mean(1)


def terminal_loss(dx_ds: Tensor, target: Tensor, t: Tensor, s: Tensor, w: float | Tensor) -> Tensor:
    """A: (1/w^2) mean |dX/ds - sg u_bar(sg X, s)|^2 by row [B], zero where s is t, rows that the code leaves to B (wrapper.py)."""
    error = weighted_error(dx_ds, target, w)
    return torch.where(torch.isclose(t, s), 0.0, error)


def anchor_target(v: Tensor, null: Tensor, w: float | Tensor) -> Tensor:
    """w v + (1-w) u_bar(x, s', null): the guided velocity that B regresses (Eq. 14); v is a sample's own e - x."""
    return guided(null, v, by_row(w, v))


class TVM(Method):
    class Config(BaseModel):
        model_config = ConfigDict(extra="forbid")
        velocity: Literal["teacher", "data"] = Field(
            description="velocities at the end of a path and of the anchor: the teacher's, or u_bar's own and e - x (from scratch)"
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
            description="of the network, from scratch: layer, or rms also on modulations (semi-Lipschitz)"
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
                    "student.half_lives.target: with the teacher's velocity nothing uses this average"
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
        self.task, self.config = task, config
        init: Literal["teacher", "random"] = "teacher" if config.velocity == "teacher" else "random"
        self.net = task.network(
            init, second_time=True, guidance=config.guidance is not None, norms=config.norms
        )
        self.student = task.player("student", config.student, self.net)

    def train_step(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """mean(A) + anchor mean(B), one backward pass; then the player moves its averages, u_bar among them."""
        c, x, n = self.config, batch.x, batch.size
        assert x is not None
        t, s = self.times(step.rng("t, s"), n)
        cond, e = self.conditions(batch.cond, step, n), step.rng("e").normal(*x.shape)
        w, x_t = cond.guidance, noised(x, e, t)

        # du/ds at fixed (x_t, t): tangent (0, 0, 1). A's gradient goes through it, not through X or the target (section 4).
        tangents = (torch.zeros_like(x_t), torch.zeros_like(t), torch.ones_like(s))
        f, df = self.task.jvp(
            self.net, (x_t, t, s), tangents, self.inputs(cond), graph=not c.detach_jvp
        )
        u, du = self.scaled(f, w), self.scaled(df, w)
        target = self.velocity(jump(x_t, u, t, s).detach(), s, cond)
        terminal = terminal_loss(terminal_velocity(u, du, t, s), target, t, s, w).mean()
        loss, logged = terminal, {"terminal": terminal.detach()}

        if c.anchor:  # on the same image and noise, at a time of its own ("gap*")
            s_prime = times.logit_normal(step.rng("s'"), n, c.s_mean, c.s_std)
            x_s = noised(x, e, s_prime)
            diagonal = self.average(self.net, x_s, s_prime, s_prime, cond)
            anchor = weighted_error(
                diagonal, self.anchor_velocity(x_s, s_prime, e - x, cond), w
            ).mean()
            loss = terminal + c.anchor * anchor
            logged["anchor"] = anchor.detach()
        self.student.update(loss)
        return logged | {"loss": loss.detach()}

    def times(self, rng: Rng, n: int) -> tuple[Tensor, Tensor]:
        """(t, s) of the law, each [n]. `one` is the arm t = 1 that section 5 calls unstable."""
        c = self.config
        if c.law == "one":
            s = times.logit_normal(rng, n, c.s_mean, c.s_std)
            return torch.ones_like(s), s
        draw = {"gap": times.gap_pair, "trunc": times.truncated_pair, "clamp": times.clamped_pair}[
            c.law
        ]
        return draw(rng, n, c.time_mean, c.time_std, c.s_mean, c.s_std)

    def conditions(self, cond: Condition, step: Step, n: int) -> Condition:
        """Labels and w of the rows, some of them null with w = 1 (training/loss.py). w stays one number where all rows share it."""
        c, labels, w = self.config, cond.labels, cond.guidance
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
        return (
            Condition(cond.labels, 1 / cond.guidance)
            if self.config.guidance is not None
            else Condition(cond.labels)
        )

    def scaled(self, f: Tensor, w: float | Tensor) -> Tensor:
        """u = w F of the scaled form (training/wrapper.py), or u = F."""
        return by_row(w, f) * f if self.config.scaled else f

    def average(
        self, net: torch.nn.Module, x: Tensor, t: Tensor, s: Tensor, cond: Condition
    ) -> Tensor:
        """u(x, t, s) of a network under labels and w."""
        own = self.inputs(cond).guidance
        f = net(x, t, cond.labels, s=s, guidance=own if isinstance(own, Tensor) else None)
        return self.scaled(f, cond.guidance)

    @torch.no_grad()
    def velocity(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """Instantaneous velocity at x [B, ...], t [B] without a gradient: the guided teacher's, or u_bar(x, t, t)."""
        if self.config.velocity == "teacher":
            return self.task.teacher.velocity(x, t, cond)
        return self.average(self.student.averaged(TARGET), x, t, t, cond)

    def anchor_velocity(self, x: Tensor, t: Tensor, v: Tensor, cond: Condition) -> Tensor:
        """What B regresses at (x, t): the guided teacher, or w v + (1-w) u_bar under the null label with w = 1; v = e - x."""
        if self.config.velocity == "teacher":
            return self.velocity(x, t, cond)
        w = cond.guidance
        if cond.labels is None or (not isinstance(w, Tensor) and w == 1):
            return v
        null = Condition(torch.full_like(cond.labels, self.task.classes), torch.ones_like(t))
        return anchor_target(v, self.velocity(x, t, null), w)

    def sample(self, noise: Tensor, cond: Condition, nfe: int, rng: Rng) -> Tensor:
        """Jumps along a uniform grid from 1 to 0 (generate_images.py); guidance is in the network, one evaluation a step."""
        net, w = self.student.averaged(), cond.guidance
        if self.config.guidance is not None:
            low, high = self.config.guidance
            if not low <= w <= high:
                raise ValueError(
                    f"guidance {w:g} is outside the range [{low:g}, {high:g}] the student was trained on"
                )
            w = w * noise.new_ones(len(noise))
        own = Condition(cond.labels, w)
        return jumps(lambda x, t, s: self.average(net, x, t, s, own), noise, nfe)
