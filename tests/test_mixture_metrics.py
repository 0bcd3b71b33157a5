"""Mixture metrics against closed forms, and against the faults they are there to notice."""

import math

import pytest
import torch
from torch import Tensor

from eval.metrics.mixtures import evaluate_mixture, sliced_wasserstein

N, K, SIGMA = 8000, 8, 0.1
EQUAL = torch.full((K,), 1 / K)


def ring(dimension: int) -> Tensor:
    """K means on the unit circle of the first two axes, 7.6 sigma apart: no overlap."""
    angle = torch.arange(K) * 2 * math.pi / K
    means = torch.zeros(K, dimension)
    means[:, 0], means[:, 1] = angle.cos(), angle.sin()
    return means


def draw(means: Tensor, counts: list[int], seed: int, sigma: float = SIGMA) -> Tensor:
    """Exactly counts[k] samples of component k."""
    rng = torch.Generator().manual_seed(seed)
    centres = means.repeat_interleave(torch.tensor(counts), dim=0)
    return centres + sigma * torch.randn(centres.shape, generator=rng)


def scores(samples: Tensor, weights: Tensor = EQUAL) -> dict[str, float | int]:
    means = ring(samples.shape[1])
    exact, exact2 = (draw(means, [len(samples) // K] * K, seed) for seed in (100, 101))
    return evaluate_mixture(samples, exact, exact2, means, SIGMA, weights)


@pytest.mark.parametrize("dimension", (2, 64))
def test_exact_samples_score_at_the_floor(dimension: int):
    found = scores(draw(ring(dimension), [20000 // K] * K, 0))
    assert list(found) == [
        "sliced_w2",
        "sliced_w2_floor",
        "weight_tv",
        "outside",
        "outside_exact",
        "modes",
        "modes_total",
    ]
    assert found["sliced_w2"] == pytest.approx(found["sliced_w2_floor"], rel=0.5)
    assert found["sliced_w2"] < 0.02
    assert found["modes"] == found["modes_total"] == K
    assert found["weight_tv"] < 1e-3
    assert found["outside"] == pytest.approx(0.0111, abs=0.002)  # in every dimension
    assert found["outside_exact"] == pytest.approx(0.0111, abs=0.002)
    floats = [value for value in found.values() if type(value) is float]
    assert len(floats) == 5 and all(value == float(f"{value:.8g}") for value in floats)


def test_a_dropped_mode_is_noticed():
    counts = [0] + [N // K] * (K - 1)
    counts[1] += N // K
    found = scores(draw(ring(2), counts, 0))
    assert found["modes"] == K - 1
    assert found["weight_tv"] == pytest.approx(1 / K, abs=1e-3)
    assert found["sliced_w2"] > 20 * found["sliced_w2_floor"]


def test_a_starved_mode_counts_from_a_tenth_of_its_share():
    for share, modes in ((0.08, K - 1), (0.12, K)):
        few = int(share * N / K)
        counts = [few, 2 * N // K - few] + [N // K] * (K - 2)
        assert scores(draw(ring(2), counts, 0))["modes"] == modes


def test_a_mode_is_not_found_by_samples_far_from_it():
    means = ring(2)
    samples = draw(means, [N // K] * K, 0)
    samples[: N // K] += means[0] * 0.8  # outwards: still nearest to mean 0, but 8 sigma away
    found = scores(samples)
    assert found["modes"] == K - 1
    assert found["weight_tv"] < 1e-3
    assert found["outside"] == pytest.approx(1 / K + 0.0111 * (K - 1) / K, abs=0.002)
    assert found["outside_exact"] == pytest.approx(0.0111, abs=0.002)


def test_shifted_weights_give_the_exact_total_variation():
    counts = [N // K + 400, N // K - 300, N // K - 100] + [N // K] * (K - 3)
    samples = draw(ring(2), counts, 0, sigma=SIGMA / 2)  # so narrow that no sample strays
    assert scores(samples)["weight_tv"] == pytest.approx(400 / N, abs=1e-9)
    asked = torch.tensor(counts) / N
    assert scores(samples, weights=asked)["weight_tv"] == pytest.approx(0, abs=1e-7)


def test_outside_grows_with_a_width_that_is_too_large():
    wide = scores(draw(ring(2), [N // K] * K, 0, sigma=1.2 * SIGMA))
    assert wide["outside"] == pytest.approx(math.exp(-4.5 / 1.44), abs=0.005)


def test_sliced_wasserstein_of_a_shift_and_of_a_scale():
    rng = torch.Generator().manual_seed(0)
    a = torch.randn(5000, 2, generator=rng)
    shift = torch.tensor([3.0, -1.0])
    assert sliced_wasserstein(a, a + shift) == pytest.approx(math.sqrt(10 / 2), rel=1e-5)
    assert sliced_wasserstein(a, 3 * a) == pytest.approx(
        2 * a.square().mean().sqrt().item(), rel=1e-5
    )
    assert sliced_wasserstein(5 * a, 5 * (a + shift)) == pytest.approx(
        5 * math.sqrt(10 / 2), rel=1e-5
    )
    assert sliced_wasserstein(a, a[torch.randperm(5000, generator=rng)]) == pytest.approx(
        0, abs=1e-9
    )
    # Planted error: paired rows instead of sorted ones see a distance in that permutation.
    assert (a - a[torch.randperm(5000, generator=rng)]).square().mean().sqrt() > 1


def test_sliced_wasserstein_in_many_dimensions_is_seeded_and_near_its_mean():
    rng = torch.Generator().manual_seed(0)
    a, shift = torch.randn(1000, 64, generator=rng), torch.randn(64, generator=rng)
    b = a + shift
    assert sliced_wasserstein(a, b) == sliced_wasserstein(a, b) != sliced_wasserstein(a, b, seed=1)
    assert sliced_wasserstein(a, b, projections=2000) == pytest.approx(
        shift.norm().item() / 8, rel=0.05
    )


def test_bad_samples_are_refused():
    good = torch.zeros(10, 2)
    broken = good.clone()
    broken[3, 1] = float("nan")
    for other in (broken, good[:5], torch.zeros(10, 3)):
        with pytest.raises(ValueError):
            sliced_wasserstein(good, other)
    with pytest.raises(ValueError, match="finite"):
        evaluate_mixture(broken, good, good, ring(2), SIGMA, EQUAL)
