"""DMD2 against closed forms and its paper: specs/dmd2.md (b)-(d), (i).

Numbers of tests are that file's, or those of specs/dmd.md where they say so.
"""

import math
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import yaml
from torch import Tensor, nn

from distillbench.meter import Meter
from distillbench.method import Batch, Condition, Step, Task
from distillbench.networks.mlp import VelocityMLP
from distillbench.paths import denoiser, noised, over
from distillbench.reading import merged
from distillbench.registry import folders
from distillbench.seeds import Rng
from tests.conftest import captured
from tests.toys import calls_of_cycle, random_task, shake, weights

FOLDER = Path(__file__).parents[1] / "methods/dmd2"
DMD2 = folders.load(SimpleNamespace(name="dmd2", path=FOLDER))
method = sys.modules[DMD2.__module__]
FILE = yaml.safe_load((FOLDER / "config.yaml").read_text())
VARIANTS = {None: {}} | {name: v["config"] for name, v in FILE["variants"].items()}
SHAPE, N, CPU = (1, 4, 4), 16, torch.device("cpu")
PLAYER = {"lr": 1.2e-2, "warmup": 0.0}
SMALL = {
    "batch": N,
    "input_time": 1.0,
    "blocks": 1,
    "head_width": 8,
    "student": PLAYER,
    "critic": PLAYER,
}


def made(variant: str | None = None, **changes) -> tuple:
    """An arm with a random teacher; `critic_differs` moves the critic off it, where it starts."""
    task = random_task(SHAPE)
    critic_differs = changes.pop("critic_differs", True)
    m = DMD2(
        task,
        DMD2.Config.model_validate(
            merged(merged(merged(FILE["config"], SMALL), VARIANTS[variant]), changes)
        ),
    )
    if critic_differs:
        shake(m.fake)
    return m, task


def batch(n: int = N, w: float = 1.0, real: float = 0.0) -> Batch:
    x = real + 0.5 * torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(5))
    return Batch(n, Condition(torch.arange(n) % 3, w), x)


def step(index: int = 0, total: int = 40) -> Step:
    return Step(index, total, 0, CPU)


def reached(loss: Tensor, *modules: nn.Module) -> list[bool]:
    """Which parameters the gradient of `loss` reaches, frozen ones among those it does not."""
    parameters = [p for module in modules for p in module.parameters()]
    free = [p for p in parameters if p.requires_grad]
    gradients = iter(
        torch.autograd.grad(loss, free, retain_graph=True, allow_unused=True) if free else ()
    )
    return [
        (g := next(gradients)) is not None and bool(g.any()) if p.requires_grad else False
        for p in parameters
    ]


# The distribution-matching loss.


@pytest.mark.parametrize("w", [1.0, 3.0])
@pytest.mark.parametrize("variant", [None, "velocity"])
def test_gradient_of_the_matching_term(monkeypatch, w, variant):  # test 1: dmd.md tests 1, 4, 5, 7
    m, task = made(variant, gan=0.0)
    calls = captured(monkeypatch, method, "pseudo_loss")
    data, labels = batch(w=w), batch().cond.labels
    critic = VelocityMLP(SHAPE, 3, 16, 2)
    critic.load_state_dict(m.fake.state_dict())
    gradients, update = [], m.student.update
    m.student.update = lambda loss: (
        gradients.extend(torch.autograd.grad(loss, calls[0][0][0], retain_graph=True)),
        update(loss),
    )
    m.train_step(data, step())

    again, x = step(), calls[0][0][0].detach()
    t, e = (
        0.02 + 0.96 * again.rng("matching t").uniform(N),
        again.rng("matching e").normal(N, *SHAPE),
    )
    x_t = noised(x, e, t)
    x0_f = denoiser(x_t, critic(x_t, t, labels), t)

    def g(weight: float = w, real: float = w, clean: Tensor = x) -> Tensor:
        """(x0_f - x0_r) / mean |clean - x0_w| or / t, detached, over the number of elements.

        x0_r has the guidance `real`, x0_w the guidance `weight`.
        """
        x0_r, x0_w = (
            denoiser(x_t, task.teacher.velocity(x_t, t, Condition(labels, v)), t)
            for v in (real, weight)
        )
        size = (clean - x0_w).abs().mean((1, 2, 3), keepdim=True) if variant is None else over(t, x)
        return ((x0_f - x0_r) / size).detach() / x.numel()

    torch.testing.assert_close(gradients[0], g(), rtol=1e-3, atol=1e-6)
    # sign, sum, Eq. 8, noisy x
    planted = [-g(), g() * x.numel(), g() * over(1 - t, x)] + (
        [g(clean=x_t)] if variant is None else []
    )
    # unguided teacher, unguided normaliser
    planted += [g(real=1.0)] + ([g(weight=1.0)] if variant is None else []) if w != 1 else []
    assert not any(torch.allclose(gradients[0], wrong, rtol=1e-2, atol=1e-5) for wrong in planted)


def gaussian(x: Tensor, t: Tensor, mean: float, std: float) -> Tensor:
    """Exact velocity of N(mean, std^2)."""
    t = over(t, x)
    return (t - (1 - t) * std**2) / ((1 - t) ** 2 * std**2 + t**2) * (x - (1 - t) * mean) - mean


class Given:
    """A step whose draws are given: uniform 0, the lower end of t; one normal tensor for all."""

    def __init__(self, normal: Tensor, uniform: float = 0.0):
        self.stream = SimpleNamespace(
            normal=lambda *_: normal,
            uniform=lambda n: torch.full((n,), uniform, dtype=normal.dtype),
        )

    def rng(self, name: str) -> SimpleNamespace:
        return self.stream


def analytic(real: tuple[float, float], fake: tuple[float, float], t: float, **changes):
    """DMD2 without networks: teacher and critic exact for N(mean, std^2); matching at time t."""
    m = DMD2.__new__(DMD2)
    m.config = DMD2.Config.model_validate(
        merged(FILE["config"], {"time_low": t, "time_high": t} | changes)
    )
    m.task = SimpleNamespace(
        teacher=SimpleNamespace(velocity=lambda x, t, cond: gaussian(x, t, *real))
    )
    m.fake = lambda x, t, labels, s: gaussian(x, t, *fake)
    return m


# x_t = (1-t)(m + a z) + t n with E z = E n = E zn = 0 and E z^2 = E n^2 = 1
# exactly on these four points
Z = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)[:, None]
E = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64)[:, None]


# section 3, Eq. 1: KL(q_t | p_t) of x = m + a z to N(0.1, 0.5^2)
@pytest.mark.parametrize("t", [0.1, 0.4, 0.9])
@pytest.mark.parametrize(("m0", "a0"), [(0.8, 0.3), (-0.5, 1.2)])
def test_matching_is_the_gradient_of_the_kl(t, m0, a0):
    mean, std = 0.1, 0.5

    def ours(real: tuple, fake: tuple) -> Tensor:
        m, a = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (m0, a0))
        x = m + a * Z
        g = analytic(real, fake, t, weighting="velocity").matching(
            x.detach(), torch.ones(4), Condition(None), Given(E)
        )
        return torch.stack(torch.autograd.grad(method.pseudo_loss(x, g), (m, a))) * (1 - t) ** 2 / t

    def noised_variance(std):
        return (1 - t) ** 2 * std**2 + t**2

    s, s0 = noised_variance(std), noised_variance(a0)
    closed = (1 - t) ** 2 * torch.tensor(
        [(m0 - mean) / s, a0 * (1 / s - 1 / s0)], dtype=torch.float64
    )
    torch.testing.assert_close(ours((mean, std), (m0, a0)), closed, rtol=1e-6, atol=0)
    # Planted: the two networks exchanged
    assert not torch.allclose(ours((m0, a0), (mean, std)), closed, rtol=0.1)
    # Planted: a critic that lags
    assert not torch.allclose(ours((mean, std), (m0, 0.9 * a0)), closed, rtol=0.01)
    assert not ours((m0, a0), (m0, a0)).any()  # stationary where the student is the teacher


def test_a_critic_that_equals_the_teacher_is_stationary():  # test 1: dmd.md test 2
    m, _ = made(gan=0.0, critic_differs=False)
    before = weights(m.net)
    assert m.train_step(batch(), step())["matching_gradient"] == 0 and torch.equal(
        weights(m.net), before
    )
    # the critic differs; the classifier pulls
    for planted in (
        made(gan=0.0)[0],
        made(critic_differs=False)[0],
    ):
        before = weights(planted.net)
        planted.train_step(batch(), step())
        assert not torch.equal(weights(planted.net), before)
    m, _ = made(gan=0.0, critic_differs=False)
    # a guided teacher and a critic that is not
    assert m.train_step(batch(w=3.0), step())["matching_gradient"] > 0.01


# The GAN.


def test_signs_of_the_gan():  # test 5
    low, zero, high = (torch.full((4,), v) for v in (-20.0, 0.0, 20.0))
    assert method.softplus_generator(high) < 1e-6 < 19 < method.softplus_generator(low)  # on fakes
    assert (
        method.softplus_discriminator(high, low) < 1e-6
        and method.softplus_discriminator(low, high) > 39
    )
    assert method.softplus_generator(zero).item() == pytest.approx(math.log(2))
    assert method.softplus_discriminator(zero, zero).item() == pytest.approx(2 * math.log(2))


def log_ratio(x: Tensor, t: Tensor, real: tuple[float, float], fake: tuple[float, float]) -> Tensor:
    """log p_t / q_t of two Gaussians at x [B, 1], [B]: the best classifier."""
    t = over(t, x)

    def log_density(mean: float, std: float) -> Tensor:
        variance = (1 - t) ** 2 * std**2 + t**2
        return -0.5 * variance.log() - (x - (1 - t) * mean).square() / (2 * variance)

    return (log_density(*real) - log_density(*fake))[:, 0]


def quantiles(n: int) -> Tensor:
    """n points of equal weight with a standard normal's law, exact in mean and variance."""
    z = torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n)
    return z / z.square().mean().sqrt()


# (b) 2: E softplus(-D(x_t)) by the law of x_t, which is N((1-t) m, S^2)
@pytest.mark.parametrize("t", [0.1, 0.5])
def test_adversarial_gradient_is_that_of_its_objective(
    t,
):
    real, m0, a0, nodes = (0.1, 0.5), 0.6, 0.4, quantiles(1000)

    def classifier(x, t):  # held fixed
        return log_ratio(x, t, real, (m0, a0))

    z, e = (v.reshape(-1, 1) for v in torch.meshgrid(nodes, nodes, indexing="ij"))

    def objective(m: float, a: float) -> float:
        y = torch.linspace(-8, 8, 20_001, dtype=torch.float64)
        variance = (1 - t) ** 2 * a**2 + t**2
        x_t = (1 - t) * m + variance**0.5 * y
        values = nn.functional.softplus(
            -classifier(x_t[:, None], torch.full((len(y),), t, dtype=torch.float64))
        )
        return (
            (values * torch.exp(-y.square() / 2)).sum().item()
            * (16 / 20_000)
            / math.sqrt(2 * math.pi)
        )

    h = 1e-4
    closed = torch.tensor(
        [
            objective(m0 + h, a0) - objective(m0 - h, a0),
            objective(m0, a0 + h) - objective(m0, a0 - h),
        ]
    ) / (2 * h)
    arm = analytic(real, (m0, a0), 0.1)
    arm.trunk = lambda x, t, labels, s, features: [classifier(x, t)]
    arm.head = lambda features, labels: features

    def ours(loss=method.softplus_generator) -> Tensor:
        m, a = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (m0, a0))
        logits = arm.logits(m + a * z, torch.ones(len(z)), None, Given(e, uniform=t), "adversarial")
        return torch.stack(torch.autograd.grad(loss(logits), (m, a))).float()

    torch.testing.assert_close(ours(), closed, rtol=1e-3, atol=1e-5)

    def saturating(logits):
        return -nn.functional.softplus(logits).mean()

    # the sign; -E log(1 - D) inverted
    for planted in (
        ours(lambda logits: method.softplus_generator(-logits)),
        ours(saturating),
    ):
        assert not torch.allclose(planted, closed, rtol=0.1)


# (b) 3: minimiser of L_cls, real rows first
def test_the_classifier_learns_the_log_ratio(
    monkeypatch,
):
    n, real, fake = 200_000, (0.8, 0.5), (0.2, 0.7)
    g = torch.Generator().manual_seed(0)

    def draw(mean, std):
        return mean + std * torch.randn(n, 1, generator=g, dtype=torch.float64)

    x, t = (draw(*real), draw(*fake)), 0.3
    arm = analytic(real, fake, 0.1)
    seen: list[Tensor] = []

    def z_score(change: float = 0.0, swapped: bool = False) -> float:
        """Largest slope of L_cls along 1, x_t, x_t^2 added to D, in standard errors."""
        arm.trunk = lambda x, t, labels, s, features: (
            seen.append(x),
            [log_ratio(x, t, real, fake) * (1 + change)],
        )[1]
        arm.head = lambda features, labels: features
        step = Given(torch.randn(2 * n, 1, generator=g, dtype=torch.float64), uniform=t)
        logits = arm.logits(
            torch.cat(x), torch.ones(2 * n), None, step, "classifier"
        ).requires_grad_()
        parts = logits.chunk(2)
        (slope,) = torch.autograd.grad(
            method.softplus_discriminator(*(reversed(parts) if swapped else parts)), logits
        )
        pairs = [
            (slope * d).chunk(2)
            for d in (torch.ones(2 * n), seen[-1][:, 0], seen[-1][:, 0].square())
        ]
        return max(float((a + b).sum().abs() / (n * (a.var() + b.var())).sqrt()) for a, b in pairs)

    assert z_score() < 4
    # Planted: another D; real and fake exchanged
    assert z_score(0.1) > 5 and z_score(swapped=True) > 20


def test_each_player_sees_the_logits_of_its_rows(monkeypatch):
    m, _ = made()
    logits = []
    m.trunk = lambda x, t, labels, s, features: [x]
    m.head = lambda x, labels: (logits.append(x.mean((1, 2, 3))), logits[-1])[1]
    m.critic = m.student = SimpleNamespace(update=lambda loss: None)
    generator, discriminator = (
        captured(monkeypatch, method, f"softplus_{name}") for name in ("generator", "discriminator")
    )
    m.train_step(batch(real=100.0), step())
    # a minus sign here would train against the student
    assert torch.equal(generator[0][0][0], logits[0]) and len(logits) == 2
    real, fake = discriminator[0][0]
    assert torch.equal(torch.cat([real, fake]), logits[1]) and len(real) == len(fake) == N
    assert real.median() > 20 > fake.median()


@pytest.mark.parametrize("blocks", [1, 2])
def test_the_classifier_sees_the_last_of_its_blocks(monkeypatch, blocks):  # (b) 4
    m, _ = made(blocks=blocks)
    seen, outputs = [], []
    m.head.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    for block in m.fake.blocks:
        block.register_forward_hook(lambda _m, args, out, block=block: outputs.append((block, out)))
    m.train_step(batch(), step())
    last = [out for block, out in outputs if block is m.fake.blocks[blocks - 1]]
    assert len(seen) == 2 and all(any(features is out for out in last) for features in seen)
    planted = [out for block, out in outputs if block is m.fake.blocks[2 - blocks]]
    assert not any(features is out for features in seen for out in planted)


# (b) 3, (i): regression onto e - sg(x)
def test_the_critics_minimiser_is_the_velocity_of_the_samples():
    n, mean, std = 200_000, 0.8, 0.5
    x, e = (
        mean + std * torch.randn(n, 1, dtype=torch.float64),
        torch.randn(n, 1, dtype=torch.float64),
    )
    t = torch.rand(n, dtype=torch.float64)
    x_t, exact = noised(x, e, t), gaussian(noised(x, e, t), t, mean, std)

    def z_score(v: Tensor, target: tuple[Tensor, Tensor]) -> float:
        v = v.clone().requires_grad_()
        (slope,) = torch.autograd.grad(method.critic_loss(v, *target), v)
        return max(
            float((slope * d).mean().abs() / (slope * d).std() * n**0.5)
            for d in (exact, x_t, over(t, x), torch.ones_like(v))
        )

    assert z_score(exact, (x, e)) < 4
    # Planted: x - e; another velocity
    assert z_score(exact, (e, x)) > 20 and z_score(0.9 * exact, (x, e)) > 20
    x.requires_grad_(True)
    assert (
        torch.autograd.grad(method.critic_loss(exact.requires_grad_(), x, e), x, allow_unused=True)[
            0
        ]
        is None
    )


# Who is moved by what.


@pytest.mark.parametrize("variant", [None, "teacher-features", "four-step-conditioned"])
def test_each_loss_reaches_its_own_networks_only(monkeypatch, variant):  # test 3
    m, task = made(variant)
    adversarial, classifier = (
        captured(monkeypatch, method, f"softplus_{name}") for name in ("generator", "discriminator")
    )
    pseudo, fakes = (
        captured(monkeypatch, method, "pseudo_loss"),
        captured(monkeypatch, method, "critic_loss"),
    )
    found, moved = {}, []
    student, critic = m.student.update, m.critic.update

    def everything():
        return (
            weights(m.net),
            weights(m.fake),
            weights(m.head),
            weights(m.trunk),
            weights(task.teacher.network),
        )

    def watched(original, find):
        def update(loss: Tensor) -> None:
            find()
            before = everything()
            original(loss)
            moved.append([not torch.equal(a, b) for a, b in zip(before, everything())])

        return update

    def of_student() -> None:
        x = pseudo[0][0][0]
        found["L_adv in head"] = reached(adversarial[0][1], m.head)
        (found["L_adv in x"],) = torch.autograd.grad(adversarial[0][1], x, retain_graph=True)
        found["L_DM"] = reached(pseudo[0][1], m.fake, m.head, task.teacher.network)
        found["student"] = reached(pseudo[0][1], m.net)

    def of_critic() -> None:
        found["L_cls in head"], found["L_cls in critic"] = (
            reached(classifier[0][1], m.head),
            reached(classifier[0][1], m.fake),
        )
        found["L_cls"] = reached(classifier[0][1], m.net, task.teacher.network)
        found["L_fake"], found["L_fake elsewhere"] = (
            reached(fakes[0][1], m.fake),
            reached(fakes[0][1], m.net, m.head),
        )

    m.student.update, m.critic.update = watched(student, of_student), watched(critic, of_critic)
    m.train_step(batch(), step())
    own_trunk = variant != "teacher-features"
    # test 2: the student first
    assert moved == [
        [True, False, False, False, False],
        [False, True, True, own_trunk, False],
    ]
    assert (
        found["L_adv in x"].any()
        and any(found["student"])
        and not any(found["L_DM"] + found["L_cls"] + found["L_fake elsewhere"])
    )
    assert all(found["L_cls in head"]) and any(found["L_fake"])
    named = dict(zip([name for name, _ in m.fake.named_parameters()], found["L_cls in critic"]))
    shared = {name for name, yes in named.items() if yes}
    assert (
        {"enter.weight", "blocks.0.up.weight", "time.last.weight"} <= shared
        if own_trunk
        else not shared
    )
    # after the features
    assert not any(name.startswith(("blocks.1", "leave", "modulation")) for name in shared)
    nets = (m.net, m.fake, m.head, m.trunk, task.teacher.network)
    # test 2: nothing is left for the next update
    assert all(p.grad is None for net in nets for p in net.parameters())
    assert any(found["L_adv in head"])  # planted: only `update` keeps L_adv from the head


# (b): L_G = L_DM + lambda_G L_adv; L_phi = L_fake + lambda_D L_cls
def test_terms_and_their_weights(
    monkeypatch,
):
    m, _ = made(gan=0.7, classifier=0.3)
    names = ("pseudo_loss", "softplus_generator", "critic_loss", "softplus_discriminator")
    parts, losses = [captured(monkeypatch, method, name) for name in names], []
    for player in (m.student, m.critic):
        player.update = lambda loss, original=player.update: (
            losses.append(loss.item()),
            original(loss),
        )
    m.train_step(batch(), step())
    matching, adversarial, fake, classifier = (calls[0][1].item() for calls in parts)
    assert losses == pytest.approx(
        [matching + 0.7 * adversarial, fake + 0.3 * classifier], rel=1e-5
    )
    # Planted: exchanged
    assert losses != pytest.approx(
        [matching + 0.3 * adversarial, fake + 0.7 * classifier], rel=1e-2
    )


# test 9: lambda_G is tied to the mean over elements
def test_sum_reduction_with_a_heavier_gan_is_the_same_direction():
    x, g = (
        torch.randn(8, 48, dtype=torch.float64, requires_grad=True),
        torch.randn(8, 48, dtype=torch.float64),
    )

    def adversarial(x):
        return method.softplus_generator(x.sin().sum(1))

    def summed(x):
        return 0.5 * (x - (x - g).detach()).square().sum(1).mean()

    def gradient(loss):
        return torch.autograd.grad(loss, x)[0]

    ours = gradient(method.pseudo_loss(x, g) + 0.03 * adversarial(x))
    torch.testing.assert_close(gradient(summed(x) + 48 * 0.03 * adversarial(x)), 48 * ours)

    def cosine(a):
        return torch.cosine_similarity(a.flatten(), ours.flatten(), dim=0).item()

    # Planted: lambda_G as it was
    assert cosine(gradient(summed(x) + 0.03 * adversarial(x))) < 0.999


# Times and noise.


def calls_of(
    m, n: int, index: int = 0, of: type[Step] = Step
) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """(x_t, t, t - s) of the critic's evaluations in one train step by their use."""
    seen = []
    hook = m.fake.register_forward_pre_hook(
        lambda _m, args, kw: seen.append((args[0].detach(), args[1], args[1] - kw["s"])),
        with_kwargs=True,
    )
    m.train_step(batch(n), of(index, 40, 0, CPU))
    hook.remove()
    matching, adversarial, fake, (x_t, t, t_k) = seen
    real = x_t[:n], t[:n], t_k[:n]
    return {
        "L_DM": matching,
        "L_adv": adversarial,
        "L_fake": fake,
        "real": real,
        "fake": (x_t[n:], t[n:], t_k[n:]),
    }


def dependent(a: tuple, b: tuple) -> bool:
    """Whether two evaluations share times or noise.

    Rows of small t are those of x, rows of large t are noise.
    """
    loud = (a[1] > 0.7) & (b[1] > 0.7)

    def flat(call):
        return ((call[0] - call[0].mean(0)) / over(call[1], call[0]))[loud].flatten()

    def corr(u, v):
        return torch.corrcoef(torch.stack([u, v]))[0, 1].abs().item()

    return corr(a[1], b[1]) > 0.08 or corr(flat(a), flat(b)) > 0.5


class OneDraw(Step):
    """Planted: FastGen's t and noise, one for all uses, and real rows as fake ones."""

    def rng(self, name: str) -> SimpleNamespace:
        def once(n):
            return n // 2 if name.startswith("classifier") else n

        def fresh():
            return Rng(0, name.split()[-1])

        def rows(x, n):
            return x.repeat(n // len(x), *([1] * (x.dim() - 1)))

        return SimpleNamespace(
            uniform=lambda n: rows(fresh().uniform(once(n)), n),
            normal=lambda n, *shape: rows(fresh().normal(once(n), *shape), n),
        )


# test 4; (b): L_DM's t truncated, the others' not
def test_every_use_has_times_and_noise_of_its_own():
    n = 4096
    m, _ = made(batch=n)
    calls = calls_of(m, n)
    for name, (_, t, _) in calls.items():
        low, high = (0.02, 0.98) if name == "L_DM" else (0.0, 1.0)
        assert (
            low <= t.min() < low + 0.005
            and high - 0.005 < t.max() <= high
            and len(t.unique()) > 0.9 * n
        )
    names = list(calls)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            assert not dependent(calls[a], calls[b]), (a, b)
    planted = calls_of(made(batch=n)[0], n, of=OneDraw)
    assert all(dependent(planted[a], planted[b]) for a in names for b in names)


# (b): x_t = (1-t) x + t e of x, of real x in L_cls
def test_every_use_sees_its_rows_noised_and_their_labels(
    monkeypatch,
):
    m, _ = made()
    asked, heads, fakes = [], [], captured(monkeypatch, method, "critic_loss")
    m.fake.register_forward_pre_hook(lambda _m, args: asked.append((args[0].detach(), args[2])))
    m.head.register_forward_pre_hook(lambda _m, args: heads.append(args[1]))
    data, again = batch(), step()
    m.train_step(data, step())
    (_, x, e_fake), own = fakes[0][0], data.cond.labels

    def expected(use: str, x: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
        t = low + (high - low) * again.rng(f"{use} t").uniform(len(x))
        return noised(x, again.rng(f"{use} e").normal(*x.shape), t)

    uses = (
        ("matching", x, 0.02, 0.98),
        ("adversarial", x),
        ("critic", x),
        ("classifier", torch.cat([data.x, x])),
    )
    for use, (x_t, labels) in zip(uses, asked):
        torch.testing.assert_close(x_t, expected(*use), msg=use[0])
        assert torch.equal(labels, own.repeat(len(x_t) // N))
    assert [h.tolist() for h in heads] == [own.tolist(), 2 * own.tolist()]
    # the target's noise is that in x_t
    assert torch.equal(e_fake, step().rng("critic e").normal(N, *SHAPE))
    # Planted: x and e exchanged
    assert not torch.allclose(
        asked[2][0], noised(e_fake, x, step().rng("critic t").uniform(N)), atol=0.1
    )


@pytest.mark.parametrize("index", range(8))
def test_the_critic_is_told_the_step_it_judges(index):
    m, _ = made("four-step-conditioned", every=1)
    k = method.drawn_step(step(index), 4, 1)
    for name, (_, _, told) in calls_of(m, N, index).items():
        torch.testing.assert_close(told, torch.full((N,), 1 - k / 4), msg=name)
    heard = []
    m.fake.gap.register_forward_pre_hook(lambda _m, args: heard.append(args[0]))
    m.train_step(batch(), step(index))
    # s = t_k would tell it t - t_k
    assert heard and all(torch.allclose(t_k, torch.tensor(1 - k / 4)) for t_k in heard)


def test_a_critic_told_the_step_starts_as_the_teacher_and_learns_the_difference():
    m, task = made("four-step-conditioned", critic_differs=False)
    x, t, labels = torch.randn(6, *SHAPE), torch.rand(6), torch.arange(6) % 3

    def at(m, t_k):
        return m.fake(x, t, labels, s=t - t_k)

    torch.testing.assert_close(at(m, 1.0), task.teacher.velocity(x, t, Condition(labels)))
    assert torch.equal(at(m, 1.0), at(m, 0.25))
    blind, _ = made("four-step", critic_differs=False)
    for i in range(8):
        m.train_step(batch(), step(i))
        blind.train_step(batch(), step(i))
    assert not torch.allclose(at(m, 1.0), at(m, 0.25), atol=1e-4) and torch.equal(
        at(blind, 1.0), at(blind, 0.25)
    )


# The schedule.


def updates(m, steps: int) -> list[str]:
    """Players in the order they moved, '|' before every train step."""
    order = []
    for player in (m.student, m.critic):
        player.update = lambda loss, name=player.name, original=player.update: (
            order.append(name[0]),
            original(loss),
        )
    for i in range(steps):
        order.append("|")
        m.train_step(batch(), step(i))
    return order


@pytest.mark.parametrize(
    ("variant", "cycle"),
    [
        (None, "|sc|c"),
        ("one-to-one", "|sc"),
        ("five-to-one", "|sc|c|c|c|c"),
        ("disjoint", "|s|c|c|c|c"),
        ("no-gan-one-to-one", "|sc"),
    ],
)
def test_who_moves_when(variant, cycle):  # test 2; (c)
    m, _ = made(variant)
    m.student.total_updates, m.critic.total_updates = 3, 3 * cycle.count("c")
    assert "".join(updates(m, 3 * cycle.count("|"))) == 3 * cycle
    assert DMD2.needs(m.config).cycle == cycle.count("|")
    assert m.student.updates == 3 and m.critic.updates == 3 * cycle.count("c")
    # Both schedules end together:
    # the student's counts its own updates, as the official one counts iterations.
    at_end = [player.learning_rate() / player.config.lr for player in (m.student, m.critic)]
    assert at_end == pytest.approx([FILE["config"]["student"]["final_lr"]] * 2)


# (c): the detached batch from before the student's update
def test_both_players_learn_on_the_same_samples(
    monkeypatch,
):
    m, _ = made()
    pseudo, fakes = (
        captured(monkeypatch, method, "pseudo_loss"),
        captured(monkeypatch, method, "critic_loss"),
    )
    z = step().rng("z").normal(N, *SHAPE)
    m.train_step(batch(), step())
    x, after = fakes[0][0][1], m.generate(m.net, z, torch.ones(N), batch().cond.labels)
    assert torch.equal(x, pseudo[0][0][0]) and not x.requires_grad
    assert not torch.allclose(x, after, atol=1e-3)  # planted: samples of the student as it is now
    m.train_step(batch(), step(1))  # the critic alone: fresh samples
    assert len(pseudo) == 1 and not torch.allclose(fakes[1][0][1], after, atol=1e-3)


def test_brightness_is_logged_and_steady_for_a_student_that_stands():  # test 8, Figure 8
    n = 4096
    m, _ = made(batch=n, critic_differs=False, gan=0.0, classifier=0.01, critic={"lr": 1e-9})
    logged = torch.stack([m.train_step(batch(n), step(i))["brightness"] for i in range(6)])
    x = m.generate(m.net, torch.randn(n, *SHAPE), torch.ones(n), batch(n).cond.labels).mean(
        (1, 2, 3)
    )
    assert (logged - logged.mean()).abs().max() < 5 * x.std() / n**0.5
    m.net.leave.bias.data -= 0.1
    # Planted: it has moved
    assert m.train_step(batch(n), step(6))["brightness"] - logged.mean() > 0.08


# A few steps.


def test_the_generator_is_the_denoised_image():  # (i): x = x_t - t v; G(z) = z - v(z, 1)
    m, _ = made()
    x, t, labels = torch.randn(8, *SHAPE), torch.rand(8), torch.arange(8) % 3
    v = m.net(x, t, labels)
    torch.testing.assert_close(m.generate(m.net, x, t, labels), x - over(t, x) * v)
    one = m.sample(x, Condition(labels), 1, None)
    torch.testing.assert_close(one, x - m.net(x, torch.ones(8), labels))
    for planted in (x + v, x - m.net(x, torch.zeros(8), labels), x - v):
        assert not torch.allclose(one, planted, atol=1e-2)


@pytest.mark.parametrize("every", [1, 3])
def test_the_step_is_uniform_and_the_batchs(every):  # (d): k uniform in 0..N-1
    draws = torch.tensor(
        [method.drawn_step(step(i), 4, every) for i in range(4 * every * 300)]
    ).view(300, 4, every)
    # each once in a cycle, at every place of it
    assert (draws.sort(1).values == torch.arange(4)[None, :, None]).all()
    for place in range(every):
        assert len({tuple(order) for order in draws[:, :, place].tolist()}) == 24  # in any order
        share = torch.bincount(draws[:, 0, place], minlength=4) / 300
        assert (share - 0.25).abs().max() < 0.1
    assert every == 1 or not torch.equal(draws[..., 0], draws[..., 1])
    independent = torch.stack([Rng(0, i).integers(4, 4) for i in range(300)])
    # Planted: cycles of unequal cost
    assert not (independent.sort(1).values == torch.arange(4)).all()


# (d): shared by the whole batch and all ranks
def test_the_step_is_the_same_on_all_ranks(
    monkeypatch,
):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)

    def on(rank: int) -> tuple[list[int], list[int]]:
        monkeypatch.setattr(dist, "get_rank", lambda: rank)
        steps = [step(i) for i in range(40)]
        return [method.drawn_step(s, 4, 2) for s in steps], [
            int(s.rng("k").integers(1, 4)) for s in steps
        ]

    (first, planted_first), (second, planted_second) = on(0), on(1)
    # Planted: the stream of each rank's rows
    assert first == second and planted_first != planted_second


def inputs(m, index: int, n: int = N) -> tuple[Tensor, Tensor]:
    return m.student_input(batch(n), step(index))


@pytest.mark.parametrize("start", [1.0, 0.8])
@pytest.mark.parametrize("index", range(8))
def test_inputs_are_the_samplers(index, start):  # test 6
    m, _ = made("four-step", input_time=start)
    k, z = method.drawn_step(step(index), 4, 2), step(index).rng("z").normal(N, *SHAPE)
    calls = []
    m.net.register_forward_hook(
        lambda _m, args, out: calls.append((args[1][0].item(), out.requires_grad))
    )
    x, t = inputs(m, index)
    assert (
        calls == [(pytest.approx(start * (1 - i / 4)), False) for i in range(k)]
        and not x.requires_grad
    )
    # noise alone at the first step
    assert (t == start * torch.tensor(1 - k / 4)).all() and torch.equal(x, start * z) == (k == 0)
    fresh = step(index).rng("renoise")
    path = []

    def walk(x, t):
        path.append(x)
        return m.generate(m.net, x, t, batch().cond.labels)

    method.renoising(walk, z, 4, lambda: fresh.normal(N, *SHAPE), start=start)
    assert torch.equal(x, path[k]) and not torch.equal(x, path[(k + 1) % 4])


# test 6: no parameter gradient from the simulated prefix
def test_one_gradient_step_at_the_drawn_time(
    monkeypatch,
):
    m, _ = made("four-step", every=1)
    index = next(i for i in range(4) if method.drawn_step(step(i), 4, 1) == 2)
    x_k, t_k = inputs(m, index)
    pseudo = captured(monkeypatch, method, "pseudo_loss")
    net, gradients = VelocityMLP(SHAPE, 3, 16, 2), []
    net.load_state_dict(m.net.state_dict())
    m.student.update = lambda loss: gradients.extend(
        torch.autograd.grad(pseudo[0][0][0].sum(), m.student.parameters)
    )
    m.train_step(batch(), step(index))
    labels = batch().cond.labels
    own = torch.autograd.grad(m.generate(net, x_k, t_k, labels).sum(), list(net.parameters()))
    assert all(torch.allclose(a, b) for a, b in zip(gradients, own))
    z, fresh = step(index).rng("z").normal(N, *SHAPE), step(index).rng("renoise")
    whole = method.renoising(
        lambda x, t: m.generate(net, x, t, labels), z, 4, lambda: fresh.normal(N, *SHAPE), 3
    )
    planted = torch.autograd.grad(whole.sum(), list(net.parameters()))
    assert not all(torch.allclose(a, b, rtol=1e-2, atol=1e-3) for a, b in zip(gradients, planted))


# (d): k for each row; test 6: one law with the simulated ones where there is one step
def test_noised_real_inputs():
    m, _ = made("noised-real")
    data, own = batch(), step()
    x, t = inputs(m, 0)
    z = own.rng("z").normal(N, *SHAPE)
    assert set(t.tolist()) == {1.0, 0.75, 0.5, 0.25}
    torch.testing.assert_close(x, noised(data.x, z, t))
    # Planted: one k for the batch
    assert all(len(inputs(made("four-step")[0], i)[1].unique()) == 1 for i in range(8))
    one = [inputs(made("noised-real", steps=1)[0], 3), inputs(made()[0], 3)]
    assert torch.equal(one[0][0], one[1][0]) and torch.equal(one[0][1], one[1][1])
    two = [inputs(made(name, steps=2)[0], i) for name in ("noised-real", None) for i in range(4)]
    # Planted: with two steps they differ
    assert not any(torch.equal(a[0], b[0]) for a, b in zip(two[:4], two[4:]))


@pytest.mark.parametrize(
    ("variant", "nfe", "start"),
    [
        (None, (1,), 1.0),
        (None, (1,), 0.8),
        ("two-step", (1, 2), 0.8),
        ("four-step", (1, 2, 4), 1.0),
        ("noised-real", (1, 2, 4), 1.0),
    ],
)
def test_the_sampler_is_the_re_noising_loop(variant, nfe, start):  # test 7: specs (d)
    m, task = made(variant, input_time=start)
    needs = DMD2.needs(m.config)
    assert needs.nfe == nfe and needs.headline_nfe == nfe[-1]
    z, labels = torch.randn(8, *SHAPE), torch.arange(8) % 3
    for k in nfe:
        task.meter.rows.clear()
        with task.meter.counting():
            x = m.sample(z, Condition(labels), k, Rng(0, "s"))
        assert dict(task.meter.rows) == {"student": 8 * k}
        fresh, expected = Rng(0, "s"), m.generate(m.net, start * z, torch.full((8,), start), labels)
        for i in range(1, k):
            t = torch.full((8,), start * (1 - i / k))
            expected = m.generate(m.net, noised(expected, fresh.normal(8, *SHAPE), t), t, labels)
        torch.testing.assert_close(x, expected)
        other = m.sample(z, Condition(labels), k, Rng(1, "s"))
        assert torch.equal(x, other) == (k == 1)  # stochastic, and no noise after the last step


def test_the_average_is_what_is_sampled():
    m, _ = made(student={"lr": 1e-2, "half_lives": {"evaluation": 0.5}})
    m.student.total_updates = 10
    for i in range(6):
        m.train_step(batch(), step(i))
    z, labels = torch.randn(6, *SHAPE), torch.arange(6) % 3

    def jump(net):
        return z - net(z, torch.ones(6), labels)

    x = m.sample(z, Condition(labels), 1, None)
    assert torch.equal(x, jump(m.student.averaged())) and not torch.allclose(
        x, jump(m.net), atol=1e-4
    )


# Arms.


def test_every_variant_changes_an_update():
    after = {}
    for name in VARIANTS:
        m, _ = made(name)
        for i in range(12):
            m.train_step(batch(), step(i))
        after[name] = weights(m.net)
    for i, (a, x) in enumerate(after.items()):
        for b, y in list(after.items())[i + 1 :]:
            assert not torch.allclose(x, y, atol=1e-5), (a, b)
    again, _ = made()
    for i in range(12):
        again.train_step(batch(), step(i))
    # Planted: no change of settings, no change of weights
    assert torch.equal(weights(again.net), after[None])


@pytest.mark.parametrize("name", [n for n in VARIANTS if n])
def test_data_and_networks_are_asked_for_only_where_needed(name):
    m, task = made(name)
    c, needs = m.config, DMD2.needs(m.config)
    assert (
        needs.data == (c.gan > 0 or c.inputs == "noised_real")
        and needs.teacher
        and needs.pairs is None
        and needs.features is None
    )
    assert hasattr(m, "head") == (c.gan > 0)
    if not needs.data:
        m.train_step(Batch(N, batch().cond), step())
    if c.features == "teacher":
        assert m.trunk is not task.teacher.network and not any(
            p.requires_grad for p in m.trunk.parameters()
        )
        torch.testing.assert_close(weights(m.trunk), weights(task.teacher.network))
        assert len(m.critic.parameters) == len(list(m.fake.parameters())) + len(
            list(m.head.parameters())
        )


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"matching": False, "gan": 0.0}, "without a loss"),
        ({"disjoint": True, "every": 1}, "never trains the critic"),
    ],
)
def test_settings_that_train_nothing_are_refused(changes, why):
    with pytest.raises(ValueError, match=why):
        made(**changes)


def test_gan_only_still_trains_the_critic():  # (h): --gan_alone
    m, task = made("gan-only")
    with task.meter.counting():
        logged = m.train_step(batch(), step())
    assert (
        "critic" in logged and "matching_gradient" not in logged and not task.meter.calls["teacher"]
    )


def test_mixtures_without_classes():
    torch.manual_seed(1)
    teacher = VelocityMLP((2,), 0, 16, 2)
    for p in teacher.parameters():
        nn.init.normal_(p, std=0.2)
    # a closed form has no features
    exact = SimpleNamespace(velocity=lambda x, t, cond: gaussian(x, t, 0.0, 0.5))
    architecture = partial(VelocityMLP, (2,), 0, width=16, depth=2)
    for name in (None, "teacher-features", "four-step-conditioned"):
        task = Task((2,), 0, architecture, exact, teacher.state_dict(), 0, CPU, Meter())
        m = DMD2(
            task, DMD2.Config.model_validate(merged(merged(FILE["config"], SMALL), VARIANTS[name]))
        )
        for i in range(2):
            logged = m.train_step(Batch(N, Condition(None), torch.randn(N, 2)), step(i))
        assert all(v.isfinite() for v in logged.values())
        assert m.sample(torch.randn(5, 2), Condition(None), m.config.steps, Rng(0)).shape == (5, 2)


def cost(
    student: int,
    moved: int,
    teacher: int,
    critic: int,
    trained: int,
    head: int = 0,
    frozen: int = 0,
) -> dict[str, int]:
    named = {
        "student": student,
        "student.backward": moved,
        "teacher": teacher,
        "critic": critic,
        "critic.backward": trained,
    }
    return {k: v for k, v in (named | {"critic.1": head, "network": frozen}).items() if v}


# On the student's turn: the critic for L_DM, its features for L_adv;
# on the critic's: once for L_fake, once for real and fake together.
COSTS = {
    None: cost(2, 1, 1, 2 + 4, 2, head=3),
    "velocity": cost(2, 1, 1, 2 + 4, 2, head=3),
    "one-to-one": cost(1, 1, 1, 2 + 2, 1, head=2),
    "five-to-one": cost(5, 1, 1, 2 + 10, 5, head=6),
    "disjoint": cost(5, 1, 1, 2 + 8, 4, head=5),
    "no-gan": cost(2, 1, 1, 1 + 2, 2),
    "no-gan-one-to-one": cost(1, 1, 1, 1 + 1, 1),
    "no-gan-five-to-one": cost(5, 1, 1, 1 + 5, 5),
    "no-gan-ten-to-one": cost(10, 1, 1, 1 + 10, 10),
    "no-gan-fast-critic": cost(1, 1, 1, 1 + 1, 1),
    "gan-only": cost(2, 1, 0, 1 + 4, 2, head=3),
    "gan-only-one-to-one": cost(1, 1, 0, 1 + 2, 1, head=2),
    "teacher-features": cost(2, 1, 1, 1 + 2, 2, head=3, frozen=3),
    # The k-th step is simulated by k evaluations:
    # 1 in two steps of N = 2, 6 in four steps of N = 4, at each place of r = 2.
    "two-step": cost(4 + 2, 2, 2, 12, 4, head=6),
    "two-step-conditioned": cost(4 + 2, 2, 2, 12, 4, head=6),
    "four-step": cost(8 + 12, 4, 4, 24, 8, head=12),
    "four-step-conditioned": cost(8 + 12, 4, 4, 24, 8, head=12),
    "four-step-no-gan": cost(8 + 12, 4, 4, 12, 8),
    "four-step-gan-only": cost(8 + 12, 4, 0, 20, 8, head=12),
    "noised-real": cost(2, 1, 1, 6, 2, head=3),
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("start", [0, 1, 5])
def test_no_evaluation_more_than_the_algorithm_needs(name, start):
    """A cycle costs the same wherever it stands, although the steps it simulates are drawn."""
    m, task = made(name)
    assert calls_of_cycle(m, task, DMD2.needs(m.config).cycle, start, batch()) == COSTS[name]


def test_only_the_students_turn_has_a_graph():
    m, _ = made()
    graphs = []
    m.net.register_forward_hook(lambda _m, args, out: graphs.append(out.requires_grad))
    for i in range(4):
        m.train_step(batch(), step(i))
    assert graphs == [True, False, True, False]
