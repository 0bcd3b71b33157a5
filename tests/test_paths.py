"""Identities of the straight path: specs/conventions.md, by section and test number."""

import math

import pytest
import torch
from torch import Tensor

from distillbench import paths


def close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> bool:
    return bool((a - b).abs().max() < tolerance)


@pytest.fixture
def rows() -> tuple[Tensor, ...]:
    """x, e, v_real, v_fake [64, 5] and t [64] in (0.05, 0.95), float64."""
    g = torch.Generator().manual_seed(0)
    x, e, v_real, v_fake = (torch.randn(64, 5, generator=g, dtype=torch.float64) for _ in range(4))
    return x, e, v_real, v_fake, 0.05 + 0.9 * torch.rand(64, generator=g, dtype=torch.float64)


def test_the_velocity_of_a_pair_gives_back_its_data_and_noise(rows):  # 'Target convention'
    x, e, _, _, t = rows
    x_t = paths.noised(x, e, t)
    assert close(paths.denoiser(x_t, e - x, t), x) and close(paths.noise(x_t, e - x, t), e)
    assert close(paths.score(x_t, e - x, t), -(x_t - (1 - t[:, None]) * x) / t[:, None] ** 2)
    # Planted: the sign of v (the FreeFlow / rectified-flow convention)
    assert not close(paths.denoiser(x_t, x - e, t), x)


@pytest.mark.parametrize("name", ["denoiser", "noise", "score"])
def test_inverses(rows, name):
    x, e, v, _, t = rows
    x_t = paths.noised(x, e, t)
    prediction, back = getattr(paths, name), getattr(paths, f"velocity_of_{name}")
    assert close(back(x_t, prediction(x_t, v, t), t), v)
    assert not close(back(x_t, prediction(x_t, v, t), 1 - t), v)  # planted: time runs the other way


def test_jump_and_average_velocity_are_inverse(rows):
    x, _, u, _, t = rows
    s = 0.5 * t
    assert close(paths.average_velocity(x, paths.jump(x, u, t, s), t, s), u)
    assert close(paths.jump(x, u, t, t), x)
    # Planted: t and s swapped
    assert not close(paths.average_velocity(x, paths.jump(x, u, s, t), t, s), u)


@pytest.mark.parametrize("process", ["edm", "vp"])
def test_change_of_schedule(rows, process):  # 'Change of schedule', test 1
    x, e, eps, _, t = rows
    angle = t * math.pi / 2
    alpha, sigma = (
        (torch.ones_like(t), t / (1 - t)) if process == "edm" else (angle.cos(), angle.sin())
    )
    state = alpha[:, None] * x + sigma[:, None] * e
    x_t, time = paths.to_flow(state, alpha, sigma)
    assert close(x_t, paths.noised(x, e, time)) and close(time / (1 - time), sigma / alpha)
    # the denoised image of an eps-model is the same before and after
    before = (state - sigma[:, None] * eps) / alpha[:, None]
    assert close(paths.denoiser(x_t, paths.velocity_of_noise(x_t, eps, time), time), before, 1e-9)
    # planted: the time label without the scale of the input
    assert not close(state, paths.noised(x, e, time))
    if process == "edm":
        back, level = paths.from_flow(x_t, time)
        assert close(back, state) and close(level, sigma) and close(time, t)


def test_stable_diffusion_steps_in_flow_time():  # 'Noise-level distributions', test 6
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alpha = (1 - beta).cumprod(0).sqrt()
    _, t = paths.to_flow(alpha, alpha, (1 - alpha**2).sqrt())
    expected = {20: 0.121, 249: 0.409, 399: 0.537, 499: 0.617, 749: 0.803, 980: 0.929, 999: 0.936}
    assert all(abs(t[i] - value) < 6e-4 for i, value in expected.items())


def test_karras_grid_in_flow_time():  # 'Noise-level distributions', test 5
    sigma = torch.linspace(0.002 ** (1 / 7), 80 ** (1 / 7), 1000, dtype=torch.float64) ** 7
    _, t = paths.to_flow(sigma, torch.ones_like(sigma), sigma)
    expected = {
        0: 0.002,
        20: 0.0032,
        100: 0.0165,
        250: 0.146,
        500: 0.716,
        750: 0.946,
        980: 0.9863,
        999: 0.9877,
    }
    assert all(abs(t[i] - value) < 6e-4 for i, value in expected.items())
    used, edges = t[20:981], torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9], dtype=torch.float64)
    mass = torch.bincount(torch.bucketize(used, edges), minlength=6) / len(used)
    assert close(mass, torch.tensor([0.21, 0.11, 0.08, 0.09, 0.17, 0.34]), 6e-3)


def test_five_difference_identities(rows):  # 'Differences between two networks', test 2
    x, e, v_r, v_f, t = rows
    x_t, tt, v = paths.noised(x, e, t), t[:, None], v_r - v_f
    x0_r, x0_f = paths.denoiser(x_t, v_r, t), paths.denoiser(x_t, v_f, t)
    ds = paths.score(x_t, v_f, t) - paths.score(x_t, v_r, t)
    identities = [
        (x0_f - x0_r, tt * v),
        (paths.noise(x_t, v_r, t) - paths.noise(x_t, v_f, t), (1 - tt) * v),
        (ds, (1 - tt) / tt**2 * (x0_f - x0_r)),
        (ds, (1 - tt) / tt * v),
        (x - x0_r, tt * (v_r - (e - x))),
    ]
    assert all(close(left, right) for left, right in identities)
    # Planted: real and fake swapped
    assert not any(close(left, -right) for left, right in identities)


def test_guidance_commutes(rows):  # 'Target convention', test 4
    x_t, _, v_null, v_cond, t = rows
    guided = paths.guided(v_null, v_cond, 3.0)
    assert close(guided, -2 * v_null + 3 * v_cond)
    for name in ("denoiser", "noise", "score"):
        f = getattr(paths, name)
        assert close(f(x_t, guided, t), paths.guided(f(x_t, v_null, t), f(x_t, v_cond, t), 3.0))
        # Planted: w - 1
        assert not close(f(x_t, guided, t), paths.guided(f(x_t, v_null, t), f(x_t, v_cond, t), 2.0))


def test_score_is_the_gradient_of_a_gaussian_log_density(rows):
    x_t, _, _, _, t = rows
    tt, mean, c = t[:, None], 0.7, 0.4  # data N(mean, c^2)
    d, variance = x_t - (1 - tt) * mean, (1 - tt) ** 2 * c**2 + tt**2
    v = tt * d / variance - (mean + (1 - tt) * c**2 * d / variance)  # E[e | x_t] - E[x | x_t]
    x_t.requires_grad_()
    log_p = torch.distributions.Normal((1 - tt) * mean, variance.sqrt()).log_prob(x_t).sum()
    (gradient,) = torch.autograd.grad(log_p, x_t)
    assert close(paths.score(x_t, v, t), gradient)
    assert not close(-paths.noise(x_t, v, t), gradient)  # planted: eps taken for the score


def test_denoising_losses_are_weighted_velocity_losses(rows):  # 'Denoising-loss weights', test 9
    x, e, v, _, t = rows
    x_t, tt, sd = paths.noised(x, e, t), t[:, None], 0.5
    squared = (v - (e - x)).square()
    x0 = (paths.denoiser(x_t, v, t) - x).square()
    edm = (((1 - tt) / tt) ** 2 + 1 / sd**2) * x0
    assert close(edm, ((1 - tt) ** 2 + tt**2 / sd**2) * squared)
    assert close((paths.noise(x_t, v, t) - e).square(), (1 - tt) ** 2 * squared) and close(
        x0, tt**2 * squared
    )
