"""Distribution-matching gradients: weightings, scale, stop-gradients.

specs/conventions.md tests 3, 7, 8; specs/dmd.md tests 1-5.
"""

import pytest
import torch
from torch import Tensor

from distillbench.matching import WEIGHTINGS, matching_gradient, pseudo_loss
from distillbench.paths import denoiser, noise, noised, over, score


def mean_abs(x: Tensor) -> Tensor:
    return x.abs().mean(1, keepdim=True)


# conventions.md 'Named weightings', column 'general form' (a = alpha = 1 - t, sigma = t);
# x0, eps, s of real r and fake f
GENERAL = {
    "reverse_kl": lambda a, x, r, f: a * (f["s"] - r["s"]),
    "sigma_alpha": lambda a, x, r, f: r["eps"] - f["eps"],
    "sigma3_alpha": lambda a, x, r, f: (1 - a) ** 2 * (r["eps"] - f["eps"]),
    "residual": lambda a, x, r, f: (f["x0"] - r["x0"]) / mean_abs(x - r["x0"]),
    "alpha_residual": lambda a, x, r, f: a * (f["x0"] - r["x0"]) / mean_abs(x - r["x0"]),
    # x_t = (1-t) x0 + t eps for the two predictions of one network
    "noisy_residual": lambda a, x, r, f: (
        (f["x0"] - r["x0"]) / mean_abs(a * r["x0"] + (1 - a) * r["eps"] - r["x0"])
    ),
    "velocity": lambda a, x, r, f: (f["x0"] - r["x0"]) / (1 - a),
}


def sides(weighting: str, t_value: float | None = None) -> tuple[Tensor, Tensor]:
    """(flow form, general form) on random velocities."""
    x, e, v_r, v_f = torch.randn(4, 32, 7, dtype=torch.float64)
    t = (
        0.02 + 0.96 * torch.rand(32, dtype=torch.float64)
        if t_value is None
        else torch.full((32,), t_value, dtype=torch.float64)
    )
    x_t = noised(x, e, t)
    real, fake = (
        {"x0": denoiser(x_t, v, t), "eps": noise(x_t, v, t), "s": score(x_t, v, t)}
        for v in (v_r, v_f)
    )
    return matching_gradient(v_r, v_f, x, e, t, weighting), GENERAL[weighting](
        1 - over(t, x), x, real, fake
    )


def same(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() < 1e-9 * b.abs().max())


def test_every_weighting_is_checked():
    assert set(WEIGHTINGS) == set(GENERAL)


@pytest.mark.parametrize("weighting", GENERAL)
def test_flow_form_equals_general_form(weighting):
    flow, general = sides(weighting)
    assert same(flow, general)
    assert not same(-flow, general)  # planted: v_fake - v_real
    others = [sides(other)[0] for other in GENERAL if other != weighting]
    assert not any(same(other, general) for other in others)


# conventions.md test 3; dmd.md test 4: Eq. 8 differs by exactly (1 - t)
@pytest.mark.parametrize("t", [1e-4, 1 - 1e-4])
def test_times_cancel_in_the_code_form(
    t,
):
    flow, general = sides("residual", t)
    assert same(flow, general)
    torch.manual_seed(0)
    code = sides("residual", t)[0]
    torch.manual_seed(0)
    assert same(sides("alpha_residual", t)[0], (1 - t) * code)


@pytest.mark.parametrize("t", [0.0, 1.0])
def test_the_code_form_needs_no_special_case_at_the_ends(t):
    x, e, v_r, v_f = torch.randn(4, 8, 7)
    time = torch.full((8,), t)
    assert matching_gradient(v_r, v_f, x, e, time, "residual").isfinite().all()
    x_t = noised(x, e, time)
    naive = (denoiser(x_t, v_f, time) - denoiser(x_t, v_r, time)) / mean_abs(
        x - denoiser(x_t, v_r, time)
    )
    assert t > 0 or not naive.isfinite().all()  # planted: the ratio of denoisers is 0/0 at t = 0


def test_the_normaliser_is_one_number_per_sample_and_divides():  # dmd.md test 5
    x, e, residual, difference = torch.randn(4, 8, 2, 4, 4)
    t = torch.rand(8)
    once = matching_gradient(e - x + residual, e - x + residual - difference, x, e, t, "residual")
    twice = matching_gradient(
        e - x + 2 * residual, e - x + 2 * residual - difference, x, e, t, "residual"
    )
    torch.testing.assert_close(once, 2 * twice, rtol=1e-4, atol=1e-5)  # multiplying would give 0.5
    torch.testing.assert_close(
        once * residual.abs().mean((1, 2, 3), keepdim=True), difference, rtol=1e-4, atol=1e-5
    )
    one_row = matching_gradient(
        (e - x + residual)[:1], (e - x + residual - difference)[:1], x[:1], e[:1], t[:1], "residual"
    )
    torch.testing.assert_close(one_row, once[:1])  # not a mean over the batch


def test_the_noisy_normaliser_is_the_teachers_own_velocity():  # dp_dmd.md b.3 step 4 and test 5
    x, e, v_r, v_f = torch.randn(4, 8, 2, 4, 4)
    g = {
        t: matching_gradient(v_r, v_f, x, e, torch.full((8,), t), "noisy_residual")
        for t in (0.0, 0.02, 0.6, 1.0)
    }
    expected = (v_r - v_f) / v_r.abs().mean((1, 2, 3), keepdim=True)
    for value in g.values():  # the level of noise cancels
        torch.testing.assert_close(value, expected)
    t = torch.full((8,), 0.6)
    x_t = noised(x, e, t)
    x0_r, x0_f = denoiser(x_t, v_r, t), denoiser(x_t, v_f, t)

    def size(x):
        return (x - x0_r).abs().mean((1, 2, 3), keepdim=True)

    # the printed form
    torch.testing.assert_close((x0_f - x0_r) / size(x_t), expected, rtol=1e-4, atol=1e-5)
    # Planted: DMD's, of the clean x
    assert not torch.allclose((x0_f - x0_r) / size(x), expected, rtol=0.1, atol=0.1)
    still = matching_gradient(0 * v_r, v_f, x, e, t, "noisy_residual")
    # Planted: no floor
    assert (
        still.isfinite().all()
        and not (-v_f / (0 * v_r).abs().mean((1, 2, 3), keepdim=True)).isfinite().all()
    )


def test_gradient_of_the_pseudo_loss_is_g_over_its_size():  # conventions.md test 7, dmd.md test 1
    x, g = (torch.randn(6, 3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    pseudo_loss(x, g).backward()
    torch.testing.assert_close(x.grad, g.detach() / g.numel())
    assert g.grad is None
    for planted in (
        0.5 * (x - (x - g).detach()).square().sum(),
        0.5 * (x - (x + g).detach()).square().mean(),
    ):
        (gradient,) = torch.autograd.grad(planted, x)
        assert not torch.allclose(gradient, g.detach() / g.numel())  # planted: sum reduction, sign


def test_nothing_flows_into_the_gradient():  # dmd.md test 1
    tensors = [torch.randn(4, 3, requires_grad=True) for _ in range(4)]
    for weighting in WEIGHTINGS:
        assert not matching_gradient(*tensors, torch.rand(4), weighting).requires_grad


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_equal_networks_are_stationary(weighting):  # dmd.md test 2
    x, e, v = torch.randn(3, 4, 5)
    assert not matching_gradient(v, v.clone(), x, e, torch.rand(4), weighting).any()


def gaussian_velocity(x: Tensor, t: Tensor, mean: float, std: float) -> Tensor:
    t = over(t, x)
    d, variance = x - (1 - t) * mean, (1 - t) ** 2 * std**2 + t**2
    return (t - (1 - t) * std**2) / variance * d - mean


# conventions.md test 8, dmd.md test 3
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize(("m0", "a0"), [(1.0, 0.5), (-1.0, 2.0), (0.3, 1.5)])
def test_descent_moves_a_gaussian_to_the_teacher(weighting, m0, a0):
    def closer(sign: float) -> tuple[bool, bool]:
        m, a = torch.tensor(m0, requires_grad=True), torch.tensor(a0, requires_grad=True)
        z, e = torch.randn(2, 512, 64)
        x, t = m + a * z, 0.02 + 0.96 * torch.rand(512)
        x_t = noised(x, e, t).detach()
        v_real, v_fake = gaussian_velocity(x_t, t, 0.0, 1.0), gaussian_velocity(x_t, t, m0, a0)
        g = matching_gradient(v_real, v_fake, x.detach(), e, t, weighting)
        dm, da = torch.autograd.grad(pseudo_loss(x, sign * g), (m, a))
        return bool((m - 1e-2 * dm).abs() < m.abs()), bool(
            (a - 1e-2 * da - 1).abs() < (a - 1).abs()
        )

    assert closer(1.0) == (True, True)
    assert closer(-1.0) == (False, False)  # planted: the sign of g


def test_a_perfectly_reconstructed_sample_has_a_finite_gradient():  # specs/dmd2.md test 1
    x, e, v_fake = torch.randn(3, 4, 1, 2, 2).unbind(0)
    t = torch.full((4,), 0.5)
    g = matching_gradient(e - x, v_fake, x, e, t, "residual")
    assert g.isfinite().all() and g.abs().max() > 0
    # without the floor
    planted = ((e - x) - v_fake) / ((e - x) - (e - x)).abs().mean(dim=(1, 2, 3), keepdim=True)
    assert not planted.isfinite().all()
