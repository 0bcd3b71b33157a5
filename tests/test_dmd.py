"""DMD against its paper: specs/dmd.md (sections (b), (h), (i) and the tests numbered there)."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from distillbench import paths
from distillbench.method import Batch, Condition, Step
from distillbench.networks.mlp import VelocityMLP
from distillbench.registry import folders
from tests.conftest import captured
from tests.toys import random_task, shake, watch_updates, weights

FOLDER = Path(__file__).parents[1] / "methods/dmd"
DMD = folders.load(SimpleNamespace(name="dmd", path=FOLDER))
method = sys.modules[DMD.__module__]
SHAPE, N, PAIRS = (1, 4, 4), 16, 6


def made(**changes) -> tuple:
    """DMD with a random teacher; `critic_differs` moves the critic off it, where it starts."""
    task = random_task(SHAPE)
    settings = {
        "batch": N,
        "weighting": "residual",
        "time_low": 0.02,
        "time_high": 0.98,
        "regression": 0.25,
        "pairs": 32,
        "pair_heun_steps": 4,
        "pair_batch": PAIRS,
        "student": {"lr": 1e-2},
        "critic": {"lr": 1e-2},
    }
    critic_differs = changes.pop("critic_differs", True)
    m = DMD(task, DMD.Config.model_validate(settings | changes))
    if critic_differs:
        shake(m.fake)
    return m, task


def batch(w: float = 1.0, pairs: bool = True, n: int = N) -> Batch:
    g = torch.Generator().manual_seed(5)
    z, y = torch.randn(2, PAIRS, *SHAPE, generator=g)
    own = Condition((torch.arange(PAIRS) + 1) % 3, w)
    return Batch(n, Condition(torch.arange(n) % 3, w), None, (z, y, own) if pairs else None)


def step() -> Step:
    return Step(0, 10, 0, torch.device("cpu"))


def test_the_generator_is_the_denoised_image_at_the_end():  # (i): G(z) = z - v(z, 1)
    m, _ = made()
    z, labels = torch.randn(8, *SHAPE), torch.arange(8) % 3
    x = m.generate(m.net, z, labels)
    v = m.net(z, torch.ones(8), labels)
    torch.testing.assert_close(x, z - v)
    for planted in (z + v, -v, z - m.net(z, torch.zeros(8), labels)):  # sign, no input, time 0
        assert not torch.allclose(x, planted, atol=1e-2)
    torch.testing.assert_close(m.sample(z, Condition(labels), 1, None), x)


@pytest.mark.parametrize("w", [1.0, 3.0])
def test_gradient_of_the_matching_term(monkeypatch, w):  # Algorithm 2; tests 1, 4, 5, 7
    m, task = made(regression=0.0)
    calls, net, fake = captured(monkeypatch, method, "pseudo_loss"), weights(m.net), weights(m.fake)
    gradients, original = [], m.student.update

    def update(loss: Tensor) -> None:
        (x, _), matching = calls[0]
        gradients.extend(torch.autograd.grad(matching, x, retain_graph=True))
        original(loss)

    m.student.update = update
    critic = VelocityMLP(SHAPE, 3, 16, 2)
    critic.load_state_dict(m.fake.state_dict())
    data = batch(w, pairs=False)
    m.train_step(data, step())
    assert not torch.equal(weights(m.net), net) and not torch.equal(weights(m.fake), fake)

    again, labels = step(), data.cond.labels
    again.rng("z").normal(N, *SHAPE)
    t, e, x = (
        0.02 + 0.96 * again.rng("t").uniform(N),
        again.rng("e").normal(N, *SHAPE),
        calls[0][0][0].detach(),
    )
    x_t = paths.noised(x, e, t)
    x0_f = paths.denoiser(x_t, critic(x_t, t, labels), t)

    def g(weight: float, real: float = w, clean: Tensor = x) -> Tensor:
        """(x0_f - x0_r) / mean |clean - x0_w|, detached, over the number of elements.

        x0_r has the guidance `real`, x0_w the guidance `weight`.
        """
        x0_r, x0_w = (
            paths.denoiser(x_t, task.teacher.velocity(x_t, t, Condition(labels, guidance)), t)
            for guidance in (real, weight)
        )
        return (
            (x0_f - x0_r) / (clean - x0_w).abs().mean((1, 2, 3), keepdim=True)
        ).detach() / x.numel()

    torch.testing.assert_close(gradients[0], g(w), rtol=1e-3, atol=1e-6)
    # sign, sum, noisy x, Eq. 8
    planted = [
        -g(w),
        g(w) * x.numel(),
        g(w, clean=x_t),
        g(w) * (1 - t)[:, None, None, None],
    ]
    planted += [g(1.0), g(w, real=1.0)] if w != 1 else []  # unguided normaliser, unguided teacher
    assert not any(torch.allclose(gradients[0], wrong, rtol=1e-2, atol=1e-5) for wrong in planted)


def test_each_update_moves_its_own_player_only():  # test 1; Algorithm 1: the generator first
    m, task = made()
    teacher, order = weights(task.teacher.network), watch_updates(m)
    m.train_step(batch(), step())
    assert order == ["student", "critic"] and torch.equal(weights(task.teacher.network), teacher)
    assert all(
        p.grad is None for net in (m.net, m.fake, task.teacher.network) for p in net.parameters()
    )


def test_no_gradient_reaches_the_generator_from_the_critic_loss():  # (b) 2: x is detached
    x, e, v = (torch.randn(8, 3, requires_grad=True) for _ in range(3))
    loss = method.critic_loss(v, x, e.detach())
    assert torch.autograd.grad(loss, x, allow_unused=True)[0] is None
    (planted,) = torch.autograd.grad((v - (e - x)).square().mean(), x)
    assert planted.abs().max() > 0
    torch.testing.assert_close(loss, (v - (e - x)).square().mean())


def test_a_critic_that_equals_the_teacher_is_stationary():  # test 2: the student starts there
    m, _ = made(regression=0.0, critic_differs=False)
    before = weights(m.net)
    assert m.train_step(batch(pairs=False), step())["matching_gradient"] == 0
    assert torch.equal(weights(m.net), before)
    m, _ = made(regression=0.0, critic_differs=False)
    # Planted: real and fake differ
    assert m.train_step(batch(3.0, pairs=False), step())["matching_gradient"] > 0.01


# (b) 2, (i): regression onto e - sg(x)
def test_the_critics_minimiser_is_the_velocity_of_the_samples():
    n, mean, std = 200_000, 0.8, 0.5
    x, e = (
        mean + std * torch.randn(n, 1, dtype=torch.float64),
        torch.randn(n, 1, dtype=torch.float64),
    )
    t = torch.rand(n, dtype=torch.float64)
    x_t, tt = paths.noised(x, e, t), t[:, None]
    variance = (1 - tt) ** 2 * std**2 + tt**2
    exact = (tt - (1 - tt) * std**2) / variance * (x_t - (1 - tt) * mean) - mean

    def z_score(v: Tensor, target: Tensor) -> float:
        """Largest slope of the loss along v, x_t, t and 1, in standard errors of its estimate."""
        v = v.clone().requires_grad_()
        (slope,) = torch.autograd.grad(method.critic_loss(v, *target), v)
        directions = [slope * d for d in (exact, x_t, tt, torch.ones_like(v))]
        return max(float(d.mean().abs() / d.std() * n**0.5) for d in directions)

    assert z_score(exact, (x, e)) < 4
    # Planted: x - e; another velocity
    assert z_score(exact, (e, x)) > 20 and z_score(0.9 * exact, (x, e)) > 20


def test_guidance_reaches_the_teacher_and_not_the_critic():  # (c), test 7
    logged = []
    for w in (1.0, 3.0):
        m, _ = made(regression=0.0)
        logged.append(m.train_step(batch(w, pairs=False), step()))
    assert logged[0]["critic"] == logged[1]["critic"]
    assert abs(logged[0]["matching_gradient"] - logged[1]["matching_gradient"]) > 1e-3


# (b) 3: L_reg on pairs, L_KL on fresh samples
def test_regression_has_its_own_batch_and_weight(
    monkeypatch,
):
    m, _ = made(regression=0.25)
    matching, regression, losses = (
        captured(monkeypatch, method, "pseudo_loss"),
        captured(monkeypatch, method, "regression_loss"),
        [],
    )
    original = m.student.update
    m.student.update = lambda loss: losses.append(loss.item()) or original(loss)
    data = batch()
    z, y, own = data.pairs
    expected = m.generate(m.net, z, own.labels).detach()
    crossed = m.generate(m.net, z, data.cond.labels[:PAIRS]).detach()
    m.train_step(data, step())
    (x, target), value = regression[0]
    assert torch.equal(target, y)
    torch.testing.assert_close(x.detach(), expected)
    assert not torch.allclose(x, crossed, atol=1e-3)  # planted: labels of the other batch
    assert len(matching[0][0][0]) == N and len(x) == PAIRS
    assert not torch.allclose(matching[0][0][0][:PAIRS], x, atol=1e-3)  # planted: L_KL on the pairs
    assert losses[0] == pytest.approx((matching[0][1] + 0.25 * value).item(), rel=1e-6)
    torch.testing.assert_close(value, (expected - y).square().mean())


def test_without_regression_there_are_no_pairs(monkeypatch):
    m, _ = made(regression=0.0)
    calls = captured(monkeypatch, method, "regression_loss")
    assert DMD.needs(m.config).pairs is None and not DMD.needs(m.config).data
    m.train_step(batch(pairs=False), step())
    assert not calls
    needs = DMD.needs(made()[0].config)
    assert (
        (needs.pairs.count, needs.pairs.heun_steps, needs.pairs.batch) == (32, 4, PAIRS)
        and needs.nfe == (1,)
        and not needs.data
    )


# (h), test 6: the generator's t truncated, the critic's not; per sample; fresh
def test_times_and_noise_of_the_two_updates():
    n = 4096
    m, _ = made(batch=n, regression=0.0)
    seen = []
    m.fake.register_forward_hook(lambda _m, args, _o: seen.append(args[:2]))
    m.train_step(batch(pairs=False, n=n), step())
    (x_student, t_student), (x_critic, t_critic) = seen
    assert 0.02 <= t_student.min() < 0.025 and 0.975 < t_student.max() <= 0.98
    assert t_critic.min() < 0.005 and t_critic.max() > 0.995
    assert len(t_student.unique()) > 0.9 * n and len(t_critic.unique()) > 0.9 * n
    # Planted: one draw for both would be 1
    assert abs(torch.corrcoef(torch.stack([t_student, t_critic]))[0, 1]) < 0.06
    assert not torch.allclose(x_student, x_critic, atol=0.1)
