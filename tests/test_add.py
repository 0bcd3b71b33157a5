"""ADD against closed forms and its paper: specs/add.md (test numbers in the comments)."""

import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from distillbench import features, paths, reading
from distillbench.config import MethodFile
from distillbench.meter import Meter
from distillbench.method import Batch, Condition, Step, Task, Teacher
from distillbench.networks.mlp import VelocityMLP
from distillbench.registry import folders
from distillbench.seeds import Rng
from tests.conftest import captured
from tests.toys import random_task, weights

ROOT = Path(__file__).parents[1]
ADD = folders.load(SimpleNamespace(name="add", path=ROOT / "methods/add"))
method = sys.modules[ADD.__module__]
SHAPE, N = (1, 4, 4), 16
SETTINGS = {
    "batch": N,
    "init": "teacher",
    "levels": [1.0],
    "adversarial": True,
    "features": "random",
    "kernel": None,
    "pixel": False,
    "conditional": True,
    "hidden": 8,
    "r1": 0.5,
    "distillation": 0.3,
    "weighting": "exponential",
    "student": {"lr": 1e-2},
    "discriminator": {"lr": 1e-2},
}


def made(**changes) -> tuple:
    """ADD with a random teacher and the features of small images."""
    settings = ADD.Config.model_validate(SETTINGS | changes)
    torch.manual_seed(2)
    # withheld unless asked for
    frozen = (
        features.untrained(SHAPE).requires_grad_(False) if ADD.needs(settings).features else None
    )
    task = random_task(SHAPE, features=frozen)
    return ADD(task, settings), task


def batch(w: float = 1.0, n: int = N) -> Batch:
    x = torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(5))
    return Batch(n, Condition(torch.arange(n) % 3, w), x)


def step(index: int = 0) -> Step:
    return Step(index, 10, 0, torch.device("cpu"))


def inputs(network: nn.Module) -> list:
    """Positional arguments of every later call of a network."""
    seen: list = []
    network.register_forward_hook(lambda _m, args, _o: seen.append(args))
    return seen


def double(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# The distillation loss (Eq. 4)


@pytest.mark.parametrize("weighting", ["exponential", "sds"])
def test_the_distillation_gradient_in_velocities(weighting):  # tests 1, 2
    x, e, v = (double(8, 1, 2, 2, seed=s) for s in range(3))
    t = torch.linspace(0, 1, 8, dtype=torch.float64)  # 0 and 1 are ordinary points
    x_t, tt = paths.noised(x, e, t), t[:, None, None, None]
    x_psi = paths.denoiser(x_t, v, t)
    torch.testing.assert_close(x - x_psi, tt * (v - (e - x)))
    leaf, v_leaf, x_t_leaf = (a.clone().requires_grad_() for a in (x, v, x_t))
    loss = method.distillation_loss(leaf, v_leaf, x_t_leaf, t, weighting)
    gradient, *behind = torch.autograd.grad(loss, (leaf, v_leaf, x_t_leaf), allow_unused=True)
    assert behind == [None, None]  # nothing flows through x_psi
    if weighting == "exponential":
        c = 1 - tt
        expected = 2 * c * tt * (v - (e - x))
    else:  # (1-t) w (v - (e - x)) with w = t^2
        expected = (1 - tt) * tt**2 * (v - (e - x))
    torch.testing.assert_close(gradient, expected / x.numel())
    assert gradient.isfinite().all()
    (through,) = torch.autograd.grad(
        ((1 - tt) * (leaf - paths.denoiser(paths.noised(leaf, e, t), v, t)).square()).mean(), leaf
    )
    # Planted: x_psi with its graph; w = 2 t^2
    other = 2 * (1 - tt) * tt**2 * (v - (e - x)) / x.numel()
    assert all(
        (gradient - planted).abs().max() > 1e-3
        for planted in (through, other, -expected / x.numel())
    )


# test 2: w (eps_psi - e) = w(t) (1-t) (v - (e - x))
def test_sds_in_noise_is_dreamfusions_gradient():
    x, e, v, t = (
        double(6, 3),
        double(6, 3, seed=1),
        double(6, 3, seed=2),
        torch.linspace(0.1, 0.9, 6, dtype=torch.float64),
    )
    eps = paths.noise(paths.noised(x, e, t), v, t)
    tt, leaf = t[:, None], x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(
        method.distillation_loss(leaf, v, paths.noised(x, e, t), t, "sds"), leaf
    )
    torch.testing.assert_close(gradient * x.numel(), tt**2 * (eps - e))
    # Planted: alpha twice
    assert not torch.allclose(gradient * x.numel(), tt**2 * (1 - tt) * (eps - e), atol=1e-2)


# A Gaussian teacher N(0, width^2) and a student x = a z.
# Everything is linear, so the four points of (z, e) are exact.

Z = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
E = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
TIMES = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000  # t ~ U(0, 1)


def gaussian_velocity(x: Tensor, t: Tensor, width: float, mean: float = 0.0) -> Tensor:
    variance = (1 - t) ** 2 * width**2 + t**2
    return (t - (1 - t) * width**2) / variance * (x - (1 - t) * mean) - mean


def distillation(
    a: Tensor, width: float, weighting: str, mean: float = 0.0, shift: float | Tensor = 0.0
) -> Tensor:
    """E over z, e, t of the distillation loss of x = shift + a z."""
    z, e, t = Z.repeat(len(TIMES)), E.repeat(len(TIMES)), TIMES.repeat_interleave(4)
    x = (shift + a * z)[:, None]
    x_t = paths.noised(x.detach(), e[:, None], t)
    v = gaussian_velocity(x_t[:, 0], t, width, mean)[:, None]
    return method.distillation_loss(x, v, x_t, t, weighting)


def kappa(width: float, weighting: str) -> float:
    """E c(t) t^2 / ((1-t)^2 width^2 + t^2)."""
    c = 1 - TIMES if weighting == "exponential" else (1 - TIMES) * TIMES / 2
    return (c * TIMES**2 / ((1 - TIMES) ** 2 * width**2 + TIMES**2)).mean().item()


# test 4, README 'What the distillation term does'
@pytest.mark.parametrize("weighting", ["exponential", "sds"])
@pytest.mark.parametrize("width", [0.3, 1.0])
def test_the_teacher_pulls_every_sample_to_its_mean(width, weighting):
    """dL/da = 2 kappa a and dL/dshift = 2 kappa (shift - mean) for every a.

    So a student shrinks to a = 0, and not to the teacher's width.
    """
    for a in (0.1, width, 2.0):
        leaf, shift = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (a, 0.7))
        slopes = torch.autograd.grad(
            distillation(leaf, width, weighting, mean=0.2, shift=shift), (leaf, shift)
        )
        assert slopes[0].item() == pytest.approx(2 * kappa(width, weighting) * a, rel=1e-6)
        assert slopes[1].item() == pytest.approx(
            2 * kappa(width, weighting) * (0.7 - 0.2), rel=1e-6
        )
        # Planted: a loss with its optimum at the teacher would change sign at a = width
        assert slopes[0] > 0
    # the README's numbers
    assert kappa(1.0, "exponential") == pytest.approx(math.pi / 8 - 1 / 4, rel=1e-6)
    assert kappa(1.0, "sds") == pytest.approx(1 / 24, rel=1e-6)


def test_distillation_alone_collapses():  # test 4
    a = torch.tensor(1.3, dtype=torch.float64)
    for _ in range(40):
        leaf = a.clone().requires_grad_()
        (slope,) = torch.autograd.grad(distillation(leaf, 1.0, "exponential"), leaf)
        a = a - slope
    assert 0 <= a < 0.01


class Quadratic(nn.Module):
    """D(x) = w |x|^2."""

    def __init__(self, w: float):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w, dtype=torch.float64))

    def forward(self, x: Tensor, labels: Tensor | None) -> Tensor:
        return self.w * x.square().sum(1)


def slopes(
    a: float, w: float, gamma: float, weight: float, width: float, heads: int = 1, d: int = 1
) -> tuple[float, float]:
    """d/da of the student's loss and d/dw of the first head's, of equal quadratic heads, in R^d."""
    scale, judges = (
        torch.tensor(a, dtype=torch.float64, requires_grad=True),
        [Quadratic(w) for _ in range(heads)],
    )
    z = Z[:, None].expand(4, d)
    fake, real = scale * z, (width * z).requires_grad_()
    student = method.generator_loss([head(fake, None) for head in judges]) + weight * distillation(
        scale, width, "exponential"
    )
    d_real, d_fake = ([head(x, None) for head in judges] for x in (real, fake.detach()))
    loss = method.discriminator_loss(d_real, d_fake) + gamma * method.penalty(
        d_real, [real] * heads
    )
    return torch.autograd.grad(student, scale)[0].item(), torch.autograd.grad(loss, judges[0].w)[
        0
    ].item()


# README 'What the distillation term does'
@pytest.mark.parametrize("heads,d", [(1, 1), (1, 4), (3, 2)])
@pytest.mark.parametrize("width", [0.5, 1.0])
def test_the_width_that_both_losses_settle_at(width, heads, d):
    """Inside the hinge's margins w = lambda kappa / (K d), a^2 = width^2 (1 - 8 gamma w)."""
    weight, gamma, k = 0.3, 1.0, kappa(width, "exponential")
    w = weight * k / (heads * d)
    a = width * math.sqrt(1 - 8 * gamma * w)

    def at(a, w, gamma, weight):
        return slopes(a, w, gamma, weight, width, heads, d)

    assert max(map(abs, at(a, w, gamma, weight))) < 1e-6
    assert a < 0.98 * width  # no small matter
    pulled, blind = at(width, 0.0, gamma, weight)
    # at the data's width the heads see no difference; the teacher still pulls inwards
    assert pulled > 0.01 and abs(blind) < 1e-12
    # the adversarial loss alone rests there
    assert max(map(abs, at(width, 0.0, gamma, 0.0))) < 1e-12
    for planted in ((a, w, 2 * gamma, weight), (a, w, gamma, 2 * weight), (a, -w, gamma, weight)):
        assert max(map(abs, at(*planted))) > 0.01


# The adversarial losses (Eqs. 2, 3)


def test_losses_are_summed_over_heads():  # test 3
    zero, some = torch.zeros(4, 2), torch.full((4, 2), 0.3)
    assert method.discriminator_loss([zero] * 5, [zero] * 5) == 10 and method.generator_loss(
        [some] * 5
    ).item() == pytest.approx(-1.5)
    assert method.discriminator_loss([zero + 1] * 5, [zero - 1] * 5) == 0
    # Planted: real and generated exchanged
    assert method.discriminator_loss([zero - 1] * 5, [zero + 1] * 5) == 20


def student_samples(m, data: Batch) -> Tensor:
    """x_hat of the first step, s = 1, from the weights as they are."""
    e = step().rng("e").normal(data.size, *SHAPE)
    return m.denoise(m.net, data.cond.labels)(e, torch.ones(data.size)).detach()


def mean_logit(m, x: Tensor, labels: Tensor) -> float:
    return sum(d.mean().item() for d in m.judge(m.features(x), labels))


def test_each_player_moves_the_logits_its_way():  # test 3
    data = batch()
    for which in ("student", "discriminator"):
        m, _ = made(distillation=0.0, r1=0.0, student={"lr": 1e-3}, discriminator={"lr": 1e-3})
        x = student_samples(m, data)

        def logit(images, m=m):
            return mean_logit(m, images, data.cond.labels)

        fake, real = logit(x), logit(data.x)
        rests = m.discriminator if which == "student" else m.student
        rests.update = lambda loss: None
        m.train_step(data, step())
        if which == "student":  # planted sign: the plus of a loss written as mean D would lower it
            assert logit(student_samples(m, data)) > fake + 1e-3
        else:
            assert logit(x) < fake - 1e-3 and logit(data.x) > real + 1e-3


def test_r1_is_taken_in_what_each_head_is_given(monkeypatch):  # test 6
    m, _ = made(pixel=True)
    calls = captured(monkeypatch, method, "penalty")
    data = batch()
    pixels = data.x.clone().requires_grad_()
    given = [f.detach().requires_grad_() for f in m.features(data.x)]
    own = [
        torch.autograd.grad(d.sum(), f)[0] for d, f in zip(m.judge(given, data.cond.labels), given)
    ]
    expected = sum(g.square().flatten(1).sum(1).mean() for g in own)
    below = [
        torch.autograd.grad(d.sum(), pixels, retain_graph=True)[0]
        for d in m.judge(m.features(pixels), data.cond.labels)
    ]
    in_pixels = sum(g.square().flatten(1).sum(1).mean() for g in below)
    m.discriminator.update = lambda loss: None
    logged = m.train_step(data, step())
    torch.testing.assert_close(calls[0][1], expected)
    assert logged["r1"] == calls[0][1] and not data.x.requires_grad
    assert abs(in_pixels - expected) > 0.1 * expected  # planted
    # heads that ignore their input
    silent = [0 * d + 1.0 for d in m.judge(given, data.cond.labels)]
    assert method.penalty(silent, given) == 0


@pytest.mark.parametrize("gamma", [0.0, 0.5])
def test_losses_add_up(monkeypatch, gamma):  # Eqs. 1, 3
    m, _ = made(r1=gamma, distillation=2.5)
    losses = []
    for player in (m.student, m.discriminator):
        original = player.update
        player.update = lambda loss, original=original: losses.append(loss.item()) or original(loss)
    logged = {k: v.item() for k, v in m.train_step(batch(), step()).items()}
    assert losses[0] == pytest.approx(logged["generator"] + 2.5 * logged["distillation"], rel=1e-5)
    assert losses[1] == pytest.approx(
        logged["discriminator"] + gamma * logged.get("r1", 0.0), rel=1e-5
    )
    # Planted: lambda 1 would show
    assert ("r1" in logged) == (gamma > 0) and logged["distillation"] > 0.01


# Student, teacher and their times


def test_the_teacher_sees_the_noised_sample_and_nothing_else(monkeypatch):  # test 5
    n = 4096
    m, task = made(batch=n, levels=[0.25] * 4)
    asked, made_of, calls = (
        inputs(task.teacher.network),
        inputs(m.net),
        captured(monkeypatch, method, "distillation_loss"),
    )
    data = batch(n=n)
    m.train_step(data, step())
    assert len(asked) == len(made_of) == 1
    (x_t, t, labels), (x_s, s, _) = asked[0], made_of[0]
    (x, _, seen, t_again, _), _ = calls[0]
    assert (
        torch.equal(x_t, seen) and torch.equal(t, t_again) and torch.equal(labels, data.cond.labels)
    )
    assert x.requires_grad and not x_t.requires_grad  # with stop-gradient
    again = step()
    torch.testing.assert_close(
        x_t,
        paths.noised(
            x.detach(), again.rng("teacher e").normal(n, *SHAPE), again.rng("t").uniform(n)
        ),
    )
    # Planted: the student's noise
    assert not torch.allclose(
        x_t, paths.noised(x.detach(), again.rng("e").normal(n, *SHAPE), t), atol=0.1
    )
    # Planted: the teacher on the student's own input
    assert not torch.allclose(x_t, x_s, atol=0.1) and not torch.equal(t, s)
    assert (
        t.min() < 0.01 and t.max() > 0.99 and abs(torch.corrcoef(torch.stack([t, s]))[0, 1]) < 0.06
    )
    e, e_t = (
        (state - paths.noised(clean, 0 * clean, time)).flatten()
        for state, time, clean in ((x_s, s, data.x), (x_t, t, x.detach()))
    )
    assert abs(torch.corrcoef(torch.stack([e, e_t]))[0, 1]) < 0.02


def test_the_student_denoises_noised_data():  # section 3.1; (i)
    m, _ = made(levels=[0.25] * 4)
    seen, data, again = inputs(m.net), batch(), step()
    m.train_step(data, step())
    x_s, s, labels = seen[0]
    assert torch.equal(s, method.draw_level(again.rng("s"), N, (0.25,) * 4)) and torch.equal(
        labels, data.cond.labels
    )
    torch.testing.assert_close(x_s, paths.noised(data.x, again.rng("e").normal(N, *SHAPE), s))
    x = m.denoise(m.net, labels)(x_s, s)
    torch.testing.assert_close(x, x_s - s[:, None, None, None] * m.net(x_s, s, labels))
    assert not torch.allclose(x, x_s - m.net(x_s, s, labels), atol=1e-2)  # planted: as if s were 1


def test_at_the_first_level_the_input_is_pure_noise():  # test 7
    seen = []
    for shift in (0.0, 1.0):
        m, _ = made()
        arguments, data = inputs(m.net), batch()
        m.train_step(Batch(N, data.cond, data.x + shift), step())
        seen.append(arguments[0])
    (x_s, s, _), (other, _, _) = seen
    assert torch.equal(x_s, other) and (s == 1).all()  # whatever the data are
    torch.testing.assert_close(x_s, step().rng("e").normal(N, *SHAPE))
    assert paths.denoiser(x_s, torch.randn_like(x_s), s).isfinite().all()
    # A student of noise has no image there: the factor 1/(1-s).
    assert not paths.velocity_of_noise(x_s, torch.randn_like(x_s), s).isfinite().any()


def test_law_of_the_levels():
    law, n = (0.7, 0.1, 0.0, 0.2), 100_000
    s = method.draw_level(Rng(0, "s"), n, law)
    shares = [(s == level).float().mean().item() for level in (1.0, 0.75, 0.5, 0.25)]
    assert (
        shares == pytest.approx(law, abs=0.01)
        and sum(shares) == pytest.approx(1, abs=1e-6)
        and s.dtype == torch.float32
    )
    assert shares[::-1] != pytest.approx(law, abs=0.1)  # planted: the probabilities in rising order
    assert (method.draw_level(Rng(0, "s"), 100, (1.0,)) == 1).all()
    for wrong in ((0.5, 0.4), (1.5, -0.5)):
        with pytest.raises(ValidationError, match="probabilities"):
            made(levels=wrong)


@pytest.mark.parametrize(
    "law,nfe", [((1.0,), (1,)), ((0.25,) * 4, (1, 2, 4)), ((0.2, 0.3, 0.5), (1, 3))]
)
def test_samplers_visit_trained_levels_only(law, nfe):
    m, _ = made(levels=law, student={"lr": 1e-2, "half_lives": {"evaluation": 0.5}})
    m.student.total_updates = 10
    for i in range(2):
        m.train_step(batch(), step(i))
    needs = ADD.needs(m.config)
    assert (
        needs.nfe == nfe
        and needs.headline_nfe == 1
        and needs.data
        and needs.teacher
        and needs.pairs is None
    )
    trained = {1 - i / len(law) for i in range(len(law))}
    z, labels = torch.randn(5, *SHAPE), torch.arange(5) % 3
    net = m.student.averaged()
    for k in nfe:
        seen = inputs(net)
        x = m.sample(z, Condition(labels), k, Rng(0, "sample"))
        levels = [s[0].item() for _, s, _ in seen]
        assert levels == pytest.approx([1 - i / k for i in range(k)])
        assert all(min(abs(s - level) for level in trained) < 1e-6 for s in levels)
        again, rng, t = z, Rng(0, "sample"), 1.0
        for i in range(k):
            again = again - t * net(again, torch.full((5,), t), labels)
            if i + 1 < k:
                t = 1 - (i + 1) / k
                again = (1 - t) * again + t * rng.normal(5, *SHAPE)
        torch.testing.assert_close(x, again)
    # not the average
    assert not torch.allclose(
        m.sample(z, Condition(labels), 1, None), z - m.net(z, torch.ones(5), labels), atol=1e-4
    )


# One step


CALLS = {
    "student": 1,
    "student.backward": 1,
    "teacher": 1,
    "features": 2,
    "discriminator.backward": 1,
}
HEADS = {"discriminator": 3, "discriminator.1": 3, "discriminator.2": 3}
CASES = [
    ({}, CALLS | HEADS),
    ({"pixel": True, "kernel": 1}, CALLS | HEADS | {"discriminator.3": 3}),
    ({"r1": 0.0, "levels": [0.25] * 4}, CALLS | HEADS),
    ({"distillation": 0.0}, {k: v for k, v in (CALLS | HEADS).items() if k != "teacher"}),
    ({"adversarial": False}, {"student": 1, "student.backward": 1, "teacher": 1}),
]


@pytest.mark.parametrize("changes,calls", CASES)
def test_no_evaluation_more_than_the_algorithm_needs(changes, calls):
    m, task = made(**changes)
    assert ADD.needs(m.config).cycle == 1
    with task.meter.counting():
        logged = m.train_step(batch(), step())
    assert dict(task.meter.calls) == calls
    assert all(
        task.meter.rows[role] == n * N
        for role, n in calls.items()
        if not role.endswith(".backward")
    )
    assert all(torch.isfinite(v).all() for v in logged.values())


def test_r1_costs_no_evaluation_of_the_features():
    """R1 differentiates in their output, which carries a graph; no gradient is taken below it."""
    flops = []
    for gamma in (0.0, 0.5):
        m, task = made(pixel=True, r1=gamma)
        with task.meter.measured():
            m.train_step(batch(), step())
        flops.append(task.meter.flops)
    # of one product with the hidden layers' weights
    heads = N * 2 * m.config.hidden * sum(f.shape[1] for f in m.features(batch().x))
    # Planted: down to pixels, another pass through the features would come on top
    assert 0 < flops[1] - flops[0] < 5 * heads
    with task.meter.measured():
        before = task.meter.flops
        task.features(batch().x)
    assert flops[1] - flops[0] + task.meter.flops - before > 5 * heads


def test_each_update_moves_its_own_player_only():
    m, task = made()
    frozen, order = weights(task.teacher.network, task.features), []

    def watched(player, own: list, other: list) -> None:
        original = player.update

        def update(loss: Tensor) -> None:
            before = weights(*own), weights(*other)
            original(loss)
            assert not torch.equal(weights(*own), before[0]) and torch.equal(
                weights(*other), before[1]
            )
            order.append(player.name)

        player.update = update

    watched(m.student, [m.net], m.heads)
    watched(m.discriminator, m.heads, [m.net])
    m.train_step(batch(), step())
    assert order == ["student", "discriminator"] and torch.equal(
        weights(task.teacher.network, task.features), frozen
    )
    assert all(
        p.grad is None
        for net in (m.net, *m.heads, task.teacher.network, task.features)
        for p in net.parameters()
    )


def test_gradients_pass_through_the_features_to_the_student_and_no_further(monkeypatch):
    m, task = made()
    generator, discriminator = (
        captured(monkeypatch, method, name) for name in ("generator_loss", "discriminator_loss")
    )
    original = m.student.update

    def update(loss: Tensor) -> None:
        adversarial = generator[0][1]
        reached = torch.autograd.grad(
            adversarial, list(m.net.parameters()), retain_graph=True, allow_unused=True
        )
        assert sum(g.abs().sum() for g in reached if g is not None) > 0
        assert not any(p.requires_grad for p in task.features.parameters())
        original(loss)

    m.student.update = update
    m.discriminator.update = lambda loss: None
    m.train_step(batch(), step())
    value = discriminator[0][1]
    assert all(
        g is None
        for g in torch.autograd.grad(
            value, list(m.net.parameters()), retain_graph=True, allow_unused=True
        )
    )
    assert any(
        g is not None
        for g in torch.autograd.grad(value, list(m.heads[0].parameters()), allow_unused=True)
    )
    with torch.no_grad():  # planted: features under no_grad lose the student
        lost = m.features(torch.randn(N, *SHAPE))
    assert not any(f.requires_grad for f in lost)


@pytest.mark.parametrize("kernel", [None, 1])
def test_both_players_use_the_same_samples_in_calls_of_their_own(monkeypatch, kernel):  # test 8
    m, task = made(kernel=kernel)
    seen, judged, data = inputs(task.features), inputs(m.heads[0]), batch()
    x = student_samples(m, data)
    expected = [m.features(x)[0], m.features(x)[0], m.features(data.x)[0]]
    del seen[:]
    m.train_step(data, step())
    assert len(seen) == 2 and len(judged) == 3
    torch.testing.assert_close(seen[0][0].detach(), x)  # as they were before the update
    torch.testing.assert_close(seen[1][0].detach(), data.x)
    fake, real, fake_again = (f.detach() for f, _ in judged)
    for found, wanted in zip((fake, fake_again, real), expected):
        torch.testing.assert_close(found, wanted)
    assert all(torch.equal(labels, data.cond.labels) for _, labels in judged)
    assert judged[0][0].requires_grad and not judged[2][0].requires_grad  # detached for the heads
    # Planted: samples of the updated student
    assert not torch.allclose(student_samples(m, data), x, atol=1e-3)


def test_guidance_reaches_the_teacher_and_not_the_heads():
    one, three = (made()[0].train_step(batch(w), step()) for w in (1.0, 3.0))
    assert (
        one["generator"] == three["generator"]
        and abs(one["distillation"] - three["distillation"]) > 1e-3
    )


def test_heads_of_tokens_carry_state_and_learn_on_points():
    """On mixtures: no classes, features of points, a head on the point itself."""
    torch.manual_seed(0)
    net = VelocityMLP((2,), 0, 16, 2)
    frozen = features.untrained((2,)).requires_grad_(False)
    task = Task(
        (2,),
        0,
        partial(VelocityMLP, (2,), 0, width=16, depth=2),
        Teacher(net, 0),
        net.state_dict(),
        0,
        torch.device("cpu"),
        Meter(),
        frozen,
    )
    m = ADD(
        task,
        ADD.Config.model_validate(
            SETTINGS | {"kernel": 1, "pixel": True, "discriminator": {"lr": 1e-2}}
        ),
    )
    x = torch.randn(N, 2)
    assert [f.shape for f in m.features(x)] == [(N, 1, 64)] * 3 + [(N, 1, 2)] and torch.equal(
        m.features(x)[3][:, 0], x
    )
    before = {k: v.clone() for k, v in m.discriminator.state_dict().items()}
    logged = m.train_step(Batch(N, Condition(None), x), step())
    moved = {
        k
        for k, v in m.discriminator.state_dict().items()
        if k in before and not torch.equal(v, before[k])
    }
    assert any(k.endswith("._u") for k in moved) and all(torch.isfinite(v) for v in logged.values())
    assert m.sample(torch.randn(5, 2), Condition(None), 1, None).shape == (5, 2)


# Variants, as the file names them

FILE = reading.read(ROOT / "methods/add/config.yaml", MethodFile)


CHECKS: dict[str, Callable[..., None]] = {}


def checks(name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Marks the check of a variant, which is given the method, its task and what a step logged."""

    def kept(check: Callable[..., None]) -> Callable[..., None]:
        CHECKS[name] = check
        return check

    return kept


@pytest.mark.parametrize("name", FILE.variants)
def test_a_variant_differs_from_the_default_and_does_what_it_says(name: str):
    own = FILE.variants[name].config
    assert own and all(FILE.config[key] != value for key, value in own.items())
    m, task = made(**own)
    CHECKS[name](m, task, m.train_step(batch(), step()))


def test_every_check_is_of_a_variant():
    assert set(CHECKS) == set(FILE.variants)


@checks("adv-only")
def adv_only(m, _task, logged):
    assert set(logged) == {"generator", "discriminator", "r1"} and ADD.needs(m.config).teacher
    other, _ = made(distillation=0.3)
    other.train_step(batch(), step())
    assert not torch.allclose(weights(m.net), weights(other.net), atol=1e-3)


@checks("distill-only")
def distill_only(m, task, logged):
    assert set(logged) == {"distillation"} and set(task.players) == {"student"}
    # so their training is not charged
    assert ADD.needs(m.config).features is None and task.features is None


@checks("random-init")
def random_init(_m, task, _logged):
    x, t, labels = torch.randn(4, *SHAPE), torch.rand(4), torch.arange(4) % 3
    own, teacher = (
        made(**FILE.variants["random-init"].config)[0].net(x, t, labels),
        task.teacher.velocity(x, t, Condition(labels)),
    )
    assert not torch.allclose(own, teacher, atol=1e-2)
    # the default starts as the teacher
    torch.testing.assert_close(made()[0].net(x, t, labels), teacher)


@checks("sds")
def sds(_m, _task, logged):
    base = made()[0].train_step(batch(), step())
    assert (
        logged["generator"] == base["generator"]
        and abs(logged["distillation"] - base["distillation"]) > 0.01
    )


@checks("random-features")
def random_features(m, _task, _logged):
    assert ADD.needs(m.config).features == "random"
    assert (
        ADD.needs(made(features="self_supervised")[0].config).features
        == "self_supervised"
        == FILE.config["features"]
    )


@checks("unconditional-heads")
def unconditional_heads(m, _task, _logged):  # ADD-4
    conditional, (x, labels) = made()[0], (torch.randn(N, *SHAPE), torch.arange(N) % 3)
    for model, differ in ((m, False), (conditional, True)):
        a, b = (model.judge(model.features(x), own) for own in (labels, (labels + 1) % 3))
        assert all(torch.allclose(one, other, atol=1e-4) != differ for one, other in zip(a, b))


@checks("four-level")
def four_level(m, _task, _logged):
    seen = inputs(m.net)
    m.train_step(batch(), step(1))
    assert set(seen[0][1].tolist()) == {1.0, 0.75, 0.5, 0.25} and ADD.needs(m.config).nfe == (
        1,
        2,
        4,
    )
