"""FreeFlow (Tong et al., arXiv 2511.19428): a one-step flow map from noise alone.

It predicts along the teacher and corrects by matching. The paper's u, F, v_G, v_N point from noise
to data: u = -v, F = -U, v_G = -dX/ds, v_N = -v_q. Both factors of Eqs. 9 and 11 change sign in our
convention, so their products do not.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from distillbench import times
from distillbench.matching import critic_loss
from distillbench.method import Batch, Condition, Method, Needs, Step, Task
from distillbench.paths import noised, over
from distillbench.players import PlayerConfig
from distillbench.samplers import heun_slope
from distillbench.seeds import Rng


def draw_delta(rng: Rng, n: int, mean: float, std: float, zeros: float) -> Tensor:
    """delta = 1 - s, [n] in [0, 1], of the paper's law (App. A.1, Table 3).

    Logit-normal, with probability `zeros` replaced by 0.
    """
    delta = times.logit_normal(rng, n, mean, std)
    return torch.where(rng.uniform(n) < zeros, 0.0, delta)


def on_grid(delta: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """(start, end), [n] each, of the interval of a uniform grid of `steps` that holds delta [n].

    The network is trained at the end (Eq. 14).
    """
    start = (delta * steps).floor().clamp(max=steps - 1)  # delta can round to 1
    return start / steps, (start + 1) / steps


def confident(x: Tensor, t: Tensor, t_c: float, e: Tensor) -> tuple[Tensor, Tensor]:
    """Where to ask the teacher instead of (x, t): moved to noise level t_c if noisier (App. A.1).

    x: [B, ...] at t [B], e: fresh noise like x. I_{t_c|t}(x, e) = a x + sqrt(t_c^2 - a^2 t^2) e
    with a = (1-t_c)/(1-t): data keep the factor 1-t_c, the noise adds up to t_c. Rows with t_c <= t
    are returned as they are, t = 1 among them.
    """
    noisier = t < t_c
    a = torch.where(noisier, (1 - t_c) / (1 - torch.where(noisier, t, 0.0)), 1.0)
    b = torch.where(noisier, (t_c**2 - (a * t) ** 2).clamp_min(0).sqrt(), 0.0)
    return over(a, x) * x + over(b, x) * e, torch.where(noisier, t_c, t)


def weighted(delta: Tensor, k: float) -> Tensor:
    """Delta / (|Delta|^2 / d + 1e-4)^k row by row, like Delta [B, ...] (section 5.1, Table 1d).

    d: elements of a row.
    """
    mean_square = delta.square().flatten(1).mean(1)
    return delta / over((mean_square + 1e-4).pow(k), delta)


def alpha_at(
    progress: float, reference: float, delay: float, ramp: float, decay: float | None
) -> float:
    """alpha: 0 until `delay`, then linear over `ramp` up to `reference` (App. A.3).

    Over sqrt(progress / decay) after `decay`. All times are shares of the run.
    """
    rise = float(progress >= delay)
    if ramp:
        rise = min(max((progress - delay) / ramp, 0.0), 1.0)
    if decay:
        return reference * rise / max(progress / decay, 1.0) ** 0.5
    return reference * rise


def mean_norm(delta: Tensor) -> Tensor:
    """Mean over rows of |Delta|, Delta: [B, ...]: a scalar."""
    return delta.flatten(1).norm(dim=1).mean()


def balance(alpha: float, prediction: Tensor, correction: Tensor) -> Tensor:
    """lambda = alpha mean|Delta_G| / (mean|Delta_N| + 1e-6) from both means (section 5.1).

    A scalar; Delta_G as it is applied, weight included.
    """
    return alpha * prediction / (correction + 1e-6)


def gradient_form(u: Tensor, delta: Tensor) -> Tensor:
    """E[U^T sg(Delta)]: a scalar whose gradient in u [B, ...] is Delta / B (Eqs. 9 and 11)."""
    return (u * delta.detach()).flatten(1).sum(1).mean()


class FreeFlow(Method):
    """One-step flow map trained on noise alone, by prediction and by correction."""

    class Config(BaseModel):
        """Settings of FreeFlow."""

        model_config = ConfigDict(extra="forbid")
        batch: int = Field(gt=0)
        correction: float = Field(
            ge=0,
            le=1,
            description="share of the batch for Eq. 11; 0: prediction only, 1: correction only",
        )
        derivative: Literal["discrete", "jvp"] = Field(
            description="of the generating flow: Eq. 14 or Eq. 8"
        )
        steps: int = Field(gt=0, description="N of the discrete form")
        solver: Literal["heun", "euler"] = Field(
            description="the teacher's slope over a step of the discrete form"
        )
        delta_mean: float = Field(description="of the logit-normal law of delta")
        delta_std: float = Field(gt=0)
        delta_zeros: float = Field(ge=0, le=1, description="share of delta = 0")
        confident_warmup: float = Field(
            ge=0, le=1, description="share of the run over which t_c falls from 1 to 0"
        )
        k: float = Field(ge=0, description="power of the weight on Delta_G")
        r_mean: float = Field(description="of the logit-normal law of r")
        r_std: float = Field(gt=0)
        alpha: float = Field(ge=0)
        alpha_delay: float = Field(ge=0, lt=1, description="share of the run with alpha = 0")
        alpha_ramp: float = Field(ge=0, lt=1, description="share of the run over which alpha rises")
        alpha_decay: float | None = Field(
            None,
            gt=0,
            description="share of the run after which alpha falls like 1/sqrt; null: never",
        )
        guidance: tuple[float, float] | None = Field(
            None, description="gamma ~ U(low, high), an input; null: the benchmark's weight"
        )
        guidance_high: float = Field(
            1.0,
            ge=0,
            le=1,
            description="Eq. 11 guides its teacher for r up to this only (Table 1c)",
        )
        student: PlayerConfig
        critic: PlayerConfig

    @classmethod
    def needs(cls, config: Config) -> Needs:
        return Needs(batch=config.batch, nfe=(1,), headline_nfe=1)

    def __init__(self, task: Task, config: Config):
        self.task = task
        self.config = config
        guidance = config.guidance is not None
        self.net = task.network("teacher", second_time=True, guidance=guidance)
        self.student = task.player("student", config.student, self.net)
        if config.correction:
            self.g = task.network("teacher", guidance=guidance)
            self.critic = task.player("critic", config.critic, self.g)

    def train_step(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        """Rows 0..m-1 predict (Eq. 9), the others correct (Eq. 11).

        One backward pass of the student, then one of g_psi (Eq. 12).
        """
        c = self.config
        n = batch.size
        m = n - round(c.correction * n)
        z = step.rng("z").normal(n, *self.task.shape)
        cond = self.conditions(batch.cond, step, n)
        one = z.new_ones(n)
        s = z.new_zeros(n)
        delta = draw_delta(step.rng("delta"), m, c.delta_mean, c.delta_std, c.delta_zeros)
        start, end = delta, delta
        if c.derivative == "discrete":
            start, end = on_grid(delta, c.steps)
        s[:m] = 1 - end
        du: Tensor | None = None
        if c.derivative == "jvp" and m:  # partial in s alone: z is the fixed start of every path
            tangents = (0 * z[:m], 0 * one[:m], one[:m])
            u, du = self.task.jvp(self.net, (z, one, s), tangents, cond)
        else:
            u = self.net(z, one, cond.labels, s=s, guidance=weights(cond))

        logged: dict[str, Tensor] = {}
        parts = []
        if m:
            own = rows(cond, 0, m)
            delta_g = self.generating(z[:m], u.detach()[:m], du, start, end, own, step)
            parts.append(weighted(delta_g, c.k))
            logged["delta_G"] = delta_g.square().mean().sqrt()
        if m < n:
            x = z[m:] - u.detach()[m:]
            v_q, e, delta_n = self.noising(x, rows(cond, m, n), step)
            scale = one[0]
            if m:
                alpha = alpha_at(step.progress, c.alpha, c.alpha_delay, c.alpha_ramp, c.alpha_decay)
                prediction = step.mean_across_ranks(mean_norm(parts[0]))
                correction = step.mean_across_ranks(mean_norm(delta_n))
                scale = balance(alpha, prediction, correction)
            parts.append(scale * delta_n)
            logged["delta_N"] = delta_n.square().mean().sqrt()
            logged["lambda"] = scale
        self.student.update(gradient_form(u, torch.cat(parts)))
        if m < n:
            loss = critic_loss(v_q, x, e)
            self.critic.update(loss)
            logged["critic"] = loss.detach()
        return logged

    @torch.no_grad()
    def generating(
        self,
        z: Tensor,
        u: Tensor,
        du: Tensor | None,
        start: Tensor,
        end: Tensor,
        cond: Condition,
        step: Step,
    ) -> Tensor:
        """Delta_G = dX/ds - v(X, s) on the student's own path X = z - (1-s) U(z, 1, s), like z.

        Eq. 8 where `du` is dU/ds; without it over the step from `start` to `end`, Eq. 14.
        z, u, du: [m, ...]; start, end: [m].
        """
        c = self.config
        query_noise = step.rng("confident")
        t_c = 1 - step.progress / c.confident_warmup if c.confident_warmup else 0.0

        def teacher(x: Tensor, t: Tensor) -> Tensor:
            if t_c > 0:
                x, t = confident(x, t, t_c, query_noise.normal(*x.shape))
            return self.task.teacher.velocity(x, t, cond)

        x_end = z - over(end, z) * u
        if du is not None:
            return u - over(end, z) * du - teacher(x_end, 1 - end)
        t = 1 - start
        s = 1 - end
        one = torch.ones_like(t)
        u_start = self.net(z, one, cond.labels, s=t, guidance=weights(cond))
        x = z - over(start, z) * u_start
        slope = heun_slope(teacher, x, t, s) if c.solver == "heun" else teacher(x, t)
        return (x - x_end) / over(t - s, z) - slope

    def noising(self, x: Tensor, cond: Condition, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """g_psi at x_r with its graph, the noise in x_r, and Delta_N = v_q - v (Eq. 11).

        All like the samples x [B, ...]. Eq. 12 trains on the same x_r.
        """
        c = self.config
        r = times.logit_normal(step.rng("r"), len(x), c.r_mean, c.r_std)
        e = step.rng("n").normal(*x.shape)
        x_r = noised(x, e, r)
        v_q = self.g(x_r, r, cond.labels, guidance=weights(cond))
        with torch.no_grad():
            v = self.task.teacher.velocity(x_r, r, within(cond, r, c.guidance_high))
        return v_q, e, v_q.detach() - v

    def conditions(self, cond: Condition, step: Step, n: int) -> Condition:
        """Labels with gamma ~ U(low, high) for each row, or with the benchmark's weight."""
        if self.config.guidance is None:
            return cond
        return Condition(cond.labels, times.uniform(step.rng("gamma"), n, *self.config.guidance))

    def sample(self, noise: Tensor, cond: Condition, nfe: int, rng: Rng) -> Tensor:
        """z - U(z, 1, 0) by one evaluation; guidance is an input.

        Section 3.2 has no other sampler.
        """
        one = noise.new_ones(len(noise))
        gamma: Tensor | None = None
        if self.config.guidance is not None:
            low, high = self.config.guidance
            if not low <= cond.guidance <= high:
                raise ValueError(
                    f"guidance {cond.guidance:g} is outside the range [{low:g}, {high:g}] "
                    "the student was trained on"
                )
            gamma = cond.guidance * one
        return noise - self.student.averaged()(noise, one, cond.labels, s=0 * one, guidance=gamma)


def weights(cond: Condition) -> Tensor | None:
    """gamma [B] where it is an input of the networks, else None."""
    return cond.guidance if isinstance(cond.guidance, Tensor) else None


def rows(cond: Condition, first: int, last: int) -> Condition:
    """The condition of rows first..last-1."""
    labels = None if cond.labels is None else cond.labels[first:last]
    gamma = cond.guidance
    if isinstance(gamma, Tensor):
        gamma = gamma[first:last]
    return Condition(labels, gamma)


def within(cond: Condition, r: Tensor, high: float) -> Condition:
    """Guidance for r [B] up to `high`, the plain conditional teacher above (Table 1c)."""
    unguided = not isinstance(cond.guidance, Tensor) and cond.guidance == 1
    if cond.labels is None or high >= 1 or unguided:
        return cond
    return Condition(cond.labels, torch.where(r <= high, cond.guidance, 1.0))
