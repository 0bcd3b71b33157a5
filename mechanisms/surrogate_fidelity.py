"""Does a flow map's endpoint stand for the fake velocity?

FSF-DMD (arXiv 2605.19256, Eq. 12) has v_fake(x_t, t) = u(x_t, t, 0). On two students, at samples x
of theirs noised to x_t = (1-t) x + t e. `exact`: the flow map of the data's mixture with its means
pulled a fifth towards the centre, in 64 Heun steps, whose fake velocity is a closed form.
`trained`: `fsf_dmd@explicit-fake`, with a critic beside it, whose fake velocity is
(x_t - E[x | x_t]) / t over COUNT other samples, half from one jump, half from two. Per surrogate
and student, in units of velocity, the root mean square error over all t, and with `, t 0.1` at one:

    endpoint   of u(x_t, t, 0)
    diagonal   of u(x_t, t, t)
    sample     of e - x (SDS)
    critic     of the critic
    teacher    of the teacher's velocity, which makes no correction at all

and without a unit, over all t:

    disagreement   1 - cosine of the corrections v_teacher - surrogate and v_teacher - v
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from distillbench.audits import mechanism
from distillbench.cells.build import Run
from distillbench.cells.steps import one_step
from distillbench.data.mixture import Mixture
from distillbench.method import Condition
from distillbench.paths import average_velocity, noised, over, velocity_of_denoiser
from distillbench.samplers import heun, jumps
from distillbench.seeds import Rng
from distillbench.teachers.exact import MixtureVelocity

BENCHMARK = "gaussians-ring"
METHODS = ("fsf_dmd", "meanflow")
ARM = "fsf_dmd@explicit-fake@x0.1"
TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
COUNT = 20000
QUERIES = 1000


def posterior_velocity(x_t: Tensor, t: Tensor, samples: Tensor) -> Tensor:
    """E[e - x | x_t] [B, D] of x uniform over `samples` [M, D]; all t [B] are equal and above 0."""
    far = torch.cdist(x_t, (1 - t[0]) * samples).square()
    posterior = (-far / (2 * t[0] ** 2)).softmax(1)
    return velocity_of_denoiser(x_t, posterior @ samples, t)


def rms(a: Tensor) -> float:
    """Root mean square length of the rows of a [N, D]."""
    return float(a.square().sum(1).mean().sqrt())


def judged(student: str, v: Tensor, guesses: dict[str, Tensor]) -> dict[str, float]:
    """Errors against v [times x queries, D] of what stands for it."""
    errors: dict[str, float] = {}
    for name, guess in guesses.items():
        errors[f"{name}, {student}"] = rms(guess - v)
        for time, part in zip(TIMES, (guess - v).split(QUERIES)):
            errors[f"{name}, {student}, t {time}"] = rms(part)
        if name != "teacher":
            correction = (guesses["teacher"] - guess).flatten()
            exact = (guesses["teacher"] - v).flatten()
            cosine = torch.cosine_similarity(correction, exact, 0)
            errors[f"disagreement, {name}, {student}"] = 1 - float(cosine)
    return errors


def measure(seed: int) -> dict[str, float]:
    """Errors of every surrogate on both students."""
    run, steps = mechanism.ready(BENCHMARK, ARM, seed)
    for i in range(steps):
        one_step(run, i, steps)
    rng = Rng(seed, "surrogate fidelity")
    t = torch.tensor(TIMES).repeat_interleave(QUERIES)
    e = rng.normal(QUERIES * len(TIMES), 2)
    with torch.no_grad():
        return known(run, e, t, rng) | fitted(run, e, t, rng)


def known(run: Run, e: Tensor, t: Tensor, rng: Rng) -> dict[str, float]:
    """Errors on the student that is an exact flow map; e, t: of times x queries."""
    assert isinstance(run.data, Mixture)
    own = replace(run.data, means=0.8 * run.data.means)
    velocity = MixtureVelocity(own)
    x = own.draw(rng, QUERIES)[0].repeat(len(TIMES), 1)
    x_t = noised(x, e, t)

    def rest(x: Tensor, r: Tensor) -> Tensor:
        """The flow from t to 0, told as from r = 1 to 0."""
        return over(t, x) * velocity(x, r * t)

    guesses = {
        "endpoint": average_velocity(x_t, heun(rest, x_t, 64), t, 0 * t),
        "sample": e - x,
        "teacher": run.task.teacher.velocity(x_t, t, Condition(None)),
    }
    return judged("exact", velocity(x_t, t), guesses)


def fitted(run: Run, e: Tensor, t: Tensor, rng: Rng) -> dict[str, float]:
    """Errors on the student that was trained, which need not be anybody's exact flow map."""
    method: Any = run.method
    net = method.net
    z = rng.normal(COUNT + QUERIES, 2)

    def average(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return net(x, t, s=s)

    x = torch.cat([jumps(average, z[0::2], 1), jumps(average, z[1::2], 2)])
    x = x[rng.uniform(len(z)).argsort()]
    queries = x[:QUERIES].repeat(len(TIMES), 1)
    samples = x[QUERIES:]
    x_t = noised(queries, e, t)
    parts = []
    for x_part, t_part in zip(x_t.split(QUERIES), t.split(QUERIES)):
        parts.append(posterior_velocity(x_part, t_part, samples))
    guesses = {
        "endpoint": net(x_t, t, s=0 * t),
        "diagonal": net(x_t, t, s=t),
        "sample": e - queries,
        "critic": method.g(x_t, t),
        "teacher": run.task.teacher.velocity(x_t, t, Condition(None)),
    }
    return judged("trained", torch.cat(parts), guesses)
