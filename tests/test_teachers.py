"""The exact velocity of a mixture against densities and Monte Carlo; guidance; ODE pairs.

specs/conventions.md, specs/dmd.md test 9.
"""

import pytest
import torch
from torch import Tensor

from distillbench import paths
from distillbench.data.mixture import Mixture
from distillbench.meter import Meter
from distillbench.method import Condition, Pairs, Teacher
from distillbench.samplers import euler, heun
from distillbench.seeds import Rng
from distillbench.teachers.exact import MixtureVelocity
from distillbench.teachers.pairs import make_pairs

MEANS = torch.tensor([[1.5, 0.0], [-1.0, 1.0], [0.0, -1.5], [-1.5, -1.0]], dtype=torch.float64)
WEIGHTS = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
CLASS = torch.tensor([0, 1, 0, 1])


def mixture(sigma: float = 0.3, means: Tensor = MEANS, weights: Tensor = WEIGHTS) -> Mixture:
    return Mixture(means, sigma, weights, CLASS[: len(weights)], 2)


def states(n: int = 256) -> tuple[Tensor, Tensor]:
    return 2 * torch.randn(n, 2, dtype=torch.float64), 0.02 + 0.96 * torch.rand(
        n, dtype=torch.float64
    )


def velocity_of_density(x: Tensor, t: Tensor, sigma: float = 0.3) -> Tensor:
    """v = -(x + t score) / (1-t), the score by autograd of log p_t.

    p_t has components N((1-t) mu, (1-t)^2 sigma^2 + t^2).
    """
    x = x.clone().requires_grad_()
    a, std = 1 - t, ((1 - t) ** 2 * sigma**2 + t**2).sqrt()
    component = (
        torch.distributions.Normal(a[:, None, None] * MEANS, std[:, None, None])
        .log_prob(x[:, None])
        .sum(-1)
    )
    (score,) = torch.autograd.grad((component + WEIGHTS.log()).logsumexp(1).sum(), x)
    return -(x.detach() + t[:, None] * score) / a[:, None]


def test_velocity_is_that_of_the_density():  # conventions.md: s = -e_hat / t
    x, t = states()
    v = MixtureVelocity(mixture())(x, t)
    torch.testing.assert_close(v, velocity_of_density(x, t), rtol=1e-8, atol=1e-8)
    # Planted: another sigma
    assert not torch.allclose(v, velocity_of_density(x, t, sigma=0.33), atol=1e-3)
    # Planted: other weights
    assert not torch.allclose(MixtureVelocity(mixture(weights=WEIGHTS.flip(0)))(x, t), v, atol=1e-3)


# conventions.md: v ~ E[e - x | x_t], Monte Carlo in 1-D
def test_velocity_is_the_conditional_mean_of_noise_minus_data():
    n, means, weights = (
        400_000,
        torch.tensor([[-1.0], [0.8]], dtype=torch.float64),
        torch.tensor([0.3, 0.7], dtype=torch.float64),
    )
    data = mixture(means=means, weights=weights)
    x = data.draw(Rng(0, "x"), n)[0]
    e = torch.randn(n, 1, dtype=torch.float64)
    for time in (0.2, 0.5, 0.9):
        t = torch.full((n,), time, dtype=torch.float64)
        x_t = paths.noised(x, e, t)
        v = MixtureVelocity(data)(x_t, t)
        bins = ((x_t[:, 0] + 1.5) / 0.3).floor().clamp(0, 9).long()

        def largest_deviation(v: Tensor, bins: Tensor = bins) -> float:
            """Of E[(e - x) - v | bin] from 0, in standard errors."""
            off = (e - x - v)[:, 0]
            return max(
                float(off[bins == k].mean().abs() / off[bins == k].std() * (bins == k).sum().sqrt())
                for k in range(10)
            )

        assert largest_deviation(v) < 4.5
        assert largest_deviation(1.05 * v) > 6 and largest_deviation(-v) > 6  # planted: scale, sign


def test_a_label_keeps_its_components_and_the_null_label_all_of_them():
    x, t = states()
    v, n = MixtureVelocity(mixture()), len(x)
    for c in (0, 1):
        own = torch.eq(CLASS, c)
        alone = MixtureVelocity(
            Mixture(MEANS[own], 0.3, WEIGHTS[own] / WEIGHTS[own].sum(), None, 0)
        )
        torch.testing.assert_close(v(x, t, torch.full((n,), c)), alone(x, t))
        assert not torch.allclose(v(x, t, torch.full((n,), c)), v(x, t), atol=1e-3)
    torch.testing.assert_close(v(x, t, torch.full((n,), 2)), v(x, t))
    mixed = torch.arange(n) % 3  # every row by its own label
    rows = torch.stack([v(x, t, torch.full((n,), c)) for c in range(3)])[mixed, torch.arange(n)]
    torch.testing.assert_close(v(x, t, mixed), rows)


# conventions.md: x0 = x_t - t v at t = 1 is the data mean, e_hat at t = 0 the noise mean 0
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_velocity_at_the_ends(
    dtype,
):
    v = MixtureVelocity(mixture(means=MEANS.to(dtype), weights=WEIGHTS.to(dtype)))
    x = 2 * torch.randn(64, 2, dtype=dtype)
    torch.testing.assert_close(v(x, torch.zeros(64, dtype=dtype)), -x)
    torch.testing.assert_close(
        v(x, torch.ones(64, dtype=dtype)), x - (WEIGHTS[:, None] * MEANS).sum(0).to(dtype)
    )
    near = v(x, torch.full((64,), 1e-4, dtype=dtype))
    assert (near + x).abs().max() < 0.1  # the limit is approached


def test_float32_agrees_with_float64():
    x, t = states()
    single = MixtureVelocity(mixture(means=MEANS.float(), weights=WEIGHTS.float()))(
        x.float(), t.float()
    )
    torch.testing.assert_close(
        single.double(), MixtureVelocity(mixture())(x, t), rtol=1e-4, atol=1e-4
    )


def test_the_ode_carries_noise_to_the_mixture():
    v = MixtureVelocity(mixture())
    z = torch.randn(5000, 2, dtype=torch.float64)

    def error(x: Tensor) -> float:
        """Total variation of the weights plus the largest relative error of a mode's deviation."""
        nearest = torch.cdist(x, MEANS).argmin(1)
        found = torch.bincount(nearest, minlength=4) / len(x)
        stds = torch.stack([(x[nearest == k] - MEANS[k]).square().mean().sqrt() for k in range(4)])
        return float(0.5 * (found - WEIGHTS).abs().sum() + (stds / 0.3 - 1).abs().max())

    assert error(heun(v, z, 64)) < 0.06
    # Planted: coarse, reversed time
    assert error(euler(v, z, 4)) > 0.12 and error(heun(lambda x, t: v(x, 1 - t), z, 64)) > 0.12


def metered(classes: int = 2) -> tuple[Teacher, Meter]:
    meter, teacher = Meter(), Teacher(MixtureVelocity(mixture()), classes)
    meter.watch(teacher.network, lambda: "teacher")
    return teacher, meter


# conventions.md: v_null + w (v_c - v_null); guidance's second call is charged
@pytest.mark.parametrize(("w", "evaluations"), [(1.0, 1), (3.0, 2), (0.0, 2)])
def test_guidance(w, evaluations):
    teacher, meter = metered()
    x, t = states()
    labels, null = torch.arange(len(x)) % 2, torch.full((len(x),), 2)
    with meter.counting():
        v = teacher.velocity(x, t, Condition(labels, w))
    assert meter.calls["teacher"] == evaluations and meter.rows["teacher"] == evaluations * len(x)
    v_c, v_null = teacher.network(x, t, labels), teacher.network(x, t, null)
    torch.testing.assert_close(v, v_null + w * (v_c - v_null))
    # Planted: the other convention of w
    assert not torch.allclose(v, v_c + w * (v_c - v_null), atol=1e-3) or w == 0


def test_a_teacher_without_classes_is_not_guided():
    teacher, meter = metered(classes=0)
    with meter.counting():
        teacher.velocity(*states(), Condition(None, 3.0))
    assert meter.calls["teacher"] == 1


# design.md 'The interface': SiD needs its input gradient
def test_the_teacher_is_frozen_and_differentiable_in_x():
    trained = Teacher(torch.nn.Linear(2, 2), 0).network
    assert not trained.training and not trained.weight.requires_grad
    (x, t), cond, h = (
        states(4),
        Condition(torch.arange(4) % 2, 2.0),
        torch.tensor([1e-6, 0.0], dtype=torch.float64),
    )
    teacher, _ = metered()
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(teacher.velocity(x, t, cond).sum(), x)
    central = (teacher.velocity(x + h, t, cond) - teacher.velocity(x - h, t, cond)) / 2e-6
    torch.testing.assert_close(gradient[:, 0], central.sum(1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("w", [1.0, 2.0])
def test_pairs_are_the_teachers_ode(w):  # dmd.md test 9
    teacher = Teacher(MixtureVelocity(mixture(means=MEANS.float(), weights=WEIGHTS.float())), 2)
    pairs = make_pairs(teacher, Pairs(600, 32, 8), (2,), 2, w, Rng(0, "pairs"))
    assert pairs["z"].shape == pairs["y"].shape == (600, 2)
    assert abs(pairs["z"].mean()) < 0.1 and abs(pairs["z"].std() - 1) < 0.1

    def again(labels: Tensor, guidance: float) -> Tensor:
        """Share of pairs that a finer solver reproduces."""
        y = heun(lambda x, t: teacher.velocity(x, t, Condition(labels, guidance)), pairs["z"], 128)
        return ((y - pairs["y"]).abs().amax(1) < 0.05).float().mean()

    assert again(pairs["labels"], w) > 0.98
    # Planted: other labels, other guidance
    assert again(1 - pairs["labels"], w) < 0.5 and again(pairs["labels"], 5.0) < 0.8
    assert set(pairs["labels"].tolist()) == {0, 1}
