"""FSF-DMD's reconstruction against closed forms: the bias table and tests of specs/fsf_dmd.md."""

import sys
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from pydantic import ValidationError
from torch import Tensor, nn

from distillbench import times
from distillbench.matching import matching_gradient, pseudo_loss
from distillbench.method import Batch, Condition, Step
from distillbench.paths import denoiser, jump, noised, over
from distillbench.reading import merged
from distillbench.registry import folders
from tests.conftest import captured
from tests.toys import calls_of_cycle, random_task, shake, weights

FOLDER = Path(__file__).parents[1] / "methods/fsf_dmd"
FSFDMD = folders.load(SimpleNamespace(name="fsf_dmd", path=FOLDER))
method = sys.modules[FSFDMD.__module__]
FILE = yaml.safe_load((FOLDER / "config.yaml").read_text())
VARIANTS = {None: {}} | {name: v["config"] for name, v in FILE["variants"].items()}
SHAPE, N, CPU = (1, 4, 4), 16, torch.device("cpu")
PLAYER = {"lr": 1e-2, "warmup": 0.0}


def made(variant: str | None = None, **changes) -> tuple:
    """An arm with a random teacher and, where it starts from one, a random flow map."""
    task = random_task(SHAPE)
    flow_map = task.network("teacher", second_time=True)
    for p in flow_map.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    task._weights["start"] = flow_map.state_dict()
    settings = merged(
        merged(FILE["config"], {"batch": N, "student": PLAYER, "critic": PLAYER}), VARIANTS[variant]
    )
    m = FSFDMD(task, FSFDMD.Config.model_validate(merged(settings, changes)))
    if m.critic is not None:
        shake(m.g)
    return m, task


def batch(n: int = N, w: float = 1.0) -> Batch:
    x = 0.5 * torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(5))
    return Batch(n, Condition(torch.arange(n) % 3, w), x)


def step(index: int = 0) -> Step:
    return Step(index, 40, 0, CPU)


# One-dimensional Gaussians: teacher N(0, 1), samples a z with the exact flow map of N(0, a^2).


def spread(t: Tensor, a: Tensor | float) -> Tensor:
    return ((1 - t) ** 2 * a**2 + t**2).sqrt()


def exact_velocity(x: Tensor, t: Tensor, a: Tensor | float = 1.0) -> Tensor:
    return over((t - (1 - t) * a**2) / spread(t, a) ** 2, x) * x


def exact_average(x: Tensor, t: Tensor, s: Tensor, a: Tensor | float) -> Tensor:
    """u of the flow of N(0, a^2), at s = t the velocity."""
    gap = t - s
    off = (1 - spread(s, a) / spread(t, a)) / torch.where(gap > 0, gap, 1.0)
    return over(torch.where(gap > 0, off, (t - (1 - t) * a**2) / spread(t, a) ** 2), x) * x


TIMES = ((torch.arange(2000, dtype=torch.float64) + 0.5) / 2000).repeat_interleave(4)
# with E: unit variances, no correlation
Z = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64).repeat(2000)[:, None]
E = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64).repeat(2000)[:, None]


def slope(a: float, real, fake, on_sample: bool, law=lambda t: torch.ones_like(t)) -> float:
    """d loss / d a of the method's own losses, with exact expectations but for t.

    `real` and `fake` are velocities of (x_t, t, x, a).
    """
    scale = torch.tensor(a, dtype=torch.float64, requires_grad=True)
    u = (1 - scale) * Z  # exact_average(Z, 1, 0)
    sample = Z - u
    x = sample.detach()
    x_t = noised(x, E, TIMES)
    delta = over(law(TIMES), x) * (real(x_t, TIMES, x, a) - fake(x_t, TIMES, x, a))
    loss = (
        pseudo_loss(sample, over(TIMES, x) * delta)
        if on_sample
        else method.surrogate_loss(u, delta)
    )
    return float(torch.autograd.grad(loss, scale)[0])


def stationary(*args, **kwargs) -> float:
    """The a at which the slope changes from negative to positive; descent goes there."""
    low, high = 1e-3, 3.0
    if slope(low, *args, **kwargs) > 0:
        return 0.0
    assert slope(high, *args, **kwargs) > 0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle, *args, **kwargs) < 0 else (low, middle)
    return low


def teacher_of(n: int):
    return lambda x_t, t, x, a: method.unrolled(exact_velocity, x_t, t, n)


def endpoint(x_t, t, x, a):
    return exact_average(x_t, t, 0 * t, a)


def exact_fake(x_t, t, x, a):
    return exact_velocity(x_t, t, a)


def sds(x_t, t, x, a):
    return (x_t - x) / over(t, x)


def within(low: float, high: float):
    return lambda t: ((t >= low) & (t < high)).double()


TABLE = [
    ("exact fake", teacher_of(1), exact_fake, True, {}, 1.0),
    ("R1, on samples", teacher_of(1), endpoint, True, {}, 0.53),
    ("R1, on velocities", teacher_of(1), endpoint, False, {}, 0.58),
    ("R2-2", teacher_of(2), endpoint, True, {}, 0.72),
    ("R2-3", teacher_of(3), endpoint, True, {}, 0.80),
    ("R2-4", teacher_of(4), endpoint, True, {}, 0.84),
    ("R2-8", teacher_of(8), endpoint, True, {}, 0.915),
    ("R2-16", teacher_of(16), endpoint, True, {}, 0.956),
    ("R2-64", teacher_of(64), endpoint, True, {}, 0.989),
    ("low noise", teacher_of(1), endpoint, True, {"law": within(0, 0.3)}, 0.69),
    ("middle", teacher_of(1), endpoint, True, {"law": within(0.3, 0.7)}, 0.56),
    ("high noise", teacher_of(1), endpoint, True, {"law": within(0.7, 1)}, 0.24),
    ("SDS", teacher_of(1), sds, True, {}, 0.0),
]


# the table of (g), tests 1, 2, 5
@pytest.mark.parametrize(
    "name, real, fake, on_sample, law, expected", TABLE, ids=[row[0] for row in TABLE]
)
def test_bias_of_the_surrogate(name, real, fake, on_sample, law, expected):
    found = stationary(real, fake, on_sample, **law)
    assert abs(found - expected) <= 0.01 + 0.01 * expected
    if name == "R1, on samples":
        # Planted: u(x_t, t, t), which here is the exact fake velocity.
        def on_diagonal(x_t, t, x, a):
            return exact_average(x_t, t, t, a)

        assert abs(stationary(real, on_diagonal, on_sample) - expected) > 0.4  # test 9
        # Planted, test 7: Delta with the other sign
        assert slope(0.2, fake, real, on_sample) > 0 > slope(0.2, real, fake, on_sample)


# test 3: at the teacher's own flow map nothing is left
def test_the_flow_maps_endpoint_is_the_limit_of_unrolling():
    x, t = torch.randn(200, 1, dtype=torch.float64), TIMES[:800:4].contiguous()
    limit = exact_average(x, t, 0 * t, 1.0)
    errors = [
        float((method.unrolled(exact_velocity, x, t, n) - limit).abs().max())
        for n in (1, 8, 64, 512)
    ]
    # test 4: R1 leaves a bias
    assert errors[0] > 0.1 and errors[-1] < 5e-3 and errors == sorted(errors, reverse=True)
    x_0 = x
    for i in range(8):  # (x_t - Phi) / t with Euler's own steps
        x_0 = x_0 - over(t / 8, x) * exact_velocity(x_0, t * (1 - i / 8))
    torch.testing.assert_close(method.unrolled(exact_velocity, x, t, 8), (x - x_0) / over(t, x))


def test_correlation_of_the_endpoint_with_its_own_sample():  # test 11
    for t, expected in ((0.1, 0.99), (0.3, 0.92), (0.5, 0.71), (0.7, 0.39), (0.9, 0.11)):
        (x, e), at = (
            torch.randn(2, 400_000, 1, dtype=torch.float64),
            torch.full((400_000,), t, dtype=torch.float64),
        )
        x_t = noised(x, e, at)
        end = jump(x_t, exact_average(x_t, at, 0 * at, 1.0), at, 0 * at)
        assert abs(float(torch.corrcoef(torch.stack([end[:, 0], x[:, 0]]))[0, 1]) - expected) < 0.01


class Map(nn.Module):
    """The exact flow map of N(0, a^2), in the place of the student."""

    def __init__(self, a: float):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(a))

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None, *, s: Tensor) -> Tensor:
        return exact_average(x, t, s, self.a)


def matched(m, a: float, variant_of=None) -> float:
    """d L_FSF / d a by `FSFDMD.matching` itself, 100,000 samples of one number."""
    m.net, m.task._teacher = (
        Map(a),
        SimpleNamespace(velocity=lambda x, t, cond: exact_velocity(x, t)),
    )
    z, one = torch.randn(100_000, 1), torch.ones(100_000)
    u = m.net(z, one, s=0 * one)
    loss, _ = m.matching(u, jump(z, u, one, 0 * one), Condition(None), step())
    return float(torch.autograd.grad(loss, m.net.a)[0])


def test_the_method_itself_has_that_bias(monkeypatch):
    m, _ = made()
    assert matched(m, 0.54) < 0 < matched(m, 0.62)  # 0.58 on velocities
    m, _ = made(unroll=64)
    assert matched(m, 0.95) < 0 < matched(m, 1.02)
    # test 9: the diagonal of an exact student is the exact fake velocity
    m, _ = made("diagonal-fake")
    assert matched(m, 0.95) < 0 < matched(m, 1.05)
    m, _ = made("sds")
    assert matched(m, 0.1) > 0  # contracts to a point
    original = FSFDMD.fake
    # Planted
    monkeypatch.setattr(
        FSFDMD, "fake", lambda self, x_t, t, v, cond: -original(self, x_t, t, v, cond)
    )
    m, _ = made()
    assert not matched(m, 0.54) < 0 < matched(m, 0.62)


# The losses.


# tests 7, 8: the step on a sample is -tau Delta, or parallel to it
def test_gradient_of_the_velocity_form_and_its_twin():
    torch.manual_seed(2)
    start, v_real, v_fake, e = torch.randn(4, 8, 5, dtype=torch.float64).unbind(0)
    tau, t = torch.full((8,), 0.5, dtype=torch.float64), torch.rand(8, dtype=torch.float64)
    u = torch.randn(8, 5, dtype=torch.float64, requires_grad=True)
    delta = v_real - v_fake
    (g,) = torch.autograd.grad(method.surrogate_loss(u, delta), u)
    torch.testing.assert_close(g, -2 * delta / 8)
    step_on_sample = -over(tau, u) * -g  # x = start - tau u, u moves by -g
    torch.testing.assert_close(step_on_sample, -over(tau, u) * delta * 2 / 8)
    sample = jump(start, u, tau, 0 * tau)
    (g_twin,) = torch.autograd.grad(
        pseudo_loss(sample, matching_gradient(v_real, v_fake, sample.detach(), e, t, "residual")), u
    )
    cosine = nn.functional.cosine_similarity(g, g_twin, dim=1)
    torch.testing.assert_close(cosine, torch.ones_like(cosine))
    # Planted: the other sign
    assert not torch.allclose(torch.autograd.grad(method.surrogate_loss(u, -delta), u)[0], g)


def test_only_the_generating_evaluation_has_a_gradient(monkeypatch):  # test 6
    for variant in (
        None,
        "residual",
        "diagonal-fake",
        "average-surrogate",
        "initial-map",
        "explicit-fake",
        "self-teacher",
    ):
        m, _ = made(variant)
        losses, pseudo, graphs = (
            captured(monkeypatch, method, "surrogate_loss"),
            captured(monkeypatch, method, "pseudo_loss"),
            [],
        )

        def note(_module, args, out, graphs=graphs):
            value = out if isinstance(out, Tensor) else out.value  # of the pass with tangents
            graphs.append((len(value), value.requires_grad))

        hook = m.net.register_forward_hook(note)
        m.train_step(batch(), step())
        hook.remove()
        ((args, loss),) = losses or pseudo
        assert loss.requires_grad and args[0].requires_grad and not args[1].requires_grad
        # the one pass of both losses; no other keeps a graph
        assert [rows for rows, graph in graphs if graph] == [2 * N]
        monkeypatch.undo()


def test_the_matching_term_alone(monkeypatch):
    """Its gradient is that of |u - sg(u + Delta)|^2 at the drawn time of a reference network.

    Everything else is constant.
    """
    m, task = made("unrolled", steps=1)
    before = task.network("start", second_time=True)
    before.load_state_dict(m.net.state_dict())
    calls = captured(monkeypatch, method, "surrogate_loss")
    data, gradients = batch(), []
    m.student.update = lambda loss: gradients.extend(
        torch.autograd.grad(calls[0][1], m.student.parameters)
    )
    m.train_step(data, step())
    again = step()
    z, t, e = (
        again.rng("z").normal(N, *SHAPE),
        again.rng("matching t").uniform(N),
        again.rng("matching e").normal(N, *SHAPE),
    )
    labels, one = data.cond.labels, torch.ones(N)
    u = before(z, one, labels, s=0 * one)
    x = (z - u).detach()
    x_t = noised(x, e, t)

    def gradient(s: Tensor, n: int, sign: float = 1.0) -> list[Tensor]:
        x_0 = x_t
        for i in range(n):
            x_0 = x_0 - over(t / n, x) * task.teacher.velocity(x_0, t * (1 - i / n), data.cond)
        delta = ((x_t - x_0) / over(t, x) - before(x_t, t, labels, s=s)).detach()
        loss = (u - (u.detach() + sign * delta)).square().sum((1, 2, 3)).mean()
        return torch.autograd.grad(loss, list(before.parameters()), retain_graph=True)

    def close(other):
        return all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in zip(gradients, other))

    assert close(gradient(0 * t, 4))
    # Planted
    assert (
        not close(gradient(t, 4))
        and not close(gradient(0 * t, 1))
        and not close(gradient(0 * t, 4, -1.0))
    )


def test_backward_simulation():  # test 10, (b.4)
    m, _ = made(steps=1)
    z = step().rng("z").normal(N, *SHAPE)
    start, tau = m.simulated(N, batch().cond, step())
    assert torch.equal(start, z) and (tau == 1).all()
    m, _ = made()
    labels, one = batch().cond.labels, torch.ones(N)
    seen = []
    for index in range(2):
        z = step(index).rng("z").normal(N, *SHAPE)
        start, tau = m.simulated(N, batch().cond, step(index))
        assert not start.requires_grad
        seen.append(float(tau[0]))
        if seen[-1] == 0.5:
            torch.testing.assert_close(start, z - 0.5 * m.net(z, one, labels, s=0.5 * one).detach())
            other, _ = made("renoising")
            other.net.load_state_dict(m.net.state_dict())
            again, _ = other.simulated(N, batch().cond, step(index))
            fresh = step(index).rng("renoise").normal(N, *SHAPE)
            x = z - m.net(z, one, labels, s=0 * one).detach()
            torch.testing.assert_close(again, 0.5 * x + 0.5 * fresh)
            assert not torch.allclose(again, start, atol=1e-2)
    assert sorted(seen) == [0.5, 1.0]  # each step of the student once in a cycle


def test_flow_map_rows_are_meanflows(monkeypatch):
    """The other loss is MeanFlow's on the first rows, whether or not matching rows follow."""
    targets = []
    for variant in (None, "flow-map-only"):
        m, _ = made(variant)
        calls = captured(monkeypatch, method, "adaptive_loss")
        m.train_step(batch(), step())
        ((u, target, p, c), _) = calls[0]
        assert u.shape == (N, *SHAPE) and (p, c) == (0.5, 1e-3)
        targets.append((u.detach(), target))
        monkeypatch.undo()
    torch.testing.assert_close(targets[0], targets[1])
    m, task = made()
    again = step()
    t, s = times.sorted_pair(again.rng("t, s"), N, 0.0, 1.8, 0.25)
    x_t = noised(batch().x, again.rng("e").normal(N, *SHAPE), t)
    torch.testing.assert_close(targets[0][0], m.net(x_t, t, batch().cond.labels, s=s).detach())
    torch.testing.assert_close(targets[0][1][12:], task.teacher.velocity(x_t, t, batch().cond)[12:])


def test_starts():
    m, task = made()
    assert torch.equal(
        weights(m.net), torch.cat([v.flatten() for k, v in task._weights["start"].items()])
    )
    m, task = made("from-flow-matching")
    x, t = torch.randn(N, *SHAPE), torch.rand(N)
    torch.testing.assert_close(
        m.net(x, t, batch().cond.labels, s=0 * t), task.teacher.velocity(x, t, batch().cond)
    )
    m, task = made("self-teacher")
    assert not FSFDMD.needs(m.config).teacher and not torch.allclose(
        m.net.enter.weight, task._weights["teacher"]["enter.weight"]
    )
    (m, task), t = made("self-teacher"), torch.rand(N)
    torch.testing.assert_close(m.real(x, t, batch().cond), m.net(x, t, batch().cond.labels, s=t))


def test_each_variant_changes_the_update():
    def moved(variant: str | None) -> Tensor:
        m, _ = made(variant)
        for i in range(5):
            m.train_step(batch(), step(i))
        return weights(m.net)

    results = {name: moved(name) for name in VARIANTS}
    equal = {(a, b) for a, b in combinations(results, 2) if torch.equal(results[a], results[b])}
    # they differ in how many updates the budget buys
    assert equal == {("flow-map-only", "equal-updates")}


def test_without_weight_the_term_moves_nothing():
    """The control of equal updates is the flow-map loss alone, step by step."""
    a, b = made("flow-map-only")[0], made("equal-updates")[0]
    for i in range(3):
        a.train_step(batch(), step(i))
        b.train_step(batch(), step(i))
    torch.testing.assert_close(weights(a.net), weights(b.net), rtol=1e-4, atol=1e-5)
    c, _ = made()
    for i in range(3):
        c.train_step(batch(), step(i))
    assert not torch.allclose(weights(a.net), weights(c.net), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"every": 2}, "needs fake: critic"),
        ({"real": "start", "unroll": 4}, "unroll 4 needs real: teacher"),
        ({"real": "start", "init": "teacher"}, "real: start needs init: start"),
        ({"diagonal": 0.99}, "leaves no row"),
    ],
)
def test_settings_that_do_not_fit(changes, words):
    with pytest.raises(ValidationError, match=words):
        made(**changes)


# What it costs: two steps of simulation (one evaluation of the student in all),
# in each its pass, tangents and the rest.


def cost(
    student: int, teacher: int, passes: int = 2, critic: int = 0, **more: int
) -> dict[str, int]:
    found = {
        "student": student,
        "student.tangent": passes,
        "student.backward": passes,
        "teacher": teacher,
    } | more
    return {
        k: v for k, v in (found | {"critic": 2 * critic, "critic.backward": critic}).items() if v
    }


COSTS = {
    None: cost(2 * 2 + 1, 2 * 2),
    "equal-updates": cost(2 * 2 + 1, 2 * 2),
    "flow-map-only": cost(1, 1, passes=1),
    "unrolled": cost(2 * 2 + 1, 2 * (1 + 4)),
    "initial-map": cost(2 * 2 + 1, 2, network=2),
    "heavy": cost(2 * 2 + 1, 2 * 2),
    "average-surrogate": cost(2 * 2 + 1, 2 * 2),
    "residual": cost(2 * 2 + 1, 2 * 2),
    "low-noise": cost(2 * 2 + 1, 2 * 2),
    "no-simulation": cost(2, 2, passes=1),
    "renoising": cost(2 * 2 + 1, 2 * 2),
    # five critic steps to one of the student, at each of two steps:
    # 10 samples, of which 5 begin with one more evaluation
    "explicit-fake-no-simulation": cost(5, 2, passes=1) | {"critic": 5 + 1, "critic.backward": 5},
    "explicit-fake": cost(10 + 5, 2 * 2) | {"critic": 10 + 2, "critic.backward": 10},
    "diagonal-fake": cost(2 * 2 + 1, 2 * 2),
    "sds": cost(2 + 1, 2 * 2),
    "from-flow-matching": cost(2 * 2 + 1, 2 * 2),
    "self-teacher": cost(2 * 3 + 1, 0),
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("start", [0, 3])
def test_no_evaluation_more_than_the_algorithm_needs(name, start):
    m, task = made(name)
    assert calls_of_cycle(m, task, FSFDMD.needs(m.config).cycle, start, batch()) == COSTS[name]


def test_samples_jump_along_a_uniform_grid():
    m, _ = made()
    z, labels, one = torch.randn(N, *SHAPE), batch().cond.labels, torch.ones(N)
    x = z - 0.5 * m.net(z, one, labels, s=0.5 * one)
    x = x - 0.5 * m.net(x, 0.5 * one, labels, s=0 * one)
    torch.testing.assert_close(m.sample(z, Condition(labels), 2, None), x)
    torch.testing.assert_close(
        denoiser(z, m.net(z, one, labels, s=0 * one), one), m.sample(z, Condition(labels), 1, None)
    )
