"""MeanFlow against its closed form and its paper: specs/meanflow.md sections 1, 3, 10, by test."""

import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.func import jacrev, jvp, vmap

from distillbench import paths, times
from distillbench.meter import Meter
from distillbench.method import Batch, Condition, Step, Task, Teacher
from distillbench.networks.mlp import VelocityMLP
from distillbench.registry import folders
from distillbench.samplers import jumps
from tests.conftest import captured

FOLDER = Path(__file__).parents[1] / "methods/meanflow"
MeanFlow = folders.load(SimpleNamespace(name="meanflow", path=FOLDER))
method = sys.modules[MeanFlow.__module__]
C = 0.6  # data N(0, C^2)


def scale(t: Tensor) -> Tensor:
    return ((1 - t) ** 2 * C**2 + t**2).sqrt()


def velocity(x: Tensor, t: Tensor) -> Tensor:
    """v = x (t - (1-t) c^2) / S_t^2."""
    return x * paths.over((t - (1 - t) * C**2) / scale(t) ** 2, x)


def average(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """u = x (1 - S_s / S_t) / (t-s)."""
    return x * paths.over((1 - scale(s) / scale(t)) / (t - s), x)


def point(n: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """x [n, 5], t, s with t - s > 0.05, float64."""
    t = 0.3 + 0.7 * torch.rand(n, dtype=torch.float64)
    return (
        torch.randn(n, 5, dtype=torch.float64),
        t,
        (t - 0.05) * torch.rand(n, dtype=torch.float64),
    )


def derivative(x: Tensor, t: Tensor, s: Tensor, tangents: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    return jvp(average, (x, t, s), tangents)[1]


def total(x: Tensor, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """v and du/dt along (v, 1, 0)."""
    v = velocity(x, t)
    return v, derivative(x, t, s, (v, torch.ones_like(t), torch.zeros_like(s)))


def near(a: Tensor, b: Tensor, tolerance: float = 1e-9) -> bool:
    return bool((a - b).abs().max() < tolerance)


# The closed form


def test_closed_form_identities():  # section 1, test 1
    x, t, s = point()
    m = 0.5 * (t + s)
    u, (v, du) = average(x, t, s), total(x, t, s)
    assert near(u, v - paths.over(t - s, x) * du)  # MeanFlow identity
    dx_ds = jvp(lambda s: paths.jump(x, average(x, t, s), t, s), (s,), (torch.ones_like(s),))[1]
    assert near(dx_ds, velocity(paths.jump(x, u, t, s), s))  # dX/ds = v(X, s)
    x_m = paths.jump(x, average(x, t, m), t, m)
    assert near(paths.jump(x_m, average(x_m, m, s), m, s), paths.jump(x, u, t, s))  # additivity

    def jacobians(f):
        return vmap(jacrev(lambda x, t, s: f(x[None], t[None], s[None])[0]))(x, t, s)

    left = torch.eye(5, dtype=x.dtype) - (t - s)[:, None, None] * jacobians(average)
    right = jacobians(lambda x, t, s: paths.jump(x, average(x, t, s), t, s))
    assert near(left, right)  # I - (t-s) d_x u = d_x X


def test_target_at_the_exact_average_velocity_is_itself():  # Eq. 10-11, test 2
    x, t, s = point()
    u, (v, du) = average(x, t, s), total(x, t, s)
    assert near(method.meanflow_target(v, du, t, s), u)
    assert not near(method.meanflow_target(v, -du, t, s), u, 0.1)  # planted: + (t-s) du/dt
    one, zero = torch.ones_like(t), torch.zeros_like(t)
    # Planted: FreeFlow's sign, Table 1b
    for tangents in (
        (-v, one, zero),
        (v, zero, one),
        (v, one, one),
        (v, zero, zero),
    ):
        assert not near(method.meanflow_target(v, derivative(x, t, s, tangents), t, s), u, 1e-2)


# section 1: target noise is (d_x X)(e - x - v), of zero mean
def test_sample_velocities_give_an_unbiased_target():
    n = 200_000
    t, s = torch.full((n,), 0.8, dtype=torch.float64), torch.full((n,), 0.3, dtype=torch.float64)
    x, e = C * torch.randn(n, 1, dtype=torch.float64), torch.randn(n, 1, dtype=torch.float64)
    x_t = paths.noised(x, e, t)
    du = derivative(x_t, t, s, (e - x, torch.ones_like(t), torch.zeros_like(t)))
    off = method.meanflow_target(e - x, du, t, s) - average(x_t, t, s)
    jacobian = scale(s) / scale(t)
    torch.testing.assert_close(off, jacobian[:, None] * (e - x - velocity(x_t, t)))
    regression = (off * x_t).mean() / x_t.square().mean()  # any bias is linear in x_t here
    assert abs(regression) < 4 * off.std() / x_t.std() / n**0.5


def test_jumps_with_the_exact_average_velocity_agree_for_any_number_of_steps():  # test 16
    z = torch.randn(64, 5, dtype=torch.float64)
    one = jumps(average, z, 1)
    assert near(one, C * z)  # x = e - u(e, 1, 0)
    for steps in (2, 4, 7):
        assert near(jumps(average, z, steps), one)
        # Planted: another s
        assert not near(jumps(lambda x, t, s: average(x, t, s - 0.05), z, steps), one, 1e-2)


# The loss


def test_nothing_flows_through_target_derivative_and_weight():  # test 6
    v, du, u = (torch.randn(8, 3, requires_grad=True) for _ in range(3))
    t, s = torch.rand(8).sort(descending=True)[0], torch.zeros(8)
    target = method.meanflow_target(v, du, t, s)
    assert not target.requires_grad
    (gradient,) = torch.autograd.grad(method.adaptive_loss(u, target, 0.75, 1e-2), u)
    squared = (u - target).square().sum(1, keepdim=True)
    frozen = (2 * (u - target) / (squared + 1e-2) ** 0.75 / 8).detach()
    torch.testing.assert_close(gradient, frozen)
    # Planted: weight not detached
    (planted,) = torch.autograd.grad((squared / (squared + 1e-2) ** 0.75).mean(), u)
    assert not torch.allclose(planted, frozen, rtol=1e-2)


# test 7: replicating the elements k times multiplies L by k
def test_a_sample_is_summed_not_averaged():
    u, target = torch.randn(2, 8, 3, dtype=torch.float64)
    c, p, k = 1e-1, 0.75, 4
    many = method.adaptive_loss(u.repeat(1, k), target.repeat(1, k), p, c)
    squared = (u - target).square().sum(1)
    torch.testing.assert_close(many, (k * squared / (k * squared + c) ** p).mean())
    # Planted: with a mean it would not change
    assert abs(many - method.adaptive_loss(u, target, p, c)) > 0.1
    images = method.adaptive_loss(u.reshape(8, 1, 3, 1), target.reshape(8, 1, 3, 1), p, c)
    torch.testing.assert_close(images, method.adaptive_loss(u, target, p, c))


def test_power_zero_is_the_squared_error():  # test 7
    u, target = torch.randn(2, 8, 3)
    torch.testing.assert_close(
        method.adaptive_loss(u, target, 0.0, 1e-3), (u - target).square().sum(1).mean()
    )


# 3.1, test 7: |.|^(2(1-p)), whose limit at p = 1 is a logarithm
@pytest.mark.parametrize("p", [0.5, 0.75, 1.0])
def test_gradient_is_that_of_the_power_loss(
    p,
):
    u, target = torch.randn(2, 8, 3, dtype=torch.float64)
    u.requires_grad_()
    squared = (u - target).square().sum(1)
    c = 1e-12

    def gradient(loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss.mean(), u, retain_graph=True)[0]

    def power(p: float) -> Tensor:
        return gradient(squared.log() if p == 1 else squared ** (1 - p) / (1 - p))

    own = gradient(method.adaptive_loss(u, target, p, c))
    torch.testing.assert_close(own, power(p))
    # Planted, test 13: squared before the weight
    twice = gradient(squared**2 / (squared**2 + c).detach() ** p)
    torch.testing.assert_close(twice, 2 * power(2 * p - 1))
    assert not torch.allclose(twice, own, rtol=1e-2)


# The method


def made(**changes) -> tuple:
    """MeanFlow on two-dimensional data with a random teacher network."""
    teacher = VelocityMLP((2,), 3, 16, 2)
    for p in teacher.parameters():
        nn.init.normal_(p, std=0.2)
    meter = Meter()
    task = Task(
        (2,),
        3,
        partial(VelocityMLP, (2,), 3, width=16, depth=2),
        Teacher(teacher, 3),
        teacher.state_dict(),
        0,
        torch.device("cpu"),
        meter,
    )
    settings = {
        "velocity": "teacher",
        "batch": 16,
        "time_mean": -0.4,
        "time_std": 1.0,
        "diagonal": 0.25,
        "p": 0.5,
        "c": 1e-3,
        "student": {"lr": 1e-3},
    }
    return MeanFlow(task, MeanFlow.Config.model_validate(settings | changes)), task


def batch() -> Batch:
    return Batch(16, Condition(torch.arange(16) % 3), torch.randn(16, 2))


def step() -> Step:
    return Step(0, 10, 0, torch.device("cpu"))


def test_at_the_start_the_student_is_its_teacher_for_every_s():  # 3.4, test 12
    m, task = made()
    x, t, labels = torch.randn(32, 2), torch.rand(32), torch.arange(32) % 4
    v = task.teacher.velocity(x, t, Condition(labels))
    for s in (t, 0 * t, 0.3 * t):
        torch.testing.assert_close(m.net(x, t, labels, s=s), v)
    _, du = task.jvp(m.net, (x, t, 0 * t), (v, torch.ones_like(t), 0 * t), Condition(labels))
    dv = jvp(lambda x, t: task.teacher.network(x, t, labels), (x, t), (v, torch.ones_like(t)))[1]
    torch.testing.assert_close(du, dv, rtol=1e-4, atol=1e-5)
    nn.init.normal_(m.net.gap.last.weight)  # planted: a second time that does not start at zero
    assert not torch.allclose(m.net(x, t, labels, s=0 * t), v, atol=1e-2)


# test 5, and Eq. 10-11 on the others
@pytest.mark.parametrize("velocity", ["teacher", "data"])
def test_diagonal_rows_regress_the_velocity_itself(monkeypatch, velocity):
    m, task = made(velocity=velocity)
    nn.init.normal_(m.net.gap.last.weight, std=0.2)
    for p in m.net.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    data, calls = batch(), captured(monkeypatch, method, "adaptive_loss")
    reference = VelocityMLP((2,), 3, 16, 2, second_time=True)
    reference.load_state_dict(m.net.state_dict())  # as it was before the update
    m.train_step(data, step())
    (((u, target, p, c), _),) = calls
    assert (p, c) == (0.5, 1e-3) and not target.requires_grad and u.requires_grad

    again = step()
    t, s = times.sorted_pair(again.rng("t, s"), 16, -0.4, 1.0, 0.25)
    e = again.rng("e").normal(16, 2)
    x_t = paths.noised(data.x, e, t)
    v = task.teacher.velocity(x_t, t, data.cond) if velocity == "teacher" else e - data.x
    torch.testing.assert_close(u, reference(x_t, t, data.cond.labels, s=s))
    assert torch.equal(target[12:], v[12:]) and torch.equal(t[12:], s[12:])

    def f(x, t, s):
        return reference(x, t, data.cond.labels, s=s)

    du = jvp(f, (x_t, t, s), (v, torch.ones_like(t), torch.zeros_like(s)))[1]
    expected = v - (t - s)[:, None] * du
    torch.testing.assert_close(target, expected, rtol=1e-4, atol=1e-5)
    swapped = (
        v - (t - s)[:, None] * jvp(f, (x_t, t, s), (v, torch.zeros_like(t), torch.ones_like(s)))[1]
    )
    # Planted
    assert not torch.allclose(target, swapped, atol=1e-2) and not torch.allclose(
        target, 2 * v - expected, atol=1e-2
    )


# 3.4: the path followed must be the guided ODE
def test_a_guided_teacher_is_target_and_tangent(
    monkeypatch,
):
    m, task = made(diagonal=0.0)
    data, calls = batch(), captured(monkeypatch, method, "meanflow_target")
    guided = Batch(16, Condition(data.cond.labels, 3.0), data.x)
    seen = []
    original = task.jvp
    task.jvp = lambda net, primals, tangents, *rest: (
        seen.append((primals, tangents)) or original(net, primals, tangents, *rest)
    )
    m.train_step(guided, step())
    (((x_t, t, _), (v_tangent, one, zero)),) = seen
    v = task.teacher.velocity(x_t, t, guided.cond)
    assert (
        torch.equal(v_tangent, v)
        and torch.equal(calls[0][0][0], v)
        and (one == 1).all()
        and (zero == 0).all()
    )
    # Planted: the unguided field
    assert not torch.allclose(v, task.teacher.velocity(x_t, t, data.cond), atol=1e-3)


def test_the_exact_student_has_no_loss(monkeypatch):  # MF9: in distillation the loss floor is 0
    m, _ = made(diagonal=0.25, p=0.0)
    calls = captured(monkeypatch, method, "adaptive_loss")
    m.task.teacher.velocity = lambda x, t, cond: velocity(x.double(), t.double()).float()

    def exact(net, primals, tangents, cond, graph=False):
        x, t, s = (a.double() for a in primals)
        k = len(tangents[0])
        du = jvp(average, (x[:k], t[:k], s[:k]), tuple(d.double() for d in tangents))[1]
        u = torch.cat([average(x[:k], t[:k], s[:k]), velocity(x[k:], t[k:])])
        return u.float() + 0 * net.leave.bias.sum(), du.float()

    m.task.jvp = exact
    m.train_step(batch(), step())
    assert calls[0][1] < 1e-8
    m.task.jvp = lambda *args: (exact(*args)[0], -exact(*args)[1])  # planted: the sign of du/dt
    m.train_step(batch(), step())
    assert calls[1][1] > 1e-3


def test_sampling_follows_the_grid_with_as_many_evaluations():  # section 5
    m, task = made()
    seen = []
    m.net.register_forward_hook(
        lambda _m, args, kwargs, _o: seen.append((float(args[1][0]), float(kwargs["s"][0]))),
        with_kwargs=True,
    )
    for nfe, expected in (
        (1, [(1.0, 0.0)]),
        (2, [(1.0, 0.5), (0.5, 0.0)]),
        (4, [(1.0, 0.75), (0.75, 0.5), (0.5, 0.25), (0.25, 0.0)]),
    ):
        seen.clear()
        x = m.sample(torch.randn(6, 2), Condition(torch.arange(6) % 3), nfe, None)
        assert seen == expected and x.shape == (6, 2)
    z, labels = torch.randn(6, 2), torch.arange(6) % 3
    one = torch.ones(6)
    torch.testing.assert_close(
        m.sample(z, Condition(labels), 1, None),
        z - task.teacher.velocity(z, one, Condition(labels)),
    )
