"""SiD against closed forms and the official code: specs/sid.md (test numbers in the comments)."""

import math
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from distillbench import config, reading, times
from distillbench.cells.build import build
from distillbench.cells.loop import train
from distillbench.cells.sampling import sample
from distillbench.cells.setup import attach, price
from distillbench.config import MethodFile
from distillbench.data.mixture import Mixture
from distillbench.matching import matching_gradient
from distillbench.meter import Meter
from distillbench.method import Batch, Condition, Step, Task, Teacher
from distillbench.networks.mlp import VelocityMLP
from distillbench.paths import denoiser, noised, over
from distillbench.registry import folders
from distillbench.seeds import Rng
from distillbench.teachers.exact import MixtureVelocity
from eval.metrics.mixtures import sliced_wasserstein
from tests.conftest import captured
from tests.test_meter import cell, quiet
from tests.toys import random_task, shake, watch_updates, weights

FOLDER = Path(__file__).parents[1] / "methods/sid"
SiD = folders.load(SimpleNamespace(name="sid", path=FOLDER))
method = sys.modules[SiD.__module__]
FILE = reading.read(FOLDER / "config.yaml", MethodFile)
SHAPE, N = (1, 4, 4), 16
SIDA = FILE.variants["sida"].config
PLAYERS = {"student": {"lr": 1e-2}, "critic": {"lr": 1e-2}}


def settings(**changes) -> dict:
    """Those of the method's own file, with small players and batches."""
    return FILE.config | PLAYERS | {"batch": N} | changes


def made(**changes) -> tuple:
    """SiD with a random teacher; `critic_differs` moves the critic off it, where it starts."""
    task = random_task(SHAPE, depth=3)
    critic_differs = changes.pop("critic_differs", True)
    m = SiD(task, SiD.Config.model_validate(settings(**changes)))
    if critic_differs:
        shake(m.fake)
    return m, task


def batch(w: float = 1.0, x: Tensor | None = None, n: int = N) -> Batch:
    """Labels of the generator's samples are those of the critic's, moved on by one."""
    labels = torch.arange(n) % 3
    return Batch(2 * n, Condition(torch.cat([labels, (labels + 1) % 3]), w), x)


def images(n: int = N) -> Tensor:
    return torch.randn(2 * n, *SHAPE, generator=torch.Generator().manual_seed(7))


def step(index: int = 0, total: int = 20) -> Step:
    return Step(index, total, 0, torch.device("cpu"))


def still(player) -> None:
    """A player that does not move."""
    player.update = lambda loss: None


# 1-D Gaussians: teacher N(0, 1), generator x = a z, t uniform.
# The loss is quadratic in (z, e): four points are exact.

Z, E = torch.tensor([[1.0, 1.0, -1.0, -1.0], [1.0, -1.0, 1.0, -1.0]], dtype=torch.float64)
MIDPOINTS = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
ZZ, EE, TT = (
    Z.repeat_interleave(4000)[:, None],
    E.repeat_interleave(4000)[:, None],
    MIDPOINTS.repeat(4),
)
ONE = torch.ones(1, 1, dtype=torch.float64)
ALPHAS = (-0.25, 0.0, 0.5, 1.0, 1.2, 1.5)


def velocity(x_t: Tensor, t: Tensor, mean: float | Tensor, std: float | Tensor) -> Tensor:
    """Of data N(mean, std^2)."""
    t = over(t, x_t)
    return (t - (1 - t) * std**2) / ((1 - t) ** 2 * std**2 + t**2) * (x_t - (1 - t) * mean) - mean


def parts(x: Tensor, critic: float) -> tuple[Tensor, Tensor, Tensor]:
    """delta, x and D_real for samples x and the optimal critic of N(0, critic^2)."""
    x_t = noised(x, EE, TT)
    v_real = velocity(x_t, TT, 0.0, 1.0)
    return (
        method.difference(velocity(x_t, TT, 0.0, critic), v_real, TT),
        x,
        denoiser(x_t, v_real, TT),
    )


def slope(loss, a: float) -> float:
    """d loss / da with the critic fixed at its optimum for a, through its input."""
    leaf = torch.tensor(a, dtype=torch.float64, requires_grad=True)
    return torch.autograd.grad(loss(*parts(leaf * ZZ, a)), leaf)[0].item()


def projected(alpha: float):
    return lambda delta, x, d_real: method.projected_loss(delta, x, d_real, ONE, alpha)


def naive(delta: Tensor, x: Tensor, d_real: Tensor) -> Tensor:
    return method.naive_loss(delta, ONE)


def fisher(a: float) -> float:
    """The objective itself: E|D_real - D_fake|^2 with the critic that belongs to a."""
    return naive(*parts(a * ZZ, a)).item()


@pytest.mark.parametrize("a", [0.2, 0.5, 0.9, 1.1, 2.0, 4.0])
def test_half_the_exact_gradient_at_alpha_one_half(a):  # test 3
    h = 1e-4
    exact = (fisher(a + h) - fisher(a - h)) / (2 * h)
    assert 2 * slope(projected(0.5), a) == pytest.approx(exact, rel=1e-6)
    for planted in (2 * slope(projected(0.0), a), 2 * slope(projected(1.0), a), slope(naive, a)):
        assert abs(planted / exact - 1) > 1e-2


def test_oracle_table_of_alpha():  # test 4, SID-2
    def table(a):
        return [slope(projected(alpha), a) for alpha in ALPHAS]

    assert table(0.2) == pytest.approx([-0.023, -0.038, -0.068, -0.098, -0.110, -0.128], abs=7e-4)
    assert table(4.0)[:5] == pytest.approx([1.67, 1.44, 0.96, 0.48, 0.29], abs=7e-3) and table(4.0)[
        5
    ] == pytest.approx(0.007, abs=5e-4)
    assert slope(projected(2.0), 4.0) < -0.1  # from too wide a generator a large alpha diverges
    swapped = [
        slope(lambda d, *rest, alpha=alpha: projected(alpha)(-d, *rest), 0.2) for alpha in ALPHAS
    ]
    # Planted: D_fake - D_real
    assert all(abs(s / found - 1) > 0.1 for s, found in zip(swapped, table(0.2)))


def test_only_the_projected_loss_turns_at_the_teacher():  # test 4, SID-1
    for a in (0.05, 0.2, 0.5, 0.9, 1.1, 2.0, 4.0):
        assert slope(naive, a) >= 0  # descent shrinks every generator
        for alpha in (-0.25, 0.0, 0.5, 0.75, 1.0, 1.2):
            assert slope(projected(alpha), a) * (a - 1) > 0
    # Stationary at the teacher, whatever alpha
    for alpha in (
        -0.25,
        0.0,
        0.5,
        0.75,
        1.0,
        1.2,
        1.5,
    ):
        assert abs(slope(projected(alpha), 1.0)) < 1e-12
    ends = []
    for loss in (naive, projected(1.0), projected(0.5)):
        a = 0.5
        for _ in range(300):
            a -= slope(loss, a)
        ends.append(a)
    assert (
        ends[0] < 0.1
        and ends[1] == pytest.approx(1, abs=1e-3)
        and ends[2] == pytest.approx(1, abs=2e-2)
    )


def test_gradient_is_linear_in_alpha():  # test 5: (1 - alpha) A + B / 2
    for a in (0.2, 0.9, 4.0):
        big_a = slope(naive, a)
        # D_fake = D_real - delta
        big_b = slope(lambda delta, x, d_real: 2 * (delta * (d_real - delta - x)).mean(), a)
        for alpha in (*ALPHAS, 0.75):
            assert slope(projected(alpha), a) == pytest.approx(
                (1 - alpha) * big_a + big_b / 2, rel=1e-9
            )
        wrong = (1 - 1.5) * big_a + big_b  # planted: B whole
        assert abs(slope(projected(1.5), a) / wrong - 1) > 1e-2


def test_identity_on_a_mixture():
    """A teacher of two modes (the suite's closed form), a generator N(m, a^2).

    The trapezoidal rule in z and e, midpoints in t.
    """
    mixture = Mixture(torch.tensor([[-1.0], [1.2]]), 0.5, torch.tensor([0.3, 0.7]), None, 0)
    teacher = MixtureVelocity(mixture).double()
    nodes = torch.linspace(-6, 6, 81, dtype=torch.float64)
    z, e, t = (
        v.flatten()
        for v in torch.meshgrid(
            nodes, nodes, (torch.arange(12, dtype=torch.float64) + 0.5) / 12, indexing="ij"
        )
    )
    mass = torch.exp(-(z**2 + e**2) / 2)
    w = (mass.mean() / mass)[:, None]  # 1/W is the row's weight
    z, e = z[:, None], e[:, None]

    def both(m: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = m + a * z
        x_t = noised(x, e, t)
        v_real = teacher(x_t, t)
        return (
            method.difference(velocity(x_t, t, m.detach(), a.detach()), v_real, t),
            x,
            denoiser(x_t, v_real, t),
        )

    for start in ((0.5, 0.3), (-0.4, 1.5)):
        leaves = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in start]
        gradient = torch.autograd.grad(method.projected_loss(*both(*leaves), w, 0.5), leaves)
        alone = torch.autograd.grad(method.naive_loss(both(*leaves)[0], w), leaves)
        for i in range(2):
            ends = []
            for h in (1e-4, -1e-4):
                moved = [leaf.detach() + h * (j == i) for j, leaf in enumerate(leaves)]
                ends.append(method.naive_loss(both(*moved)[0], w).item())
            exact = (ends[0] - ends[1]) / 2e-4
            assert 2 * gradient[i].item() == pytest.approx(exact, rel=1e-3)
            # Planted: the critic taken for a constant
            assert abs(alone[i].item() / exact - 1) > 0.05


def test_the_critics_error_is_orthogonal_to_every_function_of_the_noisy_sample():  # test 7
    n, a = 400_000, 0.6
    g = torch.Generator().manual_seed(0)
    x, e = (
        a * torch.randn(n, 1, dtype=torch.float64, generator=g),
        torch.randn(n, 1, dtype=torch.float64, generator=g),
    )
    t = torch.rand(n, dtype=torch.float64, generator=g)
    x_t = noised(x, e, t)
    for function in (x_t, x_t**3, torch.sin(3 * x_t) + over(t, x_t), (x_t > 0.2).double()):

        def z_score(critic: float, function: Tensor = function) -> float:
            product = function * (denoiser(x_t, velocity(x_t, t, 0.0, critic), t) - x)
            return float(product.mean().abs() / product.std() * n**0.5)

        assert z_score(a) < 4
    assert z_score(1.0) > 8  # planted: the teacher in the critic's place (last function)


# The loss in the paper's own variables.


def field(scale: float):
    """Some velocity field."""
    return lambda x_t, t: torch.sin(scale * x_t + over(t, x_t)) * (1 + scale * over(t, x_t))


def official(y: Tensor, n: Tensor, sigma: Tensor, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    """(b.3) with VE noise y + sigma n and denoisers f, mean over elements; then delta and W."""
    x_ve = y + over(sigma, y) * n

    def f(scale: float) -> Tensor:
        x_t, t = x_ve / over(1 + sigma, y), sigma / (1 + sigma)
        return x_t - over(t, y) * field(scale)(x_t, t)

    real, fake = f(0.7), f(1.3)
    w = (y - real).abs().mean((1, 2), keepdim=True).detach().clamp_min(1e-5)
    delta = real - fake
    return (delta * ((real - y) - alpha * delta) / w).mean(), delta, w


@pytest.mark.parametrize("alpha", [1.0, 1.2, -0.25])
def test_loss_in_velocities_is_the_loss_in_denoisers(alpha):  # (i)
    y = torch.randn(32, 3, 5, dtype=torch.float64, requires_grad=True)
    n, sigma = (
        torch.randn(32, 3, 5, dtype=torch.float64),
        torch.logspace(-2.7, 1.4, 32, dtype=torch.float64),
    )
    expected, delta, w = official(y, n, sigma, alpha)

    def ours(t: Tensor, swap: bool = False, clean: bool = True) -> Tensor:
        x_t = noised(y, n, t)
        v_real, v_fake = field(0.7)(x_t, t), field(1.3)(x_t, t)
        d = method.difference(*((v_real, v_fake) if swap else (v_fake, v_real)), t)
        real = denoiser(x_t, v_real, t)
        norm = method.normaliser(y if clean else x_t, real)
        if not swap and clean:
            torch.testing.assert_close(d, delta)
            torch.testing.assert_close(norm, w)
        return method.projected_loss(d, y, real, norm, alpha)

    t = sigma / (1 + sigma)
    torch.testing.assert_close(ours(t), expected, rtol=1e-9, atol=0)

    def gradient(loss):
        return torch.autograd.grad(loss, y, retain_graph=True)[0]

    torch.testing.assert_close(gradient(ours(t)), gradient(expected), rtol=1e-8, atol=1e-12)
    # delta's sign; x_t in W; alpha
    planted = (
        ours(t, swap=True),
        ours(t, clean=False),
        official(y, n, sigma, alpha + 0.2)[0],
    )
    for wrong in planted:
        assert not torch.allclose(gradient(wrong), gradient(expected), rtol=1e-2, atol=1e-6)


def test_normaliser():  # test 8: detached, one for each sample, of the clean sample, floored
    v, x, e = torch.randn(3, 8, 2, 3, dtype=torch.float64)
    t = torch.linspace(0.1, 0.9, 8, dtype=torch.float64)
    x.requires_grad_(True)
    x_t = noised(x, e, t)
    real = denoiser(x_t, v, t)
    w = method.normaliser(x, real)
    assert w.shape == (8, 1, 1) and not w.requires_grad
    torch.testing.assert_close(w[:, 0, 0], t * (v - (e - x)).abs().mean((1, 2)).detach())
    # Planted: the noisy sample
    assert not torch.allclose(w, method.normaliser(x_t, real), rtol=1e-2)
    assert (method.normaliser(torch.zeros(4, 3), 1e-7 * torch.randn(4, 3)) == 1e-5).all()
    assert method.normaliser(
        torch.zeros(4, 3), torch.full((4, 3), 1e-4)
    ).flatten().tolist() == pytest.approx([1e-4] * 4)
    t = torch.tensor([0.0, 1e-8, 0.5, 1.0])  # nothing is divided by t
    v, x, e = torch.randn(3, 4, 3)
    real = denoiser(noised(x, e, t), v, t)
    assert method.projected_loss(
        method.difference(-v, v, t), x, real, method.normaliser(x, real), 1.0
    ).isfinite()


# The generator's update.


def seen_by(monkeypatch, m) -> dict:
    """Runs a step; returns its loss's gradient in the samples x and what the loss was made of."""
    differences, losses, found = (
        captured(monkeypatch, method, "difference"),
        captured(monkeypatch, method, "projected_loss"),
        {},
    )
    original = m.student.update

    def update(loss: Tensor) -> None:
        (_, v_real, t), _ = differences[0]
        (delta, x, _, w, _), value = losses[0]
        (gradient,) = torch.autograd.grad(value, x, retain_graph=True)
        found.update(
            gradient=gradient,
            x=x,
            t=t,
            e=step().rng("e").normal(*x.shape),
            v_real=v_real,
            delta=delta,
            w=w,
            loss=value,
        )
        original(loss)

    m.student.update = update
    m.train_step(batch(), step())
    return found


# (b.3): through both networks' inputs, nothing stopped but W
@pytest.mark.parametrize("alpha", [1.0, 1.2])
def test_gradient_of_the_generator(monkeypatch, alpha):
    m, task = made(alpha=alpha)
    found = seen_by(monkeypatch, m)
    labels, t, e = batch().cond.labels[N:], 0.02 + 0.78 * step().rng("t").uniform(N), found["e"]
    torch.testing.assert_close(found["t"], t)

    def expected(stop: str = "", sign: float = 1.0) -> Tensor:
        x = found["x"].detach().requires_grad_(True)
        x_t = noised(x, e, t)
        real = denoiser(x_t, task.teacher.velocity(x_t, t, Condition(labels)), t)
        fake = denoiser(x_t, m.fake(x_t, t, labels), t)
        real, fake = (
            (real.detach() if "real" in stop else real),
            (fake.detach() if "fake" in stop else fake),
        )
        w = (x - real).abs().mean((1, 2, 3), keepdim=True)
        delta = real - fake
        loss = (
            sign * delta * (real - x - alpha * sign * delta) / (w if stop == "none" else w.detach())
        ).mean()
        return torch.autograd.grad(loss, x)[0]

    torch.testing.assert_close(found["gradient"], expected(), rtol=1e-3, atol=1e-7)
    for planted in (
        expected("real"),
        expected("fake"),
        expected("real fake"),
        expected("none"),
        expected(sign=-1.0),
    ):
        assert not torch.allclose(found["gradient"], planted, rtol=1e-2, atol=1e-6)


def test_detached_is_the_gradient_of_dmd(monkeypatch):  # test 2, SID-6
    both = {}
    for name in ("detached", "projected"):
        m, _ = made(loss=name)
        with monkeypatch.context() as patch:
            both[name] = seen_by(patch, m)
    d = both["detached"]
    torch.testing.assert_close(
        d["gradient"], -d["delta"] / d["w"] / d["delta"].numel(), rtol=1e-5, atol=1e-9
    )
    x_t, labels = noised(d["x"], d["e"], d["t"]).detach(), batch().cond.labels[N:]
    # the critic has moved once before the generator's turn: so must this one
    again = made(loss="detached")[0]
    again.train_step(batch(), step())
    v_fake = again.fake(x_t, d["t"], labels)
    dmd = (
        matching_gradient(d["v_real"], v_fake, d["x"], d["e"], d["t"], "residual") / d["x"].numel()
    )
    torch.testing.assert_close(d["gradient"], dmd, rtol=1e-4, atol=1e-8)
    # Planted: through the networks
    assert not torch.allclose(both["projected"]["gradient"], d["gradient"], rtol=0.1, atol=1e-5)
    assert not torch.allclose(-d["gradient"], dmd, rtol=0.1, atol=1e-5)
    # values do not tell them apart
    torch.testing.assert_close(both["projected"]["loss"], d["loss"])


def test_alpha_does_not_matter_where_nothing_flows_through_the_networks(monkeypatch):
    ends = []
    for loss in ("detached", "projected"):
        for alpha in (1.0, 0.5):
            m, _ = made(loss=loss, alpha=alpha)
            m.train_step(batch(), step())
            ends.append(weights(m.net))
    torch.testing.assert_close(ends[0], ends[1])
    assert not torch.allclose(ends[2], ends[3], atol=1e-4)


# test 1: the student starts there
def test_a_critic_that_equals_the_teacher_is_stationary(
    monkeypatch,
):
    for loss in ("projected", "naive", "detached"):
        # Planted: the teacher is guided, the critic never
        for w, moves in (
            (1.0, False),
            (3.0, True),
        ):
            m, _ = made(critic_differs=False, loss=loss)
            still(m.critic)
            before, values = weights(m.net), []
            original = m.student.update
            m.student.update = lambda loss, values=values, original=original: (
                values.append(loss.item()) or original(loss)
            )
            logged = m.train_step(batch(w), step())
            assert (logged["delta"] > 0.01) == moves and (abs(values[0]) > 1e-4) == moves
            assert torch.equal(weights(m.net), before) != moves
            if not moves:
                assert values == [0.0]


def test_each_update_moves_its_own_player_only():  # test 9; (c): the critic first
    m, task = made()
    teacher, order = weights(task.teacher.network), watch_updates(m)
    m.train_step(batch(), step())
    assert order == ["critic", "student"] and torch.equal(weights(task.teacher.network), teacher)
    assert all(
        p.grad is None for net in (m.net, m.fake, task.teacher.network) for p in net.parameters()
    )


def test_the_generators_update_computes_no_gradient_of_the_critics_weights():
    found = []
    for trained in (True, False):
        m, _ = made()
        still(m.critic)

        def update(loss: Tensor, m=m, trained=trained) -> None:
            for more in [[], m.critic.parameters][: 1 + trained]:
                with FlopCounterMode(display=False) as counter:
                    torch.autograd.grad(
                        loss, m.student.parameters + more, retain_graph=True, allow_unused=True
                    )
                found.append(counter.get_total_flops())

        m.student.update = update
        m.fake.requires_grad_(trained)
        m.train_step(batch(), step())
    assert found[0] == found[2] < found[1]  # planted: with them


def test_the_generator_sees_scaled_noise_and_no_data():  # (a), (i)
    for level, sigma in ((1.0, None), (5 / 7, 2.5)):
        m, _ = made(input_time=level)
        z, labels = torch.randn(8, *SHAPE), torch.arange(8) % 3
        seen = []
        handle = m.net.register_forward_hook(lambda _m, args, _o, seen=seen: seen.append(args))
        x = m.generate(m.net, z, labels)
        handle.remove()
        torch.testing.assert_close(seen[0][0], level * z)
        assert torch.allclose(seen[0][1], torch.full((8,), level))
        v = m.net(level * z, torch.full((8,), level), labels)
        torch.testing.assert_close(x, level * z - level * v)
        if sigma:  # G(sigma z, sigma) of a denoiser on VE inputs
            t = torch.full((8,), sigma / (1 + sigma))
            x_t = sigma * z / (1 + sigma)
            torch.testing.assert_close(x, denoiser(x_t, m.net(x_t, t, labels), t))
        for planted in (
            level * z + level * v,
            -level * v,
            z - m.net(z, torch.full((8,), 0.5), labels),
        ):
            assert not torch.allclose(x, planted, atol=1e-2)
        torch.testing.assert_close(m.sample(z, Condition(labels), 1, None), x)
    # sigma_init = 2.5, scaled
    for level, std in (
        (FILE.config["input_time"], 0.75),
        (FILE.benchmarks["gaussians"]["input_time"], 1.0),
    ):
        assert level == pytest.approx(2.5 * std / 0.5 / (1 + 2.5 * std / 0.5), abs=1e-3)


def test_fresh_noise_and_labels_for_each_update():  # (c)
    m, _ = made(loss="detached")
    asked = []
    for net in (m.net, m.fake):
        net.register_forward_hook(
            lambda _m, args, _o: asked.append((args, torch.is_grad_enabled()))
        )
    data = batch()
    m.train_step(data, step())
    (z, fake, z2, fake2) = (a for a, _ in asked)
    # detached: the critic's second evaluation keeps no graph
    assert [grad for _, grad in asked] == [
        False,
        True,
        True,
        False,
    ]
    for first, second in ((z, z2), (fake, fake2)):
        assert torch.equal(first[2], data.cond.labels[:N]) and torch.equal(
            second[2], data.cond.labels[N:]
        )
        assert not torch.allclose(first[0], second[0], atol=0.1)
    assert abs(torch.corrcoef(torch.stack([fake[1], fake2[1]]))[0, 1]) < 0.9


def test_guidance_reaches_the_teacher_and_not_the_critic():
    logged = []
    for w in (1.0, 3.0):
        m, _ = made()
        logged.append(m.train_step(batch(w), step()))
    assert (
        logged[0]["critic"] == logged[1]["critic"]
        and abs(logged[0]["delta"] - logged[1]["delta"]) > 1e-3
    )


# Noise levels and the critic.


def test_noise_levels_of_the_paper():  # test 6
    u = torch.tensor([0, 0.2, 0.4, 0.5, 0.6, 0.8, 1.0], dtype=torch.float64)
    sigma = method.karras(u)
    expected = torch.tensor([0.002, 0.085, 0.965, 2.515, 5.84, 24.41, 80.0], dtype=torch.float64)
    torch.testing.assert_close(sigma, expected, rtol=3e-3, atol=5e-4)
    t = torch.tensor([0.002, 0.078, 0.491, 0.716, 0.854, 0.961], dtype=torch.float64)
    torch.testing.assert_close((sigma / (1 + sigma))[:-1], t, rtol=0, atol=6e-4)
    assert method.karras(1 - u[-2:])[0] < 0.1  # planted: the other end of the grid


@pytest.mark.parametrize("std,highest", [(0.5, 0.961), (1.0, 0.980)])
def test_times_of_the_paper(std, highest):  # (b.2), (b.3), (i): in proportion to the data
    n = 20_000
    m, _ = made(law="edm", data_std=std)
    t = m.generator_times(Rng(0, "t"), n)
    assert t.max().item() == pytest.approx(highest, abs=5e-4) and t.min().item() == pytest.approx(
        0.002 * std / 0.5, abs=5e-4
    )
    median = method.karras(torch.tensor(0.4)).item() * std / 0.5
    assert t.median().item() == pytest.approx(median / (1 + median), abs=0.02)
    t, weight = m.critic_times(Rng(0, "t"), n)
    log_sigma = torch.logit(t.double())
    assert log_sigma.mean().item() == pytest.approx(-1.2 + math.log(std / 0.5), abs=0.03)
    assert log_sigma.std().item() == pytest.approx(1.2, abs=0.03)
    torch.testing.assert_close(weight, (1 - t) ** 2 + t**2 / std**2)


def test_times_of_a_step():
    n = 4096
    for law in ("uniform", "edm"):
        m, _ = made(batch=n, law=law)
        seen = []
        m.fake.register_forward_hook(lambda _m, args, _o, seen=seen: seen.append(args[1]))
        m.train_step(batch(n=n), step())
        critic, student = seen
        assert (
            all(len(t.unique()) > 0.9 * n for t in seen)
            and abs(torch.corrcoef(torch.stack(seen))[0, 1]) < 0.06
        )
        if law == "uniform":
            assert 0.02 <= student.min() < 0.025 and 0.795 < student.max() <= 0.8
            assert critic.min() < 0.005 and critic.max() > 0.995
        else:
            median = 1.5 * math.exp(-1.2)
            # Planted: one law
            assert (
                abs(critic.median() - median / (1 + median))
                < 0.02
                < 0.1
                < student.median() - critic.median()
            )
            assert 0.97 < student.max() < 0.9735 and critic.max() > 0.975


def test_critic_loss_is_edms_in_velocities(monkeypatch):  # (b.2); conventions.md test 9
    for std in (0.5, 0.75):
        x, e, v = torch.randn(3, 8, 2, 3, dtype=torch.float64)
        t = torch.linspace(0.05, 0.95, 8, dtype=torch.float64)
        sigma = t / (1 - t)
        clean = denoiser(noised(x, e, t), v, t)
        weight = (sigma**2 + std**2) / (sigma * std) ** 2
        expected = (over(weight, x) * (clean - x).square()).mean()
        torch.testing.assert_close(method.critic_loss(v, x, e, method.edm_weight(t, std)), expected)
        for planted in (
            method.edm_weight(1 - t, std),
            method.edm_weight(t, 1.5 * std),
            torch.ones_like(t),
        ):
            assert abs(method.critic_loss(v, x, e, planted) / expected - 1) > 1e-2
    x.requires_grad_(True)
    v.requires_grad_(True)
    loss = method.critic_loss(v, x, e, torch.ones_like(t))
    # the samples are constants
    assert torch.autograd.grad(loss, x, allow_unused=True, retain_graph=True)[0] is None
    torch.testing.assert_close(
        torch.autograd.grad(loss, v)[0], 2 * (v - (e - x)).detach() / x.numel()
    )


@pytest.mark.parametrize("law", ["uniform", "edm"])
def test_the_critics_minimiser_is_the_velocity_of_the_samples(law):
    n, mean, std = 200_000, 0.8, 0.5
    m, _ = made(law=law)
    x, e = (
        mean + std * torch.randn(n, 1, dtype=torch.float64),
        torch.randn(n, 1, dtype=torch.float64),
    )
    t, weight = (v.double() for v in m.critic_times(Rng(0, "t"), n))
    x_t, tt = noised(x, e, t), t[:, None]
    exact = velocity(x_t, t, mean, std)

    def z_score(v: Tensor, target: Tensor) -> float:
        """Largest slope of the loss along v, x_t, t and 1, in standard errors of its estimate."""
        v = v.clone().requires_grad_()
        (slope,) = torch.autograd.grad(method.critic_loss(v, *target, weight), v)
        directions = [slope * d for d in (exact, x_t, tt, torch.ones_like(v))]
        return max(float(d.mean().abs() / d.std() * n**0.5) for d in directions)

    assert z_score(exact, (x, e)) < 4
    # Planted: x - e; another velocity
    assert z_score(exact, (e, x)) > 20 and z_score(0.9 * exact, (x, e)) > 20


# Arms, cost, and the whole.


def after(steps: int = 3, **changes) -> Tensor:
    m, _ = made(**changes)
    for i in range(steps):
        m.train_step(batch(x=images()), step(i + 10))
    return weights(m.net)


def test_every_arm_is_another_update():
    found = {None: after()} | {
        name: after(**v.config)
        for name, v in FILE.variants.items()
        if name not in ("warmup", "sida")
    }
    names = list(found)
    for i, one in enumerate(names):
        assert not any(
            torch.allclose(found[one], found[other], atol=1e-4) for other in names[:i]
        ), one
    torch.testing.assert_close(after(), found[None])  # the same settings give the same weights
    # The two with phases: past them warmup is the default, and at the start neither moves.
    torch.testing.assert_close(after(**FILE.variants["warmup"].config), found[None])
    assert not torch.allclose(after(**SIDA), found[None], atol=1e-4)
    for name in ("warmup", "sida"):
        m, _ = made(**FILE.variants[name].config)
        start = weights(m.net)
        m.train_step(batch(x=images()), step(0))
        assert torch.equal(weights(m.net), start)
    assert not torch.equal(after(steps=1), start)


CALLS = {"student": 2, "student.backward": 1, "critic": 2, "critic.backward": 1, "teacher": 1}


@pytest.mark.parametrize(
    "changes,calls",
    [
        ({}, CALLS),
        ({"loss": "detached"}, CALLS),
        ({"loss": "naive"}, CALLS),
        (
            FILE.variants["warmup"].config,
            {
                "student": 39,
                "student.backward": 19,
                "critic": 39,
                "critic.backward": 20,
                "teacher": 19,
            },
        ),
        (
            SIDA,
            {
                "student": 39,
                "student.backward": 19,
                "critic": 59,
                "critic.backward": 20,
                "teacher": 19,
            },
        ),
    ],
)
def test_calls_of_a_cycle(changes, calls):
    m, task = made(**changes)
    cycle = SiD.needs(m.config).cycle
    with task.meter.counting():
        for i in range(cycle):
            logged = m.train_step(batch(x=images()), step(i, cycle))
    assert task.meter.calls == calls
    assert all(
        rows == N * task.meter.calls[role]
        for role, rows in task.meter.rows.items()
        if not role.endswith(".backward")
    )
    assert all(v.isfinite() and not v.requires_grad for v in logged.values())


def test_sidas_plan_is_what_the_run_costs(checkout):
    b = config.benchmark("tiny")
    made_ = cell("sid@sida", budget=b.budget.model_copy(update={"flops": 4e9}))
    plan, prepared = price(made_, quiet)
    run = attach(build(made_), prepared)
    with run.meter.counting():
        train(run, plan, quiet)
    assert plan.steps % 20 == 0 and plan.steps > 20
    assert plan.rows == {role: run.meter.rows[role] for role in plan.rows}
    assert plan.updates == {name: player.updates for name, player in run.task.players.items()}
    assert plan.updates["student"] == 19 * plan.steps // 20
    assert sample(run, 1, 10, quiet).shape == (10, 1, 8, 8)


def test_training_on_a_mixture():  # SID-1: the naive loss ends worse than the untrained student
    mixture = Mixture(
        torch.tensor([[1.0, 0.0], [-0.6, 0.9], [-0.6, -0.9]]),
        0.2,
        torch.tensor([0.5, 0.25, 0.25]),
        None,
        0,
    )
    exact = MixtureVelocity(mixture)
    torch.manual_seed(0)
    start = VelocityMLP((2,), 0, 48, 2)
    optimizer = torch.optim.Adam(start.parameters(), lr=3e-3)
    for i in range(300):
        rng = Rng(0, "fit", i)
        x, _ = mixture.draw(rng, 256)
        t = times.uniform(rng, 256)
        x_t = noised(x, rng.normal(256, 2), t)
        loss = (start(x_t, t) - exact(x_t, t)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    goal = mixture.draw(Rng(0, "goal"), 4000)[0]
    noise = Rng(0, "noise").normal(4000, 2)

    def distance(loss: str, steps: int) -> float:
        task = Task(
            (2,),
            0,
            partial(VelocityMLP, (2,), 0, width=48, depth=2),
            Teacher(exact, 0),
            start.state_dict(),
            0,
            torch.device("cpu"),
            Meter(),
        )
        players = {
            "student": {"lr": 1e-3, "betas": (0, 0.99)},
            "critic": {"lr": 2e-3, "betas": (0, 0.99)},
        }
        m = SiD(
            task,
            SiD.Config.model_validate(settings(batch=64, loss=loss, normalised=False, **players)),
        )
        for i in range(steps):
            m.train_step(Batch(128, Condition(None)), step(i, steps))
        with torch.no_grad():
            return sliced_wasserstein(
                m.sample(noise, Condition(None), 1, None), goal, projections=32
            )

    untrained, trained, failed = (
        distance("projected", 0),
        distance("projected", 150),
        distance("naive", 150),
    )
    assert trained < 0.5 * untrained < untrained < failed
