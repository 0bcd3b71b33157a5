"""FreeFlow against closed forms and its paper: specs/freeflow.md section 10, by test number."""

import math
import sys
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from torch import Tensor
from torch.func import jvp

from distillbench import times
from distillbench.method import Batch, Condition, Step
from distillbench.paths import noised, over
from distillbench.reading import merged
from distillbench.registry import folders
from distillbench.samplers import euler, heun
from distillbench.seeds import Rng
from tests.conftest import captured
from tests.toys import random_task, shake, weights

FOLDER = Path(__file__).parents[1] / "methods/freeflow"
FreeFlow = folders.load(SimpleNamespace(name="freeflow", path=FOLDER))
method = sys.modules[FreeFlow.__module__]
VARIANTS = {
    name: v["config"]
    for name, v in yaml.safe_load((FOLDER / "config.yaml").read_text())["variants"].items()
}
SHAPE, N = (1, 4, 4), 32
SETTINGS = {
    "batch": N,
    "correction": 0.25,
    "derivative": "discrete",
    "steps": 8,
    "solver": "heun",
    "delta_mean": 0.0,
    "delta_std": 1.0,
    "delta_zeros": 0.1,
    "confident_warmup": 0.0,
    "k": 1.0,
    "r_mean": 0.8,
    "r_std": 1.6,
    "alpha": 0.3,
    "alpha_delay": 0.0,
    "alpha_ramp": 0.0,
    "student": {"lr": 1e-2},
    "critic": {"lr": 1e-2},
}


def made(**changes) -> tuple:
    """FreeFlow with a random teacher, moved off it so that no difference of velocities is zero."""
    task = random_task(SHAPE)
    m = FreeFlow(task, FreeFlow.Config.model_validate(SETTINGS | changes))
    return m, task


def moved(m) -> None:
    shake(m.net, *([m.g] if hasattr(m, "g") else []))


def batch(n: int = N, w: float = 1.0) -> Batch:
    return Batch(n, Condition(torch.arange(n) % 3, w))


def step(index: int = 5, total: int = 10) -> Step:
    return Step(index, total, 0, torch.device("cpu"))


# Gaussians: data N(0, c^2); everything is linear in x and z.


def scale(t: Tensor, c: float) -> Tensor:
    return ((1 - t) ** 2 * c**2 + t**2).sqrt()


def velocity(x: Tensor, t: Tensor, c: float) -> Tensor:
    return x * over((t - (1 - t) * c**2) / scale(t, c) ** 2, x)


def exact_map(z: Tensor, s: Tensor, c: float) -> Tensor:
    """X(z, 1, s)."""
    return z * over(scale(s, c), z)


def exact_average(z: Tensor, s: Tensor, c: float) -> Tensor:
    """U(z, 1, s); s below 1."""
    return (z - exact_map(z, s, c)) / over(1 - s, z)


class Gaussian(SimpleNamespace):
    """FreeFlow without training: `net` is any U(z, s).

    The teacher has the exact velocity of N(0, c^2), g that of N(0, a^2).
    """

    def __new__(cls, net, c: float = 0.5, a: float = 0.5, **changes):
        m = FreeFlow.__new__(FreeFlow)
        m.config = FreeFlow.Config.model_validate(SETTINGS | changes)
        m.asked = []

        def teacher(x: Tensor, t: Tensor, cond: Condition) -> Tensor:
            m.asked.append((x, t))
            return velocity(x, t, c)

        m.task = SimpleNamespace(shape=(1,), teacher=SimpleNamespace(velocity=teacher))
        m.net = lambda z, one, labels, s, guidance: net(z, s)
        m.g = lambda x, r, labels, guidance: velocity(x, r, a)
        return m


NONE = Condition(None)


def test_correction_pulls_the_generator_towards_the_data():  # test 1
    z = torch.randn(400_000, 1, generator=torch.Generator().manual_seed(0))
    slopes = {}
    for a in (0.3, 0.5, 0.8):
        m = Gaussian(None, c=0.5, a=a)
        *_, delta = m.noising(a * z, NONE, step())
        # U = (1 - a) z, so dL/da = E[dU/da Delta] = -E[z Delta]
        slopes[a] = (-z * delta).mean().item()
    assert slopes[0.3] == pytest.approx(-0.070, abs=0.003) and slopes[0.8] == pytest.approx(
        0.166, abs=0.003
    )
    assert abs(slopes[0.5]) < 1e-6
    # Planted: v_q and v exchanged are data of sd 0.8
    flipped = Gaussian(None, c=0.8, a=0.5).noising(0.5 * z, NONE, step())[2]
    assert (-z * flipped).mean() < 0 < slopes[0.8]


def test_signs_of_the_paper_give_the_same_gradient():  # test 2
    """The paper's quantities of any map beside ours.

    u = -v, F = -U, f = z + delta F, v_G = df/d delta, v_N = -v_q.
    """
    g = torch.Generator().manual_seed(0)
    z, e = torch.randn(2, 8, 2, dtype=torch.float64, generator=g)
    delta, r = 0.1 + 0.8 * torch.rand(2, 8, dtype=torch.float64, generator=g)

    def paper_f(d):
        return torch.sin(3 * z + over(d, z))  # F(z, delta)

    def f(d):
        return z + over(d, z) * paper_f(d)

    state, v_g = jvp(f, (delta,), (torch.ones_like(delta),))
    paper_delta = v_g + velocity(state, 1 - delta, 0.5)  # v_G - u(f, 1 - delta)
    u, du = jvp(lambda s: -paper_f(1 - s), (1 - delta,), (torch.ones_like(delta),))
    ours = Gaussian(None, derivative="jvp").generating(z, u, du, delta, delta, NONE, step())
    torch.testing.assert_close(ours, -paper_delta)
    x = z - u  # at any delta: what matters is v_N - u(x_r, r)

    def of(a):
        return velocity(noised(x, e, r), r, a)

    paper_delta_n = -of(0.3) + of(0.5)

    def gradient(a, b):
        return torch.autograd.grad(method.gradient_form(a, b), leaf)[0]

    leaf = u.clone().requires_grad_(True)
    for in_the_paper in (paper_delta, paper_delta_n):
        theirs, own = gradient(-leaf, in_the_paper), gradient(leaf, -in_the_paper)
        torch.testing.assert_close(own, theirs)
        # One factor flipped is ascent, at a loss of the same size.
        torch.testing.assert_close(gradient(leaf, in_the_paper), -theirs)
        assert (
            method.gradient_form(leaf, in_the_paper).abs()
            == method.gradient_form(-leaf, in_the_paper).abs()
        )


@pytest.mark.parametrize("form", ["euler", "heun", "jvp"])
def test_prediction_pulls_the_map_towards_the_flow(form):
    """U off by eps > 0 from the fixed point has Delta_G > 0 in every form: U moves by -Delta_G."""
    z = torch.randn(64, 1, dtype=torch.float64)
    for eps in (0.05, -0.05):
        if form == "jvp":
            delta = 0.05 + 0.9 * torch.rand(64, dtype=torch.float64)
            u, du = jvp(
                lambda s: exact_average(z, s, 0.5),
                (1 - delta,),
                (torch.ones(64, dtype=torch.float64),),
            )
            found = Gaussian(None, derivative="jvp").generating(
                z, u + eps, du, delta, delta, NONE, step()
            )
        else:
            net, start = (
                roll_out({"euler": euler, "heun": heun}[form], 8)[0],
                torch.arange(64, dtype=torch.float64) % 8 / 8,
            )
            off = net(z, 1 - start - 1 / 8) + eps
            found = Gaussian(net, solver=form).generating(
                z, off, None, start, start + 1 / 8, NONE, step()
            )
        assert (found * eps).min() > 0


def test_the_exact_map_has_no_residual_in_the_continuous_form():  # test 3
    z = torch.randn(64, 2, dtype=torch.float64)
    delta = 0.98 * torch.rand(64, dtype=torch.float64)
    s = 1 - delta
    u, du = jvp(lambda s: exact_average(z, s, 0.5), (s,), (torch.ones_like(s),))
    dx_ds = jvp(lambda s: exact_map(z, s, 0.5), (s,), (torch.ones_like(s),))[1]
    torch.testing.assert_close(dx_ds, velocity(exact_map(z, s, 0.5), s, 0.5))  # Eq. 7
    m = Gaussian(None, derivative="jvp")

    def residual(u, du):
        return m.generating(z, u, du, delta, delta, NONE, step())

    assert residual(u, du).abs().max() < 1e-12
    assert residual(u, -du).abs().max() > 0.1 and residual(-u, du).abs().max() > 0.1


def roll_out(solver, n: int, c: float = 0.5):
    """U(z, s) at the grid points of the teacher's n-step path, and where the path of z = 1 ends."""
    asked: list[Tensor] = []
    one = torch.ones(1, 1, dtype=torch.float64)
    end = solver(lambda x, t: (asked.append(x), velocity(x, t, c))[1], one, n)
    path = [x.item() for x in asked[:: 2 if solver is heun else 1]] + [end.item()]

    def net(z: Tensor, s: Tensor) -> Tensor:
        delta = 1 - s
        x = torch.tensor([path[round(d.item() * n)] for d in delta], dtype=z.dtype)
        # U(z, 1, 1) is never used
        return torch.where(
            over(delta, z) > 0, (z - over(x, z) * z) / over(delta, z).clamp_min(1e-9), 7.0
        )

    return net, path[-1]


@pytest.mark.parametrize("name,solver,other", [("euler", euler, heun), ("heun", heun, euler)])
def test_fixed_point_of_the_discrete_form_is_the_roll_out(name, solver, other):  # test 5
    z, index = torch.randn(8, 1, dtype=torch.float64), torch.arange(8, dtype=torch.float64)
    start, end = index / 8, (index + 1) / 8
    right, wrong = (
        Gaussian(net, solver=name).generating(z, net(z, 1 - end), None, start, end, NONE, step())
        for net in (roll_out(s, 8)[0] for s in (solver, other))
    )
    assert right.abs().max() < 1e-12 and wrong.abs().max() > 1e-3


def test_heun_is_nearer_to_the_teacher_than_euler():  # test 5
    errors = {solver.__name__: roll_out(solver, 8)[1] - 0.5 for solver in (euler, heun)}
    assert abs(errors["heun"]) < 0.01 < 0.05 < abs(errors["euler"])


def test_cotangent_is_the_gradient_of_the_squared_loss():  # test 4, Eq. 14
    g = torch.Generator().manual_seed(0)
    z, before, u = torch.randn(3, 8, 2, dtype=torch.float64, generator=g)
    u.requires_grad_(True)
    start = torch.arange(8, dtype=torch.float64) / 8
    end, h = start + 1 / 8, 1 / 8
    m = Gaussian(lambda z, s: before, solver="euler")
    delta = m.generating(z, u.detach(), None, start, end, NONE, step())
    x_i = z - over(start, z) * before
    rest = (over(start, z) * (u - before) / h - velocity(x_i, 1 - start, 0.5)).detach()
    squared = (u + rest).square().flatten(1).sum(1).mean()
    torch.testing.assert_close(
        torch.autograd.grad(squared, u)[0] / 2, delta / 8, rtol=1e-12, atol=1e-13
    )


def test_starts_as_the_teacher_for_every_delta_and_guidance():  # test 6
    m, task = made(guidance=(1.0, 2.0))
    z, one, labels = torch.randn(6, *SHAPE), torch.ones(6), torch.arange(6) % 3
    v = task.teacher.velocity(z, one, Condition(labels))
    for s, gamma in ((0.0, 1.0), (0.4, 2.0), (1.0, 1.5)):
        torch.testing.assert_close(m.net(z, one, labels, s=s * one, guidance=gamma * one), v)
        torch.testing.assert_close(m.g(z, one, labels, guidance=gamma * one), v)
    torch.testing.assert_close(m.sample(z, Condition(labels, 1.5), 1, None), z - v)
    before = {k: v.clone() for k, v in m.net.state_dict().items()}
    m.train_step(batch(), step())
    for part in ("gap.last.weight", "guidance.last.weight"):
        assert not torch.equal(before[part], m.net.state_dict()[part])
    with pytest.raises(ValueError, match=r"guidance 3 is outside the range \[1, 2\]"):
        m.sample(z, Condition(labels, 3.0), 1, None)


def test_derivative_is_partial_in_s(monkeypatch):  # test 7
    m, task = made(derivative="jvp", correction=0.0)
    moved(m)
    m.net.double(), task.teacher.network.double()
    seen, original = [], task.jvp

    def watched(net, primals, tangents, cond, graph=False):
        def double(parts):
            return tuple(p.double() for p in parts)

        out = original(net, double(primals), double(tangents), cond, graph)
        seen.append((double(primals), out[1], cond))
        return out

    monkeypatch.setattr(task, "jvp", watched)
    m.train_step(batch(), step())
    (z, one, s), du, cond = seen[0]

    def at(z, s):
        return m_before(z, one, cond.labels, s=s).detach()

    m_before = made(derivative="jvp", correction=0.0)[0]
    moved(m_before)  # the same draws: the network as it was before the update
    m_before = m_before.net.double()
    h = 1e-5
    central = (at(z, s + h) - at(z, s - h)) / (2 * h)
    torch.testing.assert_close(du, central, rtol=1e-5, atol=1e-7)
    total = (at(z + h, s + h) - at(z - h, s - h)) / (2 * h)
    # a tangent on z would be another derivative
    assert not torch.allclose(du, total, rtol=1e-2, atol=1e-3)


def test_confident_region():  # test 8, App. A.1
    n = 200_000
    g = torch.Generator().manual_seed(0)
    x0 = 1.5
    for t, t_c in ((0.2, 0.7), (0.0, 0.3), (0.69, 0.7)):
        x = noised(torch.full((n, 1), x0), torch.randn(n, 1, generator=g), torch.full((n,), t))
        y, time = method.confident(x, torch.full((n,), t), t_c, torch.randn(n, 1, generator=g))
        assert y.mean().item() == pytest.approx(
            (1 - t_c) * x0, abs=0.01
        ) and y.std().item() == pytest.approx(t_c, abs=0.01)
        assert (time == t_c).all()
        # the state as it was is not that
        assert abs(x.mean().item() - (1 - t_c) * x0) > 0.01 or abs(x.std().item() - t_c) > 0.005
    x, t = torch.randn(4, 1), torch.tensor([0.5, 0.7, 0.9, 1.0])
    y, time = method.confident(x, t, 0.7, torch.randn(4, 1))
    assert (
        torch.equal(y[1:], x[1:])
        and torch.equal(time, torch.tensor([0.7, 0.7, 0.9, 1.0]))
        and not torch.equal(y[0], x[0])
    )
    assert method.confident(x, t, 1.0, torch.randn(4, 1))[0].isfinite().all()


@pytest.mark.parametrize("derivative", ["discrete", "jvp"])
def test_confident_region_lasts_as_long_as_the_settings_say(derivative):
    for index, everywhere in ((1, True), (6, False)):
        m = Gaussian(exact_average_at_half, confident_warmup=0.5, derivative=derivative)
        z, start = torch.randn(8, 1), torch.arange(8) / 8
        u = m.net(z, None, None, 1 - start - 1 / 8, None)
        m.generating(
            z, u, 0 * u if derivative == "jvp" else None, start, start + 1 / 8, NONE, step(index)
        )
        lowest = min(t.min().item() for _, t in m.asked)
        assert lowest == pytest.approx(1 - (index / 10) / 0.5 if everywhere else 0.0)


def exact_average_at_half(z: Tensor, s: Tensor) -> Tensor:
    return torch.where(over(s, z) < 1, exact_average(z, s.clamp(max=1 - 1e-6), 0.5), 0.0)


@pytest.mark.parametrize(
    "mean,std,masses",
    [
        (0.0, 1.0, (0.123, 0.099, 0.151, 0.176, 0.176, 0.153, 0.099, 0.023)),
        (-0.4, 1.2, (0.189, 0.164, 0.165, 0.151, 0.131, 0.106, 0.072, 0.023)),
    ],
)
def test_law_of_delta(mean, std, masses):  # test 9
    delta = method.draw_delta(Rng(0, "delta"), 400_000, mean, std, 0.1)
    start, end = method.on_grid(delta, 8)
    found = torch.bincount((start * 8).long(), minlength=8) / len(delta)
    torch.testing.assert_close(found, torch.tensor(masses), atol=0.003, rtol=0)
    torch.testing.assert_close(end - start, torch.full_like(end, 1 / 8))
    without = torch.bincount(
        (
            method.on_grid(method.draw_delta(Rng(0, "delta"), 400_000, mean, std, 0.0), 8)[0] * 8
        ).long(),
        minlength=8,
    )
    assert without[0] / 400_000 < found[0] - 0.05  # the zeros are there
    assert method.on_grid(torch.tensor([0.0, 0.124, 0.125, 1.0]), 8)[0].tolist() == [
        0.0,
        0.0,
        0.125,
        0.875,
    ]


def test_network_is_trained_at_the_end_of_the_interval(monkeypatch):  # test 9
    m, _ = made()
    seen, original = [], m.net.forward
    monkeypatch.setattr(
        m.net,
        "forward",
        lambda *args, **kw: (
            seen.append((kw["s"], torch.is_grad_enabled())),
            original(*args, **kw),
        )[1],
    )
    m.train_step(batch(), step())
    with_gradient = torch.cat([s for s, grad in seen if grad])
    # never F(z, 0); correction rows at delta = 1
    assert with_gradient.max() <= 7 / 8 and (with_gradient[24:] == 0).all()
    # starts at delta = 0 are evaluated without one
    assert torch.cat([s for s, grad in seen if not grad]).max() == 1.0
    delta = torch.full((24,), 0.95)
    monkeypatch.setattr(method, "draw_delta", lambda *_: delta)
    seen.clear()
    m.train_step(batch(), step())
    # prediction trains F(z, 1), which is what is sampled
    assert (torch.cat([s for s, grad in seen if grad])[:24] == 0).all()

    # Planted: trained at the start of the interval.
    def planted(delta, steps):
        floor = (delta * steps).floor() / steps
        return floor - 1 / steps, floor

    monkeypatch.setattr(method, "on_grid", planted)
    seen.clear()
    m.train_step(batch(), step())
    assert (torch.cat([s for s, grad in seen if grad])[:24] > 0).all()


def test_law_of_r():  # test 10
    def fits(mean: float, std: float) -> bool:
        r = times.logit_normal(Rng(0, "r"), 400_000, mean, std)
        quantiles = r.quantile(torch.tensor([0.05, 0.5, 0.95]))
        return (
            abs(r.mean().item() - 0.634) < 0.002
            and (quantiles - torch.tensor([0.138, 0.689, 0.969])).abs().max().item() < 0.003
        )

    assert fits(SETTINGS["r_mean"], SETTINGS["r_std"])
    # t and 1 - t exchanged
    assert not fits(-SETTINGS["r_mean"], SETTINGS["r_std"]) and not fits(SETTINGS["r_mean"], 1.0)


@pytest.mark.parametrize("r", [0.2, 0.5, 0.9])
def test_correction_with_its_dropped_factor_is_the_gradient_of_the_kl(r):  # test 11, Eq. 16
    a, c, t = 0.3, 0.5, torch.tensor([r], dtype=torch.float64)
    # x_r = (1-r) a z + r n with E z^2 = E n^2 = 1, E zn = 0 exactly on these four points
    z = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)[:, None]
    n = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64)[:, None]
    x_r = noised(a * z, n, t.expand(4))
    delta = velocity(x_r, t.expand(4), a) - velocity(x_r, t.expand(4), c)
    ours = (-z * delta).mean() * (1 - r) ** 2 / r
    # d/da KL(N(0, S_a^2) | N(0, S_c^2))
    closed = (1 - r) ** 2 * a * (1 / scale(t, c) ** 2 - 1 / scale(t, a) ** 2)
    torch.testing.assert_close(ours, closed[0], rtol=1e-10, atol=0)
    assert abs((-z * delta).mean() / closed[0] - 1) > 0.4  # without the factor it is another number


@pytest.mark.parametrize("d", [4, 64, 1024])
def test_power_weight(d):  # test 12
    for rho in (0.003, 0.01, 0.1, 1.0):
        delta = torch.full((2, d), rho)
        assert method.weighted(delta, 1.0).norm(dim=1)[0].item() == pytest.approx(
            math.sqrt(d) * rho / (rho**2 + 1e-4), rel=1e-4
        )
        torch.testing.assert_close(method.weighted(delta, 0.0), delta)
    assert (
        method.weighted(torch.full((1, d), 0.1), 1.0).norm()
        > method.weighted(torch.full((1, d), 1.0), 1.0).norm()
    )


# test 13, App. A.3: alpha = 0.3 and 75:25 mean about 10 %
def test_correction_is_a_tenth_of_the_prediction(
    monkeypatch,
):
    m, _ = made(batch=256)
    moved(m)
    calls = captured(monkeypatch, method, "gradient_form")
    raw = captured(monkeypatch, method, "weighted")
    m.train_step(batch(256), step())
    norms = calls[0][0][1].flatten(1).norm(dim=1)
    ratio = norms[192:].sum() / norms[:192].sum()
    assert ratio.item() == pytest.approx(0.1, rel=1e-4)
    # lambda from norms before the weight would give another ratio
    before = raw[0][0][0].flatten(1).norm(dim=1)
    assert abs(before.mean() / norms[:192].mean() - 1) > 0.1


@pytest.mark.parametrize(
    "index,share", [(0, 0.0), (2, 0.5), (9, 1.0)]
)  # before the delay, half way up, after the ramp
def test_an_update_is_wired_as_its_settings_say(monkeypatch, index, share):
    """k, alpha's delay and ramp, the student's own samples for Eq. 11, g_psi trained at alpha 0."""
    m, _ = made(k=0.0, alpha_delay=0.1, alpha_ramp=0.2)
    moved(m)
    outputs, given, noising = [], [], m.noising
    m.net.register_forward_hook(
        lambda net, args, out: outputs.append((args[0], out)) if torch.is_grad_enabled() else None
    )
    m.noising = lambda x, cond, step: (given.append(x), noising(x, cond, step))[1]
    forms, raw, g = (
        captured(monkeypatch, method, "gradient_form"),
        captured(monkeypatch, method, "weighted"),
        weights(m.g),
    )
    scale = m.train_step(batch(), step(index, 10))["lambda"].item()
    (z, u), cotangent, delta_g = outputs[0], forms[0][0][1], raw[0][0][0]

    def norm(x):
        return x.flatten(1).norm(dim=1).mean().item()

    assert torch.equal(given[0], (z - u)[24:])  # X(z, 1, 0)
    assert torch.equal(cotangent[:24], delta_g)  # k = 0
    assert norm(cotangent[24:]) == pytest.approx(share * 0.3 * norm(delta_g), rel=1e-4) and (
        scale > 0
    ) == (share > 0)
    assert not torch.equal(weights(m.g), g)


def test_lambda_is_that_of_the_whole_batch_on_any_number_of_ranks(monkeypatch):
    """A ratio of means over all ranks, and not the mean of the ranks' ratios."""
    m, _ = made()
    moved(m)
    # another rank with other norms
    monkeypatch.setattr(Step, "mean_across_ranks", lambda self, value: 2 * value + 1)
    raw, scaled = (
        captured(monkeypatch, method, "weighted"),
        captured(monkeypatch, method, "balance"),
    )
    found = m.train_step(batch(), step())["lambda"].item()
    assert len(scaled) == 1 and len(raw) == 1
    own = raw[0][1].flatten(1).norm(dim=1).mean().item()
    assert scaled[0][0][1].item() == pytest.approx(2 * own + 1) and found == scaled[0][1].item()


def test_the_average_is_what_is_sampled():
    m, _ = made(student={"lr": 1e-2, "half_lives": {"evaluation": 0.5}})
    m.student.total_updates = 10
    for i in range(3):
        m.train_step(batch(), step(i))
    z, one, labels = torch.randn(6, *SHAPE), torch.ones(6), torch.arange(6) % 3

    def jump(net):
        return z - net(z, one, labels, s=0 * one)

    x = m.sample(z, Condition(labels), 1, None)
    assert torch.equal(x, jump(m.student.averaged())) and not torch.allclose(
        x, jump(m.net), atol=1e-4
    )


def test_alpha_schedule():  # test 14: delay and ramp 10K of 100K, decay after 25K
    def alpha(p, decay=None):
        return method.alpha_at(p, 0.6, 0.1, 0.1, decay)

    assert [alpha(p) for p in (0.0, 0.0999, 0.15, 0.2, 1.0)] == pytest.approx([0, 0, 0.3, 0.6, 0.6])
    assert [alpha(p, 0.25) for p in (0.15, 0.25, 1.0)] == pytest.approx([0.3, 0.6, 0.3])
    assert (
        method.alpha_at(0.0, 1.0, 0.0, 0.0, None) == 1.0
        and method.alpha_at(0.1, 1.0, 0.2, 0.0, None) == 0.0
    )


@pytest.mark.parametrize("derivative", ["discrete", "jvp"])
def test_gradients_reach_their_own_player_only(monkeypatch, derivative):  # test 15
    m, task = made(derivative=derivative)
    moved(m)
    teacher, net, g = weights(task.teacher.network), weights(m.net), weights(m.g)
    forms, losses = (
        captured(monkeypatch, method, "gradient_form"),
        captured(monkeypatch, method, "critic_loss"),
    )
    update, reached = m.student.update, []

    def watched(loss: Tensor) -> None:
        others = [
            *m.g.parameters(),
            *(p.requires_grad_(True) for p in task.teacher.network.parameters()),
        ]
        reached.extend(
            p
            for p in torch.autograd.grad(loss, others, retain_graph=True, allow_unused=True)
            if p is not None
        )
        update(loss)
        assert torch.equal(weights(m.g), g)

    m.student.update = watched
    m.train_step(batch(), step())
    assert not reached and torch.equal(weights(task.teacher.network), teacher)
    assert not torch.equal(weights(m.net), net) and not torch.equal(weights(m.g), g)
    (u, _), _ = forms[0]
    assert u.requires_grad
    loss = losses[0][1]
    assert all(
        p is None
        for p in torch.autograd.grad(
            loss, list(m.net.parameters()), retain_graph=True, allow_unused=True
        )
    )

    # Planted: the target keeps its graph.
    def free(u, delta):
        return (u * delta).sum()

    delta_with_graph = u * 2.0
    a = torch.autograd.grad(method.gradient_form(u, delta_with_graph), u, retain_graph=True)[0]
    assert not torch.allclose(a * len(u), torch.autograd.grad(free(u, delta_with_graph), u)[0])


def test_auxiliary_network_learns_the_students_noised_velocity_for_each_guidance():  # test 16
    z = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)[:, None]
    n = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64)[:, None]
    r = torch.full((4,), 0.4, dtype=torch.float64)

    def slope(coefficient: float, generators: tuple[float, ...]) -> float:
        k = torch.tensor(coefficient, dtype=torch.float64, requires_grad=True)
        losses = [method.critic_loss(k * noised(a * z, n, r), a * z, n) for a in generators]
        return torch.autograd.grad(sum(losses), k)[0].item()

    exact = {
        a: velocity(torch.ones(1, 1, dtype=torch.float64), r[:1], a).item() for a in (0.3, 0.9)
    }
    for a in exact:  # with gamma as an input every generator has its own coefficient
        assert abs(slope(exact[a], (a,))) < 1e-12
    # one for both cannot be right
    assert abs(slope(exact[0.3], (0.3, 0.9))) > 0.1 and abs(slope(exact[0.9], (0.3, 0.9))) > 0.1


def test_teacher_is_guided_inside_the_interval_only():  # Table 1c
    cond, r = (
        Condition(torch.tensor([0, 1, 2]), torch.tensor([1.5, 2.0, 1.2])),
        torch.tensor([0.1, 0.4, 0.41]),
    )
    assert method.within(cond, r, 0.4).guidance.tolist() == pytest.approx([1.5, 2.0, 1.0])
    assert method.within(Condition(cond.labels, 2.0), r, 0.4).guidance.tolist() == [2.0, 2.0, 1.0]
    assert (
        method.within(Condition(None, 2.0), r, 0.4).guidance == 2.0
        and method.within(Condition(cond.labels), r, 0.4).guidance == 1.0
    )
    m, task = made(guidance=(1.0, 2.0), guidance_high=0.4)
    moved(m)
    asked, original = [], task.teacher.velocity
    task.teacher.velocity = lambda x, t, cond: (
        asked.append((t, cond.guidance)),
        original(x, t, cond),
    )[1]
    m.train_step(batch(), step())
    assert len(asked) == 3 and all(len(t) == 24 for t, _ in asked[:2]) and len(asked[2][0]) == 8
    assert all((w > 1).all() for _, w in asked[:2])  # Eq. 9 is guided everywhere
    given = [w for _, w in asked]
    seen = []
    # gamma of each row reaches the student and g_psi, which tells the generators apart
    for net in (
        m.net,
        m.g,
    ):
        net.register_forward_pre_hook(
            lambda net, args, kw: seen.append(kw["guidance"]), with_kwargs=True
        )
    asked.clear()
    m.train_step(batch(), step())
    assert (
        torch.equal(seen[0][:24], given[0])
        and torch.equal(seen[-1], seen[0][24:])
        and len(seen[0].unique()) == N
    )
    r, w = asked[2]
    assert ((w == 1) == (r > 0.4)).all() and (w > 1).any() and (r > 0.4).any()


def test_guidance_of_each_row():
    _, task = made(guidance=(1.0, 2.0))
    x, t, labels = torch.randn(4, *SHAPE), torch.rand(4), torch.arange(4) % 3
    w = torch.tensor([1.0, 1.3, 1.7, 2.0])
    together = task.teacher.velocity(x, t, Condition(labels, w))
    for i, own in enumerate(w.tolist()):
        cut = slice(i, i + 1)
        torch.testing.assert_close(
            together[cut], task.teacher.velocity(x[cut], t[cut], Condition(labels[cut], own))
        )


@pytest.mark.parametrize(
    "changes,calls",
    [
        (
            {},
            {"critic": 1, "critic.backward": 1, "student": 2, "student.backward": 1, "teacher": 3},
        ),
        (
            {"solver": "euler"},
            {"critic": 1, "critic.backward": 1, "student": 2, "student.backward": 1, "teacher": 2},
        ),
        (
            {"derivative": "jvp"},
            {
                "critic": 1,
                "critic.backward": 1,
                "student": 1,
                "student.backward": 1,
                "student.tangent": 1,
                "teacher": 2,
            },
        ),
        ({"correction": 0.0}, {"student": 2, "student.backward": 1, "teacher": 2}),
        (
            {"correction": 1.0},
            {"critic": 1, "critic.backward": 1, "student": 1, "student.backward": 1, "teacher": 1},
        ),
    ],
)
def test_no_evaluation_more_than_the_algorithm_needs(changes, calls):
    m, task = made(**changes)
    with task.meter.counting():
        logged = m.train_step(batch(), step())
    assert dict(sorted(task.meter.calls.items())) == calls
    assert all(torch.isfinite(v).all() for v in logged.values())
    assert ("lambda" in logged) == (changes.get("correction") != 0.0)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_costs_what_its_objectives_cost(name):
    m, task = made(**VARIANTS[name])
    with task.meter.counting():
        m.train_step(batch(), step())
    alone, _, _ = name.partition("-")
    student, teacher = (
        (1, 1) if alone == "correction" else (2, 2) if alone == "prediction" else (2, 3)
    )
    expected = {
        "student": student,
        "student.backward": 1,
        "teacher": teacher - (m.config.solver == "euler"),
    }
    if m.config.derivative == "jvp":  # its value and tangent are one call, at one time
        expected |= {"student": 1, "student.tangent": 1, "teacher": teacher - 1}
    assert dict(task.meter.calls) == expected | (
        {} if alone == "prediction" else {"critic": 1, "critic.backward": 1}
    )


def test_every_variant_changes_an_update():
    after = {}
    for name in [None, *VARIANTS]:
        m, _ = made(**merged({"confident_warmup": 0.9}, VARIANTS[name] if name else {}))
        moved(m)
        for i in range(5, 8):
            m.train_step(batch(), step(i))
        after[name] = weights(m.net)
    same = {
        pair
        for pair in combinations(after, 2)
        if torch.allclose(after[pair[0]], after[pair[1]], atol=1e-5)
    }
    # the default here and on digits; on mixtures it is k = 0
    assert same == {
        (None, "k-1"),
        ("prediction-only", "prediction-k-1"),
    }
