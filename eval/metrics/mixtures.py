"""Scores of samples of a Gaussian mixture whose means, common sigma and weights are known."""

import math

import torch
from scipy.stats import chi2
from torch import Tensor

from eval.metrics.rounding import rounded

OUTSIDE = math.exp(-4.5)  # mass beyond 3 sigma of a Gaussian in 2-D: 0.0111
LEAST_SHARE = 0.1  # of a component's expected number of samples, for it to count as found
DIRECTIONS_AT_ONCE = 32  # at N = 20,000 some 5 MB


def evaluate_mixture(
    samples: Tensor,
    exact: Tensor,
    exact_again: Tensor,
    means: Tensor,
    sigma: float,
    weights: Tensor,
) -> dict[str, float | int]:
    """Scores of samples of the mixture sum_k weights[k] N(means[k], sigma^2 I).

    samples [N,D]; exact, exact_again [N,D]: two independent exact draws; means [K,D], weights [K].

    sliced_w2, sliced_w2_floor  distance of samples, and of exact_again, to exact; in the data's
                                unit
    weight_tv                   total variation in [0, 1] between the nearest-mean histogram and
                                the weights
    outside, outside_exact      share farther from every mean than the radius beyond which a
                                Gaussian has 0.011 of its mass (3 sigma in 2-D); a little less
                                where components overlap
    modes, modes_total          components that hold at least a tenth of their expected share, of
                                how many

    Floats have 8 significant digits. Raises ValueError for unequal shapes or values that are not
    finite.
    """
    nearest, is_near = _assignment(samples, means, sigma)
    _, exact_is_near = _assignment(exact, means, sigma)
    counts = torch.bincount(nearest, minlength=len(means)).double()
    near_counts = torch.bincount(nearest[is_near], minlength=len(means)).double()
    shares = weights.double() / weights.double().sum()
    expected = LEAST_SHARE * shares * len(samples)
    return {
        "sliced_w2": rounded(sliced_wasserstein(samples, exact)),
        "sliced_w2_floor": rounded(sliced_wasserstein(exact_again, exact)),
        "weight_tv": rounded((counts / len(samples) - shares).abs().sum().item() / 2),
        "outside": rounded(1 - is_near.double().mean().item()),
        "outside_exact": rounded(1 - exact_is_near.double().mean().item()),
        "modes": int((near_counts >= expected).sum()),
        "modes_total": len(means),
    }


def sliced_wasserstein(a: Tensor, b: Tensor, projections: int = 256, seed: int = 0) -> float:
    """Root mean square over directions of the 1-D 2-Wasserstein distance; Bonneel et al. 2015.

    a, b [N,D] -> float >= 0 in the data's unit, float64 inside. A shift by d gives |d|/sqrt(D).
    Positive (about N^-1/2) even for two draws of one law, so read it next to such a floor. In 2-D
    the directions are equally spaced, else drawn from `seed`. Raises ValueError for unequal shapes
    or values that are not finite.
    """
    if a.shape != b.shape or a.ndim != 2:
        raise ValueError(f"need two equal [N,D], got {list(a.shape)} and {list(b.shape)}")
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ValueError("values that are not finite have no distance")
    total = 0.0
    for part in _directions(a.shape[1], projections, seed).split(DIRECTIONS_AT_ONCE):
        a_sorted = (part @ a.double().T).sort().values
        b_sorted = (part @ b.double().T).sort().values
        difference = a_sorted - b_sorted
        total += difference.square().mean(dim=1).sum().item()
    return math.sqrt(total / projections)


def _directions(dimension: int, projections: int, seed: int) -> Tensor:
    """Unit vectors [projections, dimension], float64.

    In 2-D half the circle is enough: opposites project alike.
    """
    if dimension == 2:
        angle = torch.arange(projections, dtype=torch.float64) * math.pi / projections
        return torch.stack([angle.cos(), angle.sin()], dim=1)
    rng = torch.Generator().manual_seed(seed)
    draws = torch.randn(projections, dimension, generator=rng, dtype=torch.float64)
    return draws / draws.norm(dim=1, keepdim=True)


def _assignment(samples: Tensor, means: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """Index [N] of the nearest mean, and bool [N]: as near as all but 0.011 of its component."""
    distance, nearest = torch.cdist(samples.double(), means.double()).min(dim=1)
    radius = sigma * math.sqrt(chi2.ppf(1 - OUTSIDE, df=samples.shape[1]))
    return nearest, distance <= radius
