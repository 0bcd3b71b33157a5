"""Re-noising and backward simulation on Gaussians, where every law is known: specs/dmd2.md (d).

Numbers of tests are that file's.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from distillbench.paths import noised
from distillbench.samplers import renoising, simulated_input

M, S, N = 0.7, 0.4, 200_000  # data N(M, S^2)
STEPS = (1, 2, 4)


def spread(t: Tensor) -> Tensor:
    """Standard deviation of x_t."""
    return ((1 - t) ** 2 * S**2 + t**2).sqrt()


def transport(x: Tensor, t: Tensor) -> Tensor:
    """The exact few-step student: takes x_t ~ N((1-t) M, spread^2) to the data, whatever t."""
    t = t[:, None]
    return M + S * (x - (1 - t) * M) / spread(t)


def posterior(x: Tensor, t: Tensor) -> Tensor:
    """E[x0 | x_t], the teacher's denoiser."""
    t = t[:, None]
    return M + (1 - t) * S**2 / spread(t) ** 2 * (x - (1 - t) * M)


def noise(seed: int = 0) -> tuple[Tensor, Callable[[], Tensor]]:
    """Starting noise [N, 1] and a stream of fresh noise."""
    g = torch.Generator().manual_seed(seed)

    def draw():
        return torch.randn(N, 1, generator=g, dtype=torch.float64)

    return draw(), draw


def at(t: float, like: Tensor) -> Tensor:
    return like.new_full((len(like),), t)


# What `renoising` could have been instead; each is wrong in one thing.


def stale(denoise, z, steps, fresh):
    x = denoise(z, at(1, z))
    for i in range(1, steps):
        x = denoise(noised(x, z, at(1 - i / steps, z)), at(1 - i / steps, z))
    return x


def one_late(denoise, z, steps, fresh):
    """The network is told the time before."""
    x = denoise(z, at(1, z))
    for i in range(1, steps):
        x = denoise(noised(x, fresh(), at(1 - i / steps, z)), at(1 - (i - 1) / steps, z))
    return x


def reversed_roles(denoise, z, steps, fresh):
    x = denoise(z, at(1, z))
    for i in range(1, steps):
        x = denoise(noised(fresh(), x, at(1 - i / steps, z)), at(1 - i / steps, z))
    return x


def last_made(denoise, z, steps, fresh):
    x = denoise(z, at(1, z))
    for i in range(1, steps + 1):
        x = noised(x, fresh(), at(1 - i / steps if i < steps else 1 / steps, z))
        x = denoise(x, at(1 - i / steps, z)) if i < steps else x
    return x


def moments_fit(sampler, denoise, steps: int, mean: float, std: float) -> bool:
    z, fresh = noise()
    x = sampler(denoise, z, steps, fresh)
    return abs(x.mean().item() - mean) < 0.005 and abs(x.std().item() - std) < 0.005


@pytest.mark.parametrize("steps", STEPS)
def test_an_exact_student_returns_the_data(steps):  # test 7
    assert moments_fit(renoising, transport, steps, M, S)
    # at t = 1/2 roles are equal
    wrong = {
        1: (last_made,),
        2: (stale, one_late, last_made),
        4: (stale, one_late, reversed_roles, last_made),
    }
    for planted in wrong[steps]:
        assert not moments_fit(planted, transport, steps, M, S), planted.__name__


@pytest.mark.parametrize("steps", STEPS)
def test_a_posterior_mean_has_the_variance_of_its_recursion(steps):
    """The mean is right after any number of steps, and the variance follows the recursion.

    It is what shrinking and noise anew leave: 0 after one step.
    """
    variance = 0.0
    for i in range(1, steps):
        t = torch.tensor(1 - i / steps, dtype=torch.float64)
        gain = ((1 - t) * S**2 / spread(t) ** 2).item()
        variance = gain**2 * ((1 - t.item()) ** 2 * variance + t.item() ** 2)
    assert moments_fit(renoising, posterior, steps, M, variance**0.5)
    # the first output is M: nothing to correlate with
    assert steps < 4 or not moments_fit(stale, posterior, steps, M, variance**0.5)
    # the mean of all data is not a sample
    assert not moments_fit(renoising, posterior, steps, M, S)


@pytest.mark.parametrize("steps", STEPS)
def test_evaluations_times_and_draws(steps):  # test 7: the last re-noise is not made
    def seen(sampler) -> tuple[list[float], int]:
        times, drawn = [], []

        def denoise(x, t):
            times.append(t.unique().item())
            return x

        def fresh():
            drawn.append(0)
            return torch.zeros(3, 2)

        sampler(denoise, torch.zeros(3, 2), steps, fresh)
        return times, len(drawn)

    expected = [1 - i / steps for i in range(steps)], steps - 1
    assert seen(renoising) == expected
    assert seen(last_made) != expected and (steps == 1 or seen(one_late) != expected)


@pytest.mark.parametrize("done", [1, 2, 3, 4])
def test_the_first_evaluations_alone(done):
    calls = []
    renoising(
        lambda x, t: (calls.append(t[0].item()), x)[1],
        torch.zeros(1, 1),
        4,
        lambda: torch.zeros(1, 1),
        done,
    )
    assert calls == [1.0, 0.75, 0.5, 0.25][:done]


def test_noise_is_fresh_at_every_step():  # issue 9 of the official repository: reused noise shows
    z, fresh = noise()
    drawn, seen = [], []
    renoising(
        lambda x, t: (seen.append(x), 0 * x)[1], z, 4, lambda: (drawn.append(fresh()), drawn[-1])[1]
    )
    inputs = [x / (1 - i / 4) for i, x in enumerate(seen)]  # with x0 = 0 the input is t e
    assert all(torch.allclose(a, b) for a, b in zip(inputs, [z, *drawn]))
    correlation = torch.corrcoef(torch.cat(inputs, 1).T)
    assert (correlation - torch.eye(4)).abs().max() < 0.01
    seen.clear()
    stale(lambda x, t: (seen.append(x), 0 * x)[1], z, 4, fresh)
    planted = torch.corrcoef(torch.cat(seen, 1).T)
    assert planted.min() > 0.99


@pytest.mark.parametrize("start", [1.0, 0.8])
@pytest.mark.parametrize("k", range(4))
def test_a_simulated_input_is_what_the_sampler_meets(k, start):  # test 6
    """Bit for bit the k-th input of `renoising` with the same draws, after k evaluations.

    Its law is that of x_t under an exact student.
    """
    inputs, calls = [], []
    z, fresh = noise()
    renoising(lambda x, t: (inputs.append((x, t)), transport(x, t))[1], z, 4, fresh, start=start)
    z, fresh = noise()
    x, t = simulated_input(
        lambda x, t: (calls.append(t), transport(x, t))[1], z, 4, k, fresh, start
    )
    assert torch.equal(x, inputs[k][0]) and torch.equal(t, inputs[k][1]) and len(calls) == k
    # Planted: a neighbour's input
    assert not any(torch.equal(x, inputs[j][0]) for j in range(4) if j != k)
    assert t.unique().item() == start * (1 - k / 4)
    if start < 1:  # its first input is start z, which is no draw of x_t: noise alone, of that size
        assert not torch.equal(inputs[0][0], z) and torch.equal(inputs[0][0], start * z)
        return

    def law(x):
        return (
            abs(x.mean().item() - (k / 4) * M) < 0.005
            and abs(x.std().item() - spread(t[0]).item()) < 0.005
        )

    assert law(x)
    assert k == 0 or not law(transport(x, t))  # planted: the clean sample, not noised again


def test_the_first_input_is_pure_noise():  # test 6, k = 0
    z = torch.randn(5, 2)
    x, t = simulated_input(
        lambda x, t: pytest.fail("evaluated"), z, 4, 0, lambda: pytest.fail("drawn")
    )
    assert torch.equal(x, z) and (t == 1).all()


def test_one_step_has_no_path():  # test 6: with N = 1 simulated and noised real inputs are one law
    z, real = torch.randn(5, 2), torch.full((5, 2), 3.0)
    x, t = simulated_input(
        lambda x, t: pytest.fail("evaluated"), z, 1, 0, lambda: pytest.fail("drawn")
    )
    assert torch.equal(x, noised(real, z, t))
    # Planted: N = 2
    assert not torch.equal(
        simulated_input(lambda x, t: x, z, 2, 1, lambda: z)[0], noised(real, z, at(0.5, z))
    )


@pytest.mark.parametrize("k", [1, 3])
def test_no_gradient_through_the_simulated_path(k):  # test 6
    layer = nn.Linear(2, 2)

    def denoise(x, t):
        return layer(x)

    z = torch.randn(5, 2)
    x, _ = simulated_input(denoise, z, 4, k, lambda: torch.ones(5, 2))
    assert not x.requires_grad
    own = torch.autograd.grad(layer(x).sum(), layer.weight)[0]
    torch.testing.assert_close(own, x.sum(0).expand(2, 2))  # the last evaluation's own
    planted = noised(
        renoising(denoise, z, 4, lambda: torch.ones(5, 2), done=k),
        torch.ones(5, 2),
        at(1 - k / 4, z),
    )
    torch.testing.assert_close(planted.detach(), x)
    assert planted.requires_grad and not torch.allclose(
        torch.autograd.grad(layer(planted).sum(), layer.weight)[0], own, atol=1e-3
    )


def test_gradient_is_left_on_after_the_path():
    layer = nn.Linear(2, 2)
    with torch.set_grad_enabled(True):
        simulated_input(lambda x, t: layer(x), torch.randn(5, 2), 2, 1, lambda: torch.ones(5, 2))
        assert layer(torch.ones(1, 2)).requires_grad
