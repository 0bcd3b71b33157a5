"""Does a flow map's endpoint stand for the fake velocity (FSF-DMD, arXiv 2605.19256, Eq. 12: v_fake(x_t, t) = u(x_t, t, 0))?

On two students, at samples x of theirs noised to x_t = (1-t) x + t e. `exact`: the flow map of the data's mixture with its means
pulled a fifth towards the centre, in 64 Heun steps, whose fake velocity is a closed form. `trained`: `fsf_dmd@explicit-fake`, with a
critic beside it, whose fake velocity is (x_t - E[x | x_t]) / t over COUNT other samples, half from one jump, half from two.
Per surrogate and student, in units of velocity:

    endpoint, diagonal, sample, critic, teacher   root mean square error of u(x_t, t, 0), of u(x_t, t, t), of e - x (SDS), of the
                                                  critic, of the teacher's velocity, which makes no correction at all; over all t,
                                                  and with `, t 0.1` at one
    disagreement   1 - cosine of the corrections v_teacher - surrogate and v_teacher - v over all t: no unit
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from distillbench.audits import mechanism
from distillbench.cells.steps import one_step
from distillbench.method import Condition
from distillbench.paths import average_velocity, noised, over, velocity_of_denoiser
from distillbench.samplers import heun, jumps
from distillbench.seeds import Rng
from distillbench.teachers.exact import MixtureVelocity

BENCHMARK = "gaussians-ring"
METHODS = ("fsf_dmd", "meanflow")
ARM = "fsf_dmd@explicit-fake@x0.1"
TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
COUNT, QUERIES = 20000, 1000


def posterior_velocity(x_t: Tensor, t: Tensor, samples: Tensor) -> Tensor:
    """E[e - x | x_t] [B, D] of x uniform over `samples` [M, D]; all t [B] are equal and above 0."""
    far = torch.cdist(x_t, (1 - t[0]) * samples).square()
    return velocity_of_denoiser(x_t, (-far / (2 * t[0] ** 2)).softmax(1) @ samples, t)


def rms(a: Tensor) -> float:
    """Root mean square length of the rows of a [N, D]."""
    return float(a.square().sum(1).mean().sqrt())


def judged(student: str, v: Tensor, guesses: dict[str, Tensor]) -> dict[str, float]:
    """Errors against v [times x queries, D] of what stands for it."""
    found: dict[str, float] = {}
    for name, guess in guesses.items():
        found[f"{name}, {student}"] = rms(guess - v)
        for time, part in zip(TIMES, (guess - v).split(QUERIES)):
            found[f"{name}, {student}, t {time}"] = rms(part)
        if name != "teacher":
            cosine = torch.cosine_similarity(
                (guesses["teacher"] - guess).flatten(), (guesses["teacher"] - v).flatten(), 0
            )
            found[f"disagreement, {name}, {student}"] = 1 - float(cosine)
    return found


def measure(seed: int) -> dict[str, float]:
    run, steps = mechanism.ready(BENCHMARK, ARM, seed)
    for i in range(steps):
        one_step(run, i, steps)
    rng, data, method = Rng(seed, "surrogate fidelity"), run.data, run.method
    t, e = torch.tensor(TIMES).repeat_interleave(QUERIES), rng.normal(QUERIES * len(TIMES), 2)
    with torch.no_grad():
        return known(run, data, e, t, rng) | fitted(run, method, e, t, rng)


def known(run: Any, data: Any, e: Tensor, t: Tensor, rng: Rng) -> dict[str, float]:
    """The student that is an exact flow map."""
    own = replace(data, means=0.8 * data.means)
    velocity, x = MixtureVelocity(own), own.draw(rng, QUERIES)[0].repeat(len(TIMES), 1)
    x_t = noised(x, e, t)
    rest = lambda x, r: over(t, x) * velocity(x, r * t)  # from t to 0, told as from r = 1 to 0
    endpoint = average_velocity(x_t, heun(rest, x_t, 64), t, 0 * t)
    teacher = run.task.teacher.velocity(x_t, t, Condition(None))
    return judged(
        "exact", velocity(x_t, t), {"endpoint": endpoint, "sample": e - x, "teacher": teacher}
    )


def fitted(run: Any, method: Any, e: Tensor, t: Tensor, rng: Rng) -> dict[str, float]:
    """The student that was trained, which need not be anybody's exact flow map."""
    net, z, average = (
        method.net,
        rng.normal(COUNT + QUERIES, 2),
        lambda x, t, s: method.net(x, t, s=s),
    )
    x = torch.cat([jumps(average, z[0::2], 1), jumps(average, z[1::2], 2)])[
        rng.uniform(len(z)).argsort()
    ]
    queries, samples = x[:QUERIES].repeat(len(TIMES), 1), x[QUERIES:]
    x_t = noised(queries, e, t)
    v = torch.cat(
        [posterior_velocity(*pair, samples) for pair in zip(x_t.split(QUERIES), t.split(QUERIES))]
    )
    teacher = run.task.teacher.velocity(x_t, t, Condition(None))
    guesses = {
        "endpoint": net(x_t, t, s=0 * t),
        "diagonal": net(x_t, t, s=t),
        "sample": e - queries,
        "critic": method.g(x_t, t),
    }
    return judged("trained", v, guesses | {"teacher": teacher})
