"""Teachers: the exact velocity of a mixture, or a network trained by flow matching; guided velocity; ODE pairs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distillbench import times
from distillbench.config import TeacherSpec
from distillbench.data import Mixture
from distillbench.method import Batch, Condition, Method, Needs, Pairs, Step, Task
from distillbench.paths import guided, noised, over
from distillbench.players import EVALUATION, PlayerConfig
from distillbench.samplers import euler, heun, in_batches
from distillbench.seeds import Rng


class MixtureVelocity(nn.Module):
    """Exact v(x, t) = E[e - x0 | x_t = x] of an isotropic Gaussian mixture, of one class or of all.

    Under component k, x_t ~ N((1-t) mu_k, S^2) with S^2 = (1-t)^2 sigma^2 + t^2, and e and x0 are jointly Gaussian
    with x_t, so E[e|x_t,k] = t d / S^2 and E[x0|x_t,k] = mu_k + (1-t) sigma^2 d / S^2 with d = x_t - (1-t) mu_k.
    Nothing is divided by t: t=0 and t=1 are ordinary points.
    """

    means: Tensor
    log_weights: Tensor
    component_class: Tensor

    def __init__(self, mixture: Mixture):
        super().__init__()
        self.sigma, self.classes = mixture.sigma, mixture.classes
        self.register_buffer("means", mixture.means.flatten(1))
        self.register_buffer("log_weights", mixture.weights.log())
        self.register_buffer("component_class", mixture.component_class)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """x: [B, *shape]; t: [B] in [0, 1]; labels: [B], `classes` meaning all of them. Returns v like x."""
        t = t[:, None]
        d = x.flatten(1)[:, None] - (1 - t)[..., None] * self.means  # [B, K, D]
        variance = (1 - t) ** 2 * self.sigma**2 + t**2  # [B, 1]
        log_r = self.log_weights - d.square().sum(-1) / (2 * variance)
        if labels is not None:
            other = (self.component_class != labels[:, None]) & (labels[:, None] != self.classes)
            log_r = log_r.masked_fill(other, -torch.inf)
        r = log_r.softmax(1)
        mean_d = (r[..., None] * d).sum(1)
        return ((t - (1 - t) * self.sigma**2) / variance * mean_d - r @ self.means).reshape(x.shape)


class Teacher:
    """What a method sees of its teacher. Differentiable in x; its own parameters need no gradient."""

    def __init__(self, network: nn.Module, classes: int):
        self.network = network.requires_grad_(False).eval()
        self._classes = classes

    def velocity(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """v at x [B, *shape], t [B]; with guidance w != 1, or one for each row, v_null + w (v_cond - v_null), a second evaluation."""
        v, w = self.network(x, t, cond.labels), cond.guidance
        if cond.labels is None or (not isinstance(w, Tensor) and w == 1):
            return v
        null = self.network(x, t, torch.full_like(cond.labels, self._classes))
        return guided(null, v, over(w, x) if isinstance(w, Tensor) else w)


class TeacherConfig(TeacherSpec):
    """The teacher's settings with the guidance it is sampled with."""

    guidance: float = 1.0

    @property
    def evaluations(self) -> int:
        """Network evaluations of one guided velocity."""
        return 1 if self.guidance == 1 else 2


class TeacherTraining(Method):
    """Flow matching E |v(x_t, t, c) - target|^2, target e - x; on mixtures the exact velocity, to initialise students."""

    Config = TeacherConfig

    @classmethod
    def needs(cls, config: TeacherConfig) -> Needs:
        each, many = config.evaluations, 2 * config.heun_steps * config.evaluations
        return Needs(batch=config.batch, nfe=(each, 2 * each, 4 * each, many), headline_nfe=many, data=True, teacher=False)

    def __init__(self, task: Task, config: TeacherConfig):
        self.config, self.classes, self.exact = config, task.classes, task.teacher
        shared = config.model_dump(include={"lr", "betas", "warmup", "final_lr"})
        average = PlayerConfig(**shared, half_lives={EVALUATION: config.half_life})
        self.teacher = task.player("teacher", average, task.network("random"))

    def train_step(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        assert batch.x is not None
        t = times.logit_normal(step.rng("t"), batch.size, self.config.time_mean, self.config.time_std)
        e = step.rng("e").normal(*batch.x.shape)
        x_t, labels = noised(batch.x, e, t), batch.cond.labels
        if labels is not None:
            dropped = step.rng("drop").uniform(batch.size) < self.config.label_dropout
            labels = labels.masked_fill(dropped, self.classes)
        target = e - batch.x if self.exact is None else self.exact.network(x_t, t, labels)
        loss = (self.teacher.networks[0](x_t, t, labels) - target).square().mean()
        self.teacher.update(loss)
        return {"loss": loss.detach()}

    def sample(self, noise: Tensor, cond: Condition, nfe: int, rng: Rng) -> Tensor:
        """Heun at the many steps, Euler below; the exact velocity where there is one."""
        teacher = self.exact or Teacher(self.teacher.averaged(), self.classes)
        steps = nfe // self.config.evaluations
        solver, steps = (heun, steps // 2) if steps == 2 * self.config.heun_steps else (euler, steps)
        return solver(lambda x, t: teacher.velocity(x, t, cond), noise, steps)


@torch.no_grad()
def make_pairs(teacher: Teacher, pairs: Pairs, shape: tuple[int, ...], classes: int, guidance: float, rng: Rng) -> dict[str, Tensor]:
    """Regression pairs (DMD section 3.3): noise z, the teacher's deterministic ODE sample y from z, the labels."""
    z = rng.normal(pairs.count, *shape)
    labels = torch.arange(pairs.count, device=z.device) % classes if classes else None

    def solve(noise: Tensor, own: Tensor | None) -> Tensor:
        cond = Condition(own, guidance)
        return heun(lambda x, t: teacher.velocity(x, t, cond), noise, pairs.heun_steps)

    y = in_batches(solve, z, labels, 512)
    return {"z": z, "y": y} | ({} if labels is None else {"labels": labels})
