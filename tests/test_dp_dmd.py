"""DP-DMD against closed forms and its paper: specs/dp_dmd.md (b)-(d), (i), by test number."""

import copy
import sys
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import yaml
from torch import Tensor, nn

from distillbench.method import Batch, Condition, Step
from distillbench.paths import denoiser, noised, over
from distillbench.reading import merged
from distillbench.registry import folders
from distillbench.samplers import euler, heun
from distillbench.seeds import Rng
from tests.conftest import captured
from tests.toys import random_task, shake, watch_updates, weights

FOLDER = Path(__file__).parents[1] / "methods/dp_dmd"
DPDMD = folders.load(SimpleNamespace(name="dp_dmd", path=FOLDER))
method = sys.modules[DPDMD.__module__]
FILE = yaml.safe_load((FOLDER / "config.yaml").read_text())
VARIANTS = {None: {}} | {name: v["config"] for name, v in FILE["variants"].items()}
SHAPE, N, CPU = (1, 4, 4), 16, torch.device("cpu")
# over the settings of digits
SMALL = {
    "batch": N,
    "student": {"lr": 1e-2, "warmup": 0.0},
    "critic": {"lr": 1e-2, "warmup": 0.0},
}
EVERY = {"critic_updates": 1}  # the student moves on each step, but where a test says otherwise


def step(index=0):
    return Step(index, 40, 0, CPU)


def ones(x, value=1.0):
    return x.new_full((len(x),), value)


def made(variant: str | None = None, critic_differs: bool = True, **changes) -> tuple:
    """An arm with a random teacher; `critic_differs` moves the critic off it, where it starts."""
    task = random_task(SHAPE)
    m = DPDMD(
        task,
        DPDMD.Config.model_validate(
            merged(merged(merged(FILE["config"], SMALL), VARIANTS[variant]), EVERY | changes)
        ),
    )
    if critic_differs:
        shake(m.fake)
    return m, task


def batch(n: int = N, w: float = 1.0) -> Batch:
    return Batch(n, Condition(torch.arange(n) % 3, w))


def teacher(w: float = 1.0):
    task = random_task(SHAPE)
    return lambda x, t: task.teacher.velocity(x, t, batch(w=w).cond)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    return bool((a - b).abs().max() <= tolerance * b.abs().max())


@pytest.mark.parametrize("w", [1.0, 3.5])
def test_one_step_is_the_guided_velocity_and_all_are_the_pair(w):  # test 1
    m, _ = made("anchor-1")
    z, velocity = torch.randn(N, *SHAPE), teacher(w)
    for tbar in (0.9, 0.75, 0.0):  # wherever it ends
        m.config = m.config.model_copy(update={"anchor_time": tbar})
        target = m.anchor(z, batch(w=w).cond)
        assert close(target, velocity(z, ones(z))) and not target.requires_grad
    planted = [velocity(z, ones(z, 0.75)), z - velocity(z, ones(z))] + (
        [teacher()(z, ones(z))] if w != 1 else []
    )
    assert not any(close(target, wrong, 0.01) for wrong in planted)
    x, path = z, [z]
    for i in range(10):
        x = x - 0.1 * velocity(x, ones(x, 1 - i / 10))
        path.append(x)
    for k in (1, 3, 5, 10):  # b.1: K of T steps, tbar = 1 - K / T without a shift
        target = method.anchor_target(velocity, z, 1 - k / 10, k, "euler", False)
        assert close(target, (z - path[k]) / (k / 10))
        # Planted: divided by the time of the student's grid
        assert close((z - path[k]) / 0.5, target, 0.01) == (k == 5)
    assert close(method.anchor_target(velocity, z, 0.0, 6, "heun", False), z - heun(velocity, z, 6))


@pytest.mark.parametrize(
    ("tbar", "error"), [(0.9631, 0.050), (0.9353, -0.025), (0.9883, 0.0), (0.8513, 0.0)]
)
def test_tbar_is_not_rounded(tbar, error):  # test 11
    target = method.anchor_target(
        lambda x, t: 0.7 + 0 * x, torch.randn(N, 3), tbar, 4, "euler", False
    )
    torch.testing.assert_close(target, torch.full_like(target, 0.7), rtol=1e-4, atol=0)
    # of the official code
    planted = (1 - tbar) / (1 - torch.tensor(tbar, dtype=torch.bfloat16).item()) - 1
    assert planted == pytest.approx(error, abs=0.003)


@pytest.mark.parametrize("tbar", [0.5, 0.75, 0.9])
def test_the_student_lands_where_its_anchor_says(tbar):  # test 8
    z, velocity, t_1, seen = torch.randn(N, *SHAPE), teacher(), 0.75, []
    target = method.anchor_target(velocity, z, tbar, 4, "heun", False)
    z_tbar = z - (1 - tbar) * target
    method.rollout(lambda x, t: (seen.append(x), target)[1], z, 4, True, True)
    assert close(seen[1], z_tbar + (t_1 - tbar) / (1 - tbar) * (z - z_tbar))
    assert close(seen[1], z_tbar) == (tbar == t_1)  # planted elsewhere: z_tbar itself
    for variant, default in ((None, 0.75), ("two-step", 0.5)):  # t_1 of the student's grid
        assert torch.equal(made(variant)[0].anchor(z, batch().cond), target) == (tbar == default)


def test_the_x0_form():  # test 9; Eq. 39-41: |x_theta(z, 1) - (z_tbar - tbar v(z_tbar, tbar))|^2
    z, v_1, curved = *torch.randn(2, N, *SHAPE), teacher()

    def both(velocity):
        return [method.anchor_target(velocity, z, 0.75, 4, "heun", x0) for x0 in (False, True)]

    secant, tangent = both(lambda x, t: 0 * x + 0.3)  # constant along its paths
    assert close(tangent, secant)
    secant, tangent = both(curved)
    assert not close(tangent, secant, 0.01)
    z_tbar, t = z - 0.25 * secant, ones(z, 0.75)

    def distance(x0):
        return (denoiser(z, v_1, ones(z)) - x0).square().mean()

    torch.testing.assert_close(
        method.diversity_loss(v_1, tangent), distance(denoiser(z_tbar, curved(z_tbar, t), t))
    )
    # Planted: un-noised with z
    assert not close(
        distance(denoiser(z_tbar, secant, t)), method.diversity_loss(v_1, tangent), 1e-3
    )
    assert all(
        torch.equal(made(a)[0].anchor(z, batch().cond), b)
        for a, b in ((None, secant), ("x0-anchor", tangent))
    )


# test 7: one noise is fitted exactly, unlike a posterior mean
def test_the_target_is_a_function_of_the_noise():
    task, z, labels = random_task(SHAPE), torch.randn(1, *SHAPE), torch.zeros(1, dtype=torch.int64)

    def velocity(x, t):
        return task.teacher.velocity(x, t, Condition(labels))

    def fit(target) -> float:
        net, losses = task.network("teacher"), []
        optimiser = torch.optim.Adam(net.parameters(), lr=3e-3)
        for _ in range(300):
            optimiser.zero_grad()
            losses.append(method.diversity_loss(net(z, ones(z), labels), target()))
            losses[-1].backward()
            optimiser.step()
        return torch.stack(losses[-20:]).mean().item()

    assert fit(lambda: method.anchor_target(velocity, z, 0.75, 4, "heun", False)) < 1e-4
    assert fit(lambda: z - torch.randn(1, *SHAPE)) > 0.1  # planted: e - x of another x each time


# E over these four points is exact for polynomials of degree two in (z, e)
Z, E = (
    torch.tensor(v, dtype=torch.float64)[:, None]
    for v in ([1.0, -1.0, 1.0, -1.0], [1.0, 1.0, -1.0, -1.0])
)


def gaussian(x: Tensor, t: Tensor, std: float) -> Tensor:
    """Exact velocity of N(0, std^2)."""
    t = over(t, x)
    return (t - (1 - t) * std**2) / ((1 - t) ** 2 * std**2 + t**2) * x


def given(z: Tensor = Z, e: Tensor = E) -> SimpleNamespace:
    """A step with the draws z, the noise e of the other uses, and uniform 0: t at its lower end."""

    def stream(name):
        return SimpleNamespace(
            normal=lambda *_: z if name == "z" else e, uniform=lambda n: z.new_zeros(n)
        )

    return SimpleNamespace(index=0, rng=stream)


def toy(
    theta: float, fake, real: float, t: float, shape: tuple[int, ...] = (1,), **changes
) -> tuple:
    """DP-DMD with the student v = theta x, a given critic, and all draws at time t.

    The teacher is exact for N(0, real^2).
    """
    m, parameter = (
        DPDMD.__new__(DPDMD),
        torch.tensor(theta, dtype=torch.float64, requires_grad=True),
    )
    m.config = DPDMD.Config.model_validate(
        merged(
            FILE["config"],
            EVERY | {"time_low": t, "time_high": 0.99, "weighting": "velocity"} | changes,
        )
    )
    m.task = SimpleNamespace(
        shape=shape, teacher=SimpleNamespace(velocity=lambda x, t, cond: gaussian(x, t, real))
    )
    m.net = lambda x, t, labels: parameter * x
    m.fake = fake
    m.losses = {}
    m.student, m.critic = (
        SimpleNamespace(update=lambda loss, name=name: m.losses.update({name: loss}))
        for name in ("student", "critic")
    )
    return m, parameter


def slope(
    m, parameter: Tensor, player: str = "student", draws: SimpleNamespace | None = None
) -> float:
    """d loss / d parameter of one update."""
    draws = draws or given()
    m.train_step(Batch(len(draws.rng("z").normal()), Condition(None)), draws)
    return torch.autograd.grad(
        m.losses[player], parameter, allow_unused=True, materialize_grads=True
    )[0].item()


def exact(std: float):
    """The critic that is exact for N(0, std^2)."""
    return lambda x, t, labels: gaussian(x, t, std)


# b.3; KL(q_t | p_t) of x = a z to N(0, 0.5^2)
@pytest.mark.parametrize("t", [0.1, 0.4, 0.9])
@pytest.mark.parametrize("theta", [-0.4, 0.3, 0.8])
@pytest.mark.parametrize("steps", [2, 4])
def test_matching_is_the_gradient_of_the_kl_through_the_later_steps(t, theta, steps):
    r = 1 - theta / steps  # of one step
    a = r**steps
    std = 0.5

    def noised_variance(std):
        return (1 - t) ** 2 * std**2 + t**2

    # d KL / d a
    kl = (1 - t) ** 2 * a * (1 / noised_variance(std) - 1 / noised_variance(a))

    def closed(through):
        return kl * through * -a / (r * steps)  # d a / d theta through so many steps

    changes, unit = {"diversity": 0.0, "steps": steps}, (1 - t) ** 2 / t

    def ours(fake=a, real=std, detach=True):
        return slope(*toy(theta, exact(fake), real, t, detach=detach, **changes)) * unit

    cut, whole = closed(steps - 1), closed(steps)
    assert ours() == pytest.approx(cut, rel=1e-3)
    assert ours(detach=False) == pytest.approx(whole, rel=1e-3)
    assert cut != pytest.approx(whole, rel=0.01)  # planted: either for the other
    assert ours(std, a) == pytest.approx(-cut, rel=1e-3)  # planted: networks exchanged
    assert ours(0.9 * a) != pytest.approx(cut, rel=0.01)  # planted: a critic that lags
    # Stationary where the student's law is the teacher's
    assert ours(real=a) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("tbar", [0.75, 0.5, 0.0])
def test_the_diversity_loss_is_the_gradient_of_its_objective(tbar):  # Eq. 6-8
    theta, std, weight = 0.3, 0.5, 0.7
    k = ((1 - tbar) ** 2 * std**2 + tbar**2) ** 0.5  # z_tbar = k z, the flow of N(0, std^2)
    closed = weight * 2 * (theta - (1 - k) / (1 - tbar))

    # critic = teacher: L_DMD has no gradient
    def ours(fake: float = std, theta: float = theta, **changes) -> float:
        anchor = {"anchor_time": tbar, "anchor_steps": 400, "diversity": weight}
        return slope(*toy(theta, exact(fake), std, 0.4, **(anchor | changes)))

    assert ours() == pytest.approx(closed, rel=1e-3)
    # Stationary at the secant
    assert ours(theta=(1 - k) / (1 - tbar)) == pytest.approx(0, abs=1e-3)
    planted = weight * 2 * (theta - (1 - k))  # z - z_tbar, not over 1 - tbar
    assert (planted == pytest.approx(closed, rel=0.01)) == (tbar == 0)
    alone = ours(0.4, diversity=0.0)
    # Eq. 8: the two gradients add
    assert ours(0.4) == pytest.approx(closed + alone, rel=1e-3) and abs(alone) > 1e-3


# b.4: E (psi x_t - (e - x))^2, x = a z from a rollout of N steps
@pytest.mark.parametrize("t", [0.1, 0.6])
def test_the_critic_regresses_the_velocity_of_the_samples(
    t,
):
    theta, psi = 0.3, torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    a = (1 - theta / 4) ** 4
    variance = (1 - t) ** 2 * a**2 + t**2
    m, parameter = toy(theta, lambda x, t, labels: psi * x, 0.5, t)
    assert slope(m, psi, "critic") == pytest.approx(
        2 * (0.2 * variance - (t - (1 - t) * a**2)), rel=1e-3
    )
    assert slope(m, parameter, "critic") == 0 != slope(m, parameter)

    def best(a):
        """The factor of x in the exact velocity of N(0, a^2)."""
        return (t - (1 - t) * a**2) / ((1 - t) ** 2 * a**2 + t**2)

    psi.data.fill_(best(a))
    assert slope(m, psi, "critic") == pytest.approx(0, abs=1e-12)
    for planted in ((1 - theta / 4) ** 3, 0.5):  # one step less; the teacher
        psi.data.fill_(best(planted))
        assert abs(slope(m, psi, "critic")) > 1e-3


# test 6: 64 coordinates, the paper's normaliser; a falls where theta rises
@pytest.mark.parametrize("a", [0.6, 1.6])
def test_descent_moves_the_scale_to_the_teachers(
    a,
):
    draws, changes = (
        given(*torch.randn(2, 256, 64, dtype=torch.float64)),
        {"weighting": "noisy_residual", "diversity": 0.0},
    )

    def ours(fake, real):
        return slope(*toy(4 * (1 - a**0.25), exact(fake), real, 0.4, (64,), **changes), draws=draws)

    assert ours(a, 1.0) * (1 - a) > 0 and ours(1.0, 1.0) == 0
    assert not ours(1.0, a) * (1 - a) > 0  # planted: the sign


@pytest.mark.parametrize("w", [1.0, 3.5])
def test_gradient_of_the_matching_term(monkeypatch, w):  # test 5; b.3 steps 3 to 5
    m, _ = made("detach-only")
    calls, critic, gradients = (
        captured(monkeypatch, method, "pseudo_loss"),
        copy.deepcopy(m.fake),
        [],
    )
    m.student.update = lambda loss: gradients.extend(torch.autograd.grad(loss, calls[0][0][0]))
    m.train_step(batch(w=w), step())
    x, t, e = (
        calls[0][0][0].detach(),
        0.02 + 0.96 * step().rng("matching t").uniform(N),
        step().rng("matching e").normal(N, *SHAPE),
    )
    x_t = noised(x, e, t)

    def g(real: float = w, size: float = w, reference: Tensor = x_t) -> Tensor:
        """The printed form, (D_fake - D_real) / mean |x_t - D_real| of a sample."""
        d_fake, d_real, d_size = (
            denoiser(x_t, v(x_t, t), t)
            for v in (lambda *a: critic(*a, batch().cond.labels), teacher(real), teacher(size))
        )
        return (
            (d_fake - d_real) / (reference - d_size).abs().mean((1, 2, 3), keepdim=True)
        ).detach() / x.numel()

    assert close(gradients[0], g(), 1e-3)
    planted = [-g(), g() * x.numel(), g(reference=x)] + (
        [g(real=1.0), g(size=1.0)] if w != 1 else []
    )
    # sign, sum, clean x, unguided
    assert not any(close(gradients[0], wrong, 0.01) for wrong in planted)


@pytest.mark.parametrize("detach", [True, False])
def test_the_cut(detach):  # test 3; test 2
    m, _ = made()
    z = torch.randn(N, *SHAPE)

    def velocity(x, t):
        return m.net(x, t, batch().cond.labels)

    x, v_1 = method.rollout(velocity, z, 4, detach, True)
    assert torch.equal(x, euler(velocity, z, 4))
    loss = method.pseudo_loss(x, torch.randn(N, *SHAPE))
    through_first = torch.autograd.grad(loss, v_1, retain_graph=True, allow_unused=True)[0]
    assert (through_first is None) == detach  # planted: without the cut it is there
    assert any(g.any() for g in torch.autograd.grad(loss, m.student.parameters))
    # N = 1 and lambda = 0: nothing to learn
    assert method.rollout(velocity, z, 1, detach, True)[0].requires_grad != detach


REFUSED = {
    "nothing to match": {"steps": 1},
    "must be below": {"time_high": 0.02},
    "one evaluation more": {"anchor_time": 0.0},
}


@pytest.mark.parametrize("why", REFUSED)
def test_settings_without_a_meaning_are_refused(why):
    made("x0-anchor", steps=2, time_high=0.03, anchor_time=0.1)
    with pytest.raises(ValueError, match=why):
        made("x0-anchor", **REFUSED[why])


def test_the_teacher_is_a_stationary_point():  # test 4; with K = 1 the student starts at its target
    def norm(*arm, **changes) -> float:
        m, _ = made(*arm, **changes)
        norms: list[float] = []
        m.student.update = lambda loss: norms.append(
            nn.utils.get_total_norm(torch.autograd.grad(loss, m.student.parameters)).item()
        )
        m.train_step(batch(), step())
        return norms[0]

    assert (
        norm("anchor-1", critic_differs=False) < 1e-7 and norm("plain", critic_differs=False) == 0
    )
    # Planted: the critic differs; an anchor further down the path
    assert norm("anchor-1") > 1e-3 and norm(critic_differs=False) > 1e-4


# b.2: the rollout's own noise; b.4: the full rollout, the same law of t, fresh noise
def test_what_every_network_sees(
    monkeypatch,
):
    n = 2048
    m, _ = made(batch=n)
    cond, net, asked, judged = batch(n).cond, copy.deepcopy(m.net), [], []
    targets, fakes = (
        captured(monkeypatch, method, "diversity_loss"),
        captured(monkeypatch, method, "critic_loss"),
    )
    m.net.register_forward_pre_hook(lambda _m, args: asked.append(args))
    m.fake.register_forward_pre_hook(lambda _m, args: judged.append(args))
    m.train_step(batch(n), step())
    z, (v_1, target), (_, x, e) = step().rng("z").normal(n, *SHAPE), targets[0][0], fakes[0][0]
    assert [a[1][0].item() for a in asked] == [1.0, 0.75, 0.5, 0.25] and all(
        torch.equal(a[2], cond.labels) for a in asked + judged
    )
    assert (
        torch.equal(asked[0][0], z)
        and close(v_1, net(z, ones(z), cond.labels))
        and torch.equal(target, m.anchor(z, cond))
    )
    # other noise, other labels
    for planted in (
        m.anchor(z.flip(0), cond),
        m.anchor(z, Condition(cond.labels.flip(0))),
    ):
        assert not close(planted, target, 0.01)

    def walk(steps):
        return euler(lambda x, t: net(x, t, cond.labels), z, steps).detach()

    assert close(x, walk(4)) and not close(x, walk(3), 0.01) and not x.requires_grad
    for (_, t, _), use in zip(judged, ("matching", "critic")):
        torch.testing.assert_close(t, 0.02 + 0.96 * step().rng(f"{use} t").uniform(n))
    x_t, t, _ = judged[1]
    # Planted: x and e exchanged
    assert close(x_t, noised(x, e, t)) and not close(x_t, noised(e, x, t), 0.1)
    assert (
        torch.equal(e, step().rng("critic e").normal(n, *SHAPE))
        and torch.corrcoef(torch.stack([judged[0][1], t]))[0, 1].abs() < 0.1
    )


SCHEDULES = {
    (1, True): "|sc",
    (3, True): "|c|c|sc",
    (5, True): "|c|c|c|c|sc",
    (5, False): "|c|c|c|c|c|s",
    (1, False): "|c|s",
}


# test 12: five of the critic, then one of the student, in six ticks
@pytest.mark.parametrize(("updates", "reuse"), SCHEDULES)
def test_who_moves_when(updates, reuse):
    m, _ = made(critic_updates=updates, reuse=reuse)
    cycle, order, moved = SCHEDULES[updates, reuse], "", watch_updates(m)
    for i in range(2 * cycle.count("|")):
        m.train_step(batch(), step(i))
        order += "|" + "".join(name[0] for name in moved)
        moved.clear()
    assert order == 2 * cycle and DPDMD.needs(m.config).cycle == cycle.count("|")
    # M = 5
    official = "".join("|s" if (i + 1) % 6 == 0 else "|c" for i in range(2 * cycle.count("|")))
    assert (order == official) == ((updates, reuse) == (5, False))


# test 12; (h): the official seeds give every GPU the same
def test_ranks_see_noise_of_their_own(
    monkeypatch,
):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)

    def on(rank: int) -> list[Tensor]:
        monkeypatch.setattr(dist, "get_rank", lambda: rank)
        m, seen = made()[0], []
        for net in (m.net, m.fake):
            net.register_forward_pre_hook(lambda _m, args: seen.extend(args[:2]))
        m.student.update = m.critic.update = lambda loss: None
        m.train_step(batch(), step())
        return [seen[0], seen[-3], seen[-1]]  # z and both t

    first = on(0)
    assert not any(torch.equal(a, b) for a, b in zip(first, on(1)))
    assert all(torch.equal(a, b) for a, b in zip(first, on(0)))  # planted: one seed


@pytest.mark.parametrize(("variant", "n"), [(None, 4), ("two-step", 2)])
def test_the_sampler_is_euler_on_the_uniform_grid(variant, n):  # (d)
    m, task = made(variant)
    needs = DPDMD.needs(m.config)
    assert (
        needs.nfe == (n,)
        and needs.headline_nfe == n
        and not needs.data
        and needs.pairs is None
        and needs.teacher
    )
    z, labels = torch.randn(N, *SHAPE), batch().cond.labels
    with task.meter.counting():
        x = m.sample(z, Condition(labels, 3.0), n, Rng(0))
    assert dict(task.meter.rows) == {"student": n * N}
    expected = z
    for i in range(n):
        expected = expected - m.net(expected, ones(z, 1 - i / n), labels) / n
    # Planted
    assert close(x, expected) and not close(x, heun(lambda x, t: m.net(x, t, labels), z, n), 1e-3)
    # the average is what is sampled
    m.student.averages["evaluation"].get_submodule("module.0").leave.bias.data += 1
    assert not close(m.sample(z, Condition(labels), n, Rng(0)), x, 0.01)


def moves(name: str | None) -> dict[str, int]:
    """M of the arm itself."""
    return {"critic_updates": merged(FILE["config"], VARIANTS[name])["critic_updates"]}


def test_every_variant_changes_an_update():
    after = {}
    for name in [*VARIANTS, None]:
        m, _ = made(name, **moves(name))
        for i in range(12):
            m.train_step(batch(), step(i))
        if name in after:
            # Planted: no change of settings, no change of weights
            assert torch.equal(weights(m.net), after[name])
        after[name] = weights(m.net)
    for a, b in combinations(after, 2):
        assert not torch.allclose(after[a], after[b], atol=1e-5), (a, b)


def cost(student: int, teacher: int, m: int = 5) -> dict[str, int]:
    return {
        "student": student,
        "student.backward": 1,
        "teacher": teacher,
        "critic": 1 + m,
        "critic.backward": m,
    }


COSTS = {
    **dict.fromkeys(
        [None, "no-detach", "paper-weight", "double-weight", "heavy-anchor"], cost(5 * 4, 1 + 8)
    ),
    **dict.fromkeys(["detach-only", "plain", "plain-half-rate"], cost(5 * 4, 1)),
    "two-step": cost(5 * 2, 1 + 8),
    "anchor-1": cost(5 * 4, 1 + 1),
    "anchor-full": cost(5 * 4, 1 + 16),
    "x0-anchor": cost(5 * 4, 1 + 8 + 1),
    "five-to-one": cost(6 * 4, 1 + 8),
    "one-to-one": cost(4, 1 + 8, 1),
}


@pytest.mark.parametrize("w", [1.0, 3.5])
@pytest.mark.parametrize("name", VARIANTS)
def test_no_evaluation_more_than_the_algorithm_needs(name, w):
    m, task = made(name, **moves(name))
    cycle, graphs = DPDMD.needs(m.config).cycle, []
    m.net.register_forward_hook(lambda _m, args, out: graphs.append(out.requires_grad))
    with task.meter.counting():
        for i in range(3 * cycle, 4 * cycle):
            m.train_step(batch(w=w), step(i))
    # student and critic have no guidance
    guided = {} if w == 1 else {"teacher": 2 * COSTS[name]["teacher"]}
    assert dict(task.meter.calls) == COSTS[name] | guided
    # Graphs on the student's turn only, and of its first step only where something is asked of it.
    last = [name != "detach-only"] + [True] * (m.config.steps - 1)
    assert graphs == [False] * (len(graphs) - m.config.steps) + last
