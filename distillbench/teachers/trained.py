"""The training of a teacher by flow matching, as a method like any other."""

from __future__ import annotations

from torch import Tensor

from distillbench import times
from distillbench.config import TeacherSpec
from distillbench.method import Batch, Condition, Method, Needs, Step, Task, Teacher
from distillbench.paths import noised
from distillbench.players import EVALUATION, PlayerConfig
from distillbench.samplers import euler, heun
from distillbench.seeds import Rng


class TeacherConfig(TeacherSpec):
    """The teacher's settings with the guidance it is sampled with."""

    guidance: float = 1.0

    @property
    def evaluations(self) -> int:
        """Network evaluations of one guided velocity."""
        return 1 if self.guidance == 1 else 2


class TeacherTraining(Method):
    """Flow matching E |v(x_t, t, c) - target|^2 with target e - x (arXiv 2210.02747).

    On mixtures the target is the exact velocity, and the network initialises students.
    """

    Config = TeacherConfig

    @classmethod
    def needs(cls, config: TeacherConfig) -> Needs:
        each = config.evaluations
        many = 2 * config.heun_steps * each
        return Needs(
            batch=config.batch,
            nfe=(each, 2 * each, 4 * each, many),
            headline_nfe=many,
            data=True,
            teacher=False,
        )

    def __init__(self, task: Task, config: TeacherConfig):
        self.config = config
        self.classes = task.classes
        self.exact = task.teacher if task.has_teacher else None
        shared = config.model_dump(include={"lr", "betas", "warmup", "final_lr"})
        average = PlayerConfig(**shared, half_lives={EVALUATION: config.half_life})
        self.teacher = task.player("teacher", average, task.network("random"))

    def train_step(self, batch: Batch, step: Step) -> dict[str, Tensor]:
        assert batch.x is not None
        c = self.config
        t = times.logit_normal(step.rng("t"), batch.size, c.time_mean, c.time_std)
        e = step.rng("e").normal(*batch.x.shape)
        x_t = noised(batch.x, e, t)
        labels = batch.cond.labels
        if labels is not None:
            dropped = step.rng("drop").uniform(batch.size) < c.label_dropout
            labels = labels.masked_fill(dropped, self.classes)
        target = e - batch.x if self.exact is None else self.exact.network(x_t, t, labels)
        loss = (self.teacher.networks[0](x_t, t, labels) - target).square().mean()
        self.teacher.update(loss)
        return {"loss": loss.detach()}

    def sample(self, noise: Tensor, cond: Condition, nfe: int, rng: Rng) -> Tensor:
        """Heun at the many steps, Euler below; the exact velocity where there is one."""
        teacher = self.exact or Teacher(self.teacher.averaged(), self.classes)
        steps = nfe // self.config.evaluations
        solver = euler
        if steps == 2 * self.config.heun_steps:
            solver = heun
            steps //= 2
        return solver(lambda x, t: teacher.velocity(x, t, cond), noise, steps)
