"""TVM against its closed form and its paper: specs/tvm.md sections 1, 3, 10, by test number."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn
from torch.func import functional_call, jvp

from distillbench import paths, reading, times
from distillbench.config import MethodFile
from distillbench.method import Batch, Condition, Step
from distillbench.networks import mlp
from distillbench.registry import folders
from distillbench.samplers import jumps
from tests.conftest import captured
from tests.test_jvp import explicit_layer_norm
from tests.toys import CLASSES, random_task, shake, weights

FOLDER = Path(__file__).parents[1] / "methods/tvm"
TVM = folders.load(SimpleNamespace(name="tvm", path=FOLDER))
method = sys.modules[TVM.__module__]
FILE = MethodFile.model_validate(yaml.safe_load((FOLDER / "config.yaml").read_text()))
VARIANTS = [None, *FILE.variants]
SCRATCH = [
    name for name in VARIANTS if name and (name.startswith("scratch") or name.startswith("target"))
]
C, N = 0.6, 24  # data N(0, C^2)


def scale(t: Tensor) -> Tensor:
    return ((1 - t) ** 2 * C**2 + t**2).sqrt()


def velocity(x: Tensor, t: Tensor) -> Tensor:
    """v = x (t - (1-t) c^2) / S_t^2."""
    return x * paths.over((t - (1 - t) * C**2) / scale(t) ** 2, x)


def average(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """u = x (1 - S_s / S_t) / (t-s), and v where s = t."""
    gap = torch.where(t == s, 1.0, t - s)
    return torch.where(
        paths.over(t == s, x), velocity(x, t), x * paths.over((1 - scale(s) / scale(t)) / gap, x)
    )


def in_s(f, x: Tensor, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """u and du/ds at fixed (x, t)."""
    return jvp(lambda s: f(x, t, s), (s,), (torch.ones_like(s),))


def point(n: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """x [n, 5], t, s with t - s > 0.05, float64."""
    t = 0.3 + 0.7 * torch.rand(n, dtype=torch.float64)
    return (
        torch.randn(n, 5, dtype=torch.float64),
        t,
        (t - 0.05) * torch.rand(n, dtype=torch.float64),
    )


def near(a: Tensor, b: Tensor, tolerance: float = 1e-9) -> bool:
    return bool((a - b).abs().max() < tolerance)


def fresh(name: str | None = None, **changes):
    """TVM, or a variant of it, on two-dimensional data with a random teacher."""
    settings = reading.merged(FILE.config, FILE.variants[name].config if name else {})
    m = TVM(
        random_task((2,)),
        TVM.Config.model_validate(reading.merged(settings, {"batch": N} | changes)),
    )
    m.student.total_updates = 140  # half-lives of 0.6, 5.6 and 56 updates differ within 20
    return m


def made(name: str | None = None, **changes) -> tuple:
    """The same with its network off its start."""
    m = fresh(name, **changes)
    nn.init.normal_(m.net.gap.last.weight, std=0.2)
    shake(m.net)
    return m, m.task


def batch(weight: float = 1.0) -> Batch:
    g = torch.Generator().manual_seed(3)
    return Batch(N, Condition(torch.arange(N) % CLASSES, weight), torch.randn(N, 2, generator=g))


def step(i: int = 0) -> Step:
    return Step(i, 10, 0, torch.device("cpu"))


def loss_of(m, data: Batch, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """The loss of an update that is not made, with its graph."""
    seen: list[Tensor] = []
    monkeypatch.setattr(m.student, "update", seen.append)
    m.train_step(data, step())
    return seen[0]


def relative(a: Tensor, b: Tensor) -> float:
    return float(((a - b).norm() / b.norm()).detach())


# The closed form


def test_closed_form_identities():  # test 1
    x, t, s = point()
    u, du = in_s(average, x, t, s)
    v = velocity(paths.jump(x, u, t, s), s)
    dx_ds = method.terminal_velocity(u, du, t, s)
    assert near(dx_ds, v)  # dX/ds = v(X, s)
    assert near(method.terminal_loss(dx_ds, v, t, s, 1.0), torch.zeros_like(t))
    assert not near(method.terminal_velocity(u, -du, t, s), v, 0.1)  # planted: + (t-s) du/ds
    # Planted: MeanFlow's derivative, along t
    planted = jvp(lambda t: average(x, t, s), (t,), (torch.ones_like(t),))[1]
    assert not near(method.terminal_velocity(u, planted, t, s), v, 0.1)


def test_the_anchor_is_least_at_the_marginal_velocity():  # test 1: B
    n = 100_000
    s, x, e = (
        torch.full((n,), 0.6, dtype=torch.float64),
        C * torch.randn(n, 1).double(),
        torch.randn(n, 1).double(),
    )
    x_s = paths.noised(x, e, s)
    for target, least in ((e - x, True), (x - e, False)):  # planted: the other sign

        def b(a, target=target):
            return method.weighted_error(velocity(x_s, s) + a * x_s, target, 1.0).mean()

        assert (b(0.0) < b(0.05) and b(0.0) < b(-0.05)) == least


@pytest.mark.parametrize("wrong", [False, True])
def test_the_gradient_pushes_a_perturbed_map_back(wrong):  # test 2: u + eps x, in A + B
    x, t, s = point(4096)
    x, signs = x * paths.over(scale(t), x), []
    for start in (-0.02, 0.02):
        eps = torch.tensor(start, dtype=torch.float64, requires_grad=True)

        def perturbed(x, t, s, eps=eps):
            return average(x, t, s) + eps * x

        u, du = in_s(perturbed, x, t, s)
        # Planted: sign of (s-t)
        dx_ds = (
            method.terminal_velocity(u, du, s, t)
            if wrong
            else method.terminal_velocity(u, du, t, s)
        )
        a = method.terminal_loss(dx_ds, velocity(paths.jump(x, u, t, s), s), t, s, 1.0)
        b = method.weighted_error(perturbed(x, s, s), velocity(x, s), 1.0)
        (g,) = torch.autograd.grad((a + b).mean(), eps)
        signs.append(bool(g * start > 0))
    assert all(signs) != wrong


def test_jumps_with_the_exact_average_velocity_agree_for_any_number_of_steps():  # test 12
    z = torch.randn(64, 5, dtype=torch.float64)
    one = jumps(average, z, 1)
    assert near(one, C * z) and near(
        one, z - average(z, torch.ones(64).double(), torch.zeros(64).double())
    )
    for steps in (2, 4, 7):
        assert near(jumps(average, z, steps), one)
        # Planted: another s
        assert not near(jumps(lambda x, t, s: average(x, t, s - 0.05), z, steps), one, 1e-2)


# Derivative and gradient


def test_derivative_in_s_is_minus_that_in_the_gap():  # test 3
    m, task = made()
    data, (t, s) = batch(), times.gap_pair(step().rng("t, s"), N, -0.8, 1.0, -0.4, 1.0)
    x = data.x
    _, du = task.jvp(m.net, (x, t, s), (0 * x, 0 * t, 1 + 0 * s), data.cond, graph=True)
    h = 5e-3

    def f(s):
        return m.net(x, t, data.cond.labels, s=s)

    torch.testing.assert_close(du, (f(s + h) - f(s - h)) / (2 * h), rtol=1e-2, atol=2e-3)

    def embedded(gap):
        return m.net(x, t, data.cond.labels, s=t - gap)

    in_gap = jvp(embedded, (t - s,), (-torch.ones_like(s),))[1]
    torch.testing.assert_close(du, in_gap, rtol=1e-4, atol=1e-5)
    in_t = jvp(lambda t: m.net(x, t, data.cond.labels, s=s), (t,), (torch.ones_like(t),))[1]
    # Planted: tangent +1, MeanFlow's derivative
    assert relative(-in_gap, du) > 1 and relative(in_t, du) > 0.1


def objective(m, reference: dict[str, Tensor], bar: dict[str, Tensor], data: Batch) -> Tensor:
    """The paper's loss on the draws of `step()`, with torch.func.jvp: w = 1, u = F, data form."""
    again, c, labels = step(), m.config, data.cond.labels
    t, s = times.gap_pair(again.rng("t, s"), N, c.time_mean, c.time_std, c.s_mean, c.s_std)
    e, s2 = again.rng("e").normal(N, 2), times.logit_normal(again.rng("s'"), N, c.s_mean, c.s_std)
    labels = labels.masked_fill(again.rng("dropout").uniform(N) < c.label_dropout, CLASSES)

    def u(p, x, t, s):
        return functional_call(m.net, p, (x, t, labels), {"s": s})

    x_t, x_s = paths.noised(data.x, e, t), paths.noised(data.x, e, s2)

    def map_to(s):
        return x_t - (t - s)[:, None] * u(reference, x_t, t, s)

    x, dx_ds = jvp(map_to, (s,), (torch.ones_like(s),))
    a = (dx_ds - u(bar, x.detach(), s, s).detach()).square().mean()
    return a + (u(reference, x_s, s2, s2) - (e - data.x)).square().mean()


def test_gradient_is_that_of_the_papers_objective(monkeypatch):  # section 3; test 4
    m, _ = made("scratch", label_dropout=0.3)
    shake(m.student.averaged("target"))
    data, names = batch(), [k for k, _ in m.net.named_parameters()]

    def flat(gradients):
        return torch.cat([g.flatten() for g in gradients])

    ours = flat(torch.autograd.grad(loss_of(m, data, monkeypatch), m.student.parameters))
    m.config = m.config.model_copy(update={"detach_jvp": True})
    detached = flat(torch.autograd.grad(loss_of(m, data, monkeypatch), m.student.parameters))
    m.config = m.config.model_copy(update={"detach_jvp": False})
    # torch's own is wrong in second order (test_jvp.py)
    monkeypatch.setattr(F, "layer_norm", explicit_layer_norm)
    parameters = dict(m.net.named_parameters())

    def gradient(bar: dict[str, Tensor]) -> Tensor:
        return flat(
            torch.autograd.grad(objective(m, parameters, bar, data), [parameters[k] for k in names])
        )

    expected = gradient(dict(m.student.averaged("target").named_parameters()))
    assert relative(ours, expected) < 1e-3
    # Planted: no u_bar
    assert relative(gradient({k: v.detach() for k, v in parameters.items()}), expected) > 1e-2
    assert relative(detached, expected) > 1e-2  # planted: the derivative cut off the graph


# test 4: X, u_bar, guidance's null
@pytest.mark.parametrize("name", [None, "with-anchor", "scratch", "target-ema-0", "scratch-rms"])
def test_nothing_flows_into_targets_and_their_arguments(monkeypatch, name):
    m, _ = made(name)
    data, seen, original = batch(2.0), [], m.velocity

    def watched(x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        v = original(x, t, cond)
        assert not x.requires_grad and not v.requires_grad
        seen.append(v.requires_grad_())
        return v

    def reached() -> list[bool]:
        seen.clear()
        loss = loss_of(m, data, monkeypatch)
        assert any(
            g.any()
            for g in torch.autograd.grad(
                loss, m.student.parameters, retain_graph=True, allow_unused=True
            )
            if g is not None
        )
        return [g is not None for g in torch.autograd.grad(loss, seen, allow_unused=True)]

    monkeypatch.setattr(m, "velocity", watched)
    assert reached() == [False] * (2 if m.config.anchor else 1)
    # Planted: no sg
    monkeypatch.setattr(
        method, "weighted_error", lambda u, target, w: (u - target).square().flatten(1).mean(1)
    )
    assert all(reached())


# The loss


# test 5: the mask is of A alone, row by row
def test_rows_with_equal_times_leave_flow_matching(
    monkeypatch,
):
    x, target, t = torch.randn(8, 3), torch.randn(8, 3), torch.rand(8)
    s = torch.where(torch.arange(8) < 3, t, 0.5 * t)
    a = method.terminal_loss(x, target, t, s, 1.0)
    full = method.weighted_error(x, target, 1.0)
    # Planted: full, without the mask
    assert (a[:3] == 0).all() and torch.equal(a[3:], full[3:]) and (full > 0).all()
    m, _ = made("scratch", label_dropout=0.0)
    monkeypatch.setattr(m, "times", lambda rng, n: (times.uniform(rng, n),) * 2)
    calls, data = captured(monkeypatch, method, "weighted_error"), batch()
    loss = loss_of(m, data, monkeypatch)
    assert torch.equal(loss, calls[1][1].mean()) and calls[0][1].mean() > 0
    again = step()
    e, s2 = again.rng("e").normal(N, 2), times.logit_normal(again.rng("s'"), N, -0.4, 1.0)
    matching = (
        (m.net(paths.noised(data.x, e, s2), s2, data.cond.labels, s=s2) - (e - data.x))
        .square()
        .mean()
    )
    torch.testing.assert_close(loss, matching)


# test 6: on A and on B; and what cancels with u = w F
def test_the_weight_is_beta_on_the_residual():
    f, df, f_bar, null, v = torch.randn(5, 8, 3, dtype=torch.float64)
    w, t = 1 + torch.rand(8, dtype=torch.float64), torch.rand(8, dtype=torch.float64)
    s, column = 0.5 * t, w[:, None]
    beta = 1 / column
    u, du, u_bar = column * f, column * df, column * f_bar
    a = method.terminal_loss(method.terminal_velocity(u, du, t, s), u_bar, t, s, w)
    torch.testing.assert_close(a, (f + (s - t)[:, None] * df - f_bar).square().mean(1))
    b = method.weighted_error(u, method.anchor_target(v, null, w), w)
    torch.testing.assert_close(b, (f - v - (beta - 1) * null).square().mean(1))
    for target in (u_bar, method.anchor_target(v, null, w)):
        own = method.weighted_error(u, target, w)
        torch.testing.assert_close(own, ((u - target) * beta).square().mean(1))
        torch.testing.assert_close(own, (u - target).square().mean(1) / w**2)
        assert not torch.allclose(own, (u - target).square().mean(1) / w)  # planted: 1/w
    # Planted: 1 - w in place of 1/w - 1
    assert not torch.allclose(b, (f - v - (1 - column) * null).square().mean(1))


MU, SIGMA = 1.0, 0.5


def of_class(x: Tensor, t: Tensor, sign: Tensor) -> Tensor:
    """Velocity of data N(sign MU, SIGMA^2); all [n]."""
    return (t - (1 - t) * SIGMA**2) / ((1 - t) ** 2 * SIGMA**2 + t**2) * (
        x - (1 - t) * sign * MU
    ) - sign * MU


# test 7: two classes at -MU and MU; least squares on the exact fields finds their weights
def test_fixed_point_of_guidance():
    n, w = 200_000, 2.5
    m, task = made("scratch", label_dropout=0.1)
    task.classes = 2
    labels, s = torch.arange(n) % 2, torch.full((n,), 0.45)
    sign = 2.0 * labels - 1
    x, e = sign * MU + SIGMA * torch.randn(n), torch.randn(n)
    x_s = (1 - s) * x + s * e
    # of class 1 given x_s
    share = torch.sigmoid(2 * MU * (1 - s) * x_s / ((1 - s) ** 2 * SIGMA**2 + s**2))
    v_null = share * of_class(x_s, s, torch.ones(n)) + (1 - share) * of_class(
        x_s, s, -torch.ones(n)
    )
    v_c = of_class(x_s, s, sign)
    cond = m.conditions(Condition(labels, w), step(), n)
    dropped = cond.labels == 2
    assert abs(dropped.float().mean() - 0.1) < 5e-3 and torch.equal(
        cond.guidance, torch.where(dropped, 1.0, w)
    )

    def fitted(basis: Tensor, rows: Tensor, null: Tensor) -> Tensor:
        m.velocity = lambda x, t, c: (
            null[:, None] if (c.labels == 2).all() and (c.guidance == 1).all() else None
        )
        target = m.anchor_velocity(x_s[:, None], s, (e - x)[:, None], cond)
        return torch.linalg.lstsq(
            torch.stack([basis, v_null], 1)[rows], target[rows]
        ).solution.flatten()

    assert near(fitted(v_c, ~dropped, v_null), torch.tensor([w, 1 - w]), 0.05)
    # what x_s alone can say
    assert near(fitted(x_s, dropped, v_null), torch.tensor([0.0, 1.0]), 0.05)
    # Planted: the conditional field as its own null
    assert not near(fitted(v_c, ~dropped, v_c), torch.tensor([w, 1 - w]), 0.5)


# Order, inputs and networks


def test_the_target_moves_after_the_update_and_starts_as_a_copy(monkeypatch):  # test 9
    m = fresh("scratch", student={"half_lives": {"target": 0.5}})
    assert (
        torch.equal(weights(m.student.averaged("target")), weights(m.net))
        and m.student.averaged("target") is not m.net
    )
    used, after = [], []
    original = m.velocity
    monkeypatch.setattr(
        m,
        "velocity",
        lambda *args: used.append(weights(m.student.averaged("target"))) or original(*args),
    )
    for i in range(3):
        m.train_step(batch(), step(i))
        after.append(weights(m.net))
    assert torch.equal(used[1], after[0])  # what the first update left: AveragedModel starts there
    # a plain mean until it spans the half-life
    torch.testing.assert_close(used[2], 0.5 * (after[0] + after[1]))
    assert not torch.allclose(used[2], after[1], atol=1e-6)  # planted: no average


@pytest.mark.parametrize("name", [None, "with-anchor", "scratch"])
def test_a_drawn_weight_is_an_input_as_its_inverse(name):  # F.1: beta = 1/w, 1 for null rows
    m, _ = made(name, guidance=[1.5, 2.5], label_dropout=0.5)
    nn.init.normal_(m.net.guidance.last.weight, std=0.2)
    seen = []
    for net in {m.net, m.student.averaged(), m.student.averaged("target")}:
        net.register_forward_hook(
            lambda _m, args, kwargs, _o: seen.append((args[2], kwargs["guidance"])),
            with_kwargs=True,
        )
    m.train_step(batch(), step())
    again = step()
    w, dropped = times.uniform(again.rng("w"), N, 1.5, 2.5), again.rng("dropout").uniform(N) < 0.5
    own = 1 / torch.where(dropped, 1.0, w)
    values = [g.value if hasattr(g, "value") else g for _, g in seen]
    conditional = [g for (labels, _), g in zip(seen, values) if not (labels == CLASSES).all()]
    null = [g for (labels, _), g in zip(seen, values) if (labels == CLASSES).all()]
    # Planted: null rows keep w
    assert (
        conditional
        and all(torch.equal(g, own) for g in conditional)
        and not torch.equal(own, 1 / w)
    )
    assert all((g == 1).all() for g in null) and len(null) == (name == "scratch")
    seen.clear()
    m.sample(torch.randn(6, 2), Condition(torch.arange(6) % CLASSES, 2.0), 1, None)
    assert (seen[0][1] == 0.5).all()
    with pytest.raises(ValueError, match="outside the range"):
        m.sample(torch.randn(6, 2), Condition(torch.arange(6) % CLASSES, 1.0), 1, None)


# test 11; the last layer is zero too, so gates move in the second update
@pytest.mark.parametrize("norms", ["rms", "layer"])
def test_rms_norms_start_at_zero_and_gates_jump(
    norms,
):
    m = fresh("scratch", norms=norms)
    gates, labels, x, t = [], torch.arange(N) % CLASSES, torch.randn(N, 2), torch.rand(N)

    def hook(_m, _args, out):
        gates.append(mlp.modulations(out, 3, norms)[2].square().mean().sqrt())

    for i in range(4):
        handle = m.net.blocks[0].modulation.register_forward_hook(hook)
        out = m.net(x, t, labels, s=0.5 * t)
        handle.remove()
        assert out.isfinite().all() and (i > 0 or (out == 0).all())
        m.train_step(batch(), step(i))
    assert gates[0] == gates[1] == 0 and all(
        (0.8 if norms == "rms" else 0) < g < (1.01 if norms == "rms" else 0.1) for g in gates[2:]
    )


def test_settings_that_do_not_fit_are_refused():
    for changes, word in (
        ({"norms": "rms"}, "norms"),
        ({"student": {"lr": 1e-3, "half_lives": {"target": 0.1}}}, "half_lives"),
    ):
        with pytest.raises(ValueError, match=word):
            TVM.Config.model_validate(FILE.config | changes)
    with pytest.raises(ValueError, match="low <= high"):
        TVM.Config.model_validate(FILE.config | {"guidance": [2.0, 1.0]})


# Arms


def cost(student: int, teacher: int = 0) -> dict[str, int]:
    return {"student": student, "student.tangent": 1, "student.backward": 1} | (
        {"teacher": teacher} if teacher else {}
    )


DISTILLED = {
    None: (1, 1),
    "with-anchor": (2, 2),
    "detached-jvp": (1, 1),
    "t-is-1": (1, 1),
    "paper-gap": (1, 1),
    "trunc": (1, 1),
    "clamp": (1, 1),
    "heavy-anchor": (2, 2),
    "heaviest-anchor": (2, 2),
    "trunc-low": (1, 1),
    "trunc-high": (1, 1),
    "gap-larger": (1, 1),
    "t-is-1-with-anchor": (2, 2),
    "beta2-0.999": (1, 1),
    "random-guidance": (
        2,
        4,
    ),  # weights of its own: the teacher is asked twice whatever the benchmark's
    "constant-guidance": (2, 2),
    "random-guidance-scaled": (2, 4),
}
DRAWN = [name for name in VARIANTS if name and "guidance" in FILE.variants[name].config]
COSTS = {name: cost(*counts) for name, counts in DISTILLED.items()} | {
    name: cost(3) for name in SCRATCH
}


@pytest.mark.parametrize("name", VARIANTS)
def test_evaluations_of_an_update(name):
    m, task = made(name)
    twice = (
        {}
        if name in DRAWN
        else {"student": 4}
        if name in SCRATCH
        else {"teacher": 2 * COSTS[name]["teacher"]}
    )
    for weight, more in ((1.0, {}), (2.0, twice)):
        task.meter.calls.clear()
        task.meter.rows.clear()
        with task.meter.counting():
            m.train_step(batch(weight), step())
        # guidance: the teacher's second call, or the null target
        assert dict(task.meter.calls) == COSTS[name] | more
        assert all(
            rows == N * task.meter.calls[role]
            for role, rows in task.meter.rows.items()
            if role != "student.backward"
        )
        assert task.meter.rows["student.tangent"] == N


def test_every_variant_changes_an_update():
    moved = []
    for name in VARIANTS:
        m = fresh(name)
        for i in range(20):
            m.train_step(batch(), step(i))
        moved.append(weights(m.net))

    def alike(a, b):
        # A drawn weight is an input more: another shape.
        return a.shape == b.shape and torch.allclose(a, b, atol=1e-6)

    assert not [
        (VARIANTS[i], VARIANTS[j])
        for i in range(len(moved))
        for j in range(i)
        if alike(moved[i], moved[j])
    ]


@pytest.mark.parametrize("scaled", [False, True])
def test_sampling_follows_the_grid_with_as_many_evaluations(scaled):  # section 5, test 12
    m, _ = made(scaled=scaled)
    seen = []
    m.net.register_forward_hook(
        lambda _m, args, kwargs, _o: seen.append((float(args[1][0]), float(kwargs["s"][0]))),
        with_kwargs=True,
    )
    z, labels = torch.randn(6, 2), torch.arange(6) % CLASSES
    m.student.averages.clear()  # sample the network that the hook watches
    for nfe, expected in (
        (1, [(1.0, 0.0)]),
        (2, [(1.0, 0.5), (0.5, 0.0)]),
        (4, [(1.0, 0.75), (0.75, 0.5), (0.5, 0.25), (0.25, 0.0)]),
    ):
        seen.clear()
        assert m.sample(z, Condition(labels, 2.0), nfe, None).shape == z.shape and seen == expected
    u = m.net(z, torch.ones(6), labels, s=torch.zeros(6))
    one = m.sample(z, Condition(labels, 2.0), 1, None)
    torch.testing.assert_close(one, z - (2 * u if scaled else u))
    # Planted
    assert not torch.allclose(one, z + u) and not torch.allclose(one, z - (u if scaled else 2 * u))
