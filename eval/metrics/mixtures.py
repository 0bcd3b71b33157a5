"""Scores of samples of a Gaussian mixture whose means, common sigma and weights are known."""

import math

import torch
from scipy.stats import chi2
from torch import Tensor

OUTSIDE = math.exp(-4.5)  # mass beyond 3 sigma of a Gaussian in 2-D: 0.0111
LEAST_SHARE = 0.1  # of a component's expected number of samples, for it to count as found


def evaluate_mixture(
    samples: Tensor, exact: Tensor, exact2: Tensor, means: Tensor, sigma: float, weights: Tensor
) -> dict[str, float | int]:
    """Scores of samples [N,D] of the mixture sum_k weights[k] N(means[k], sigma^2 I), beside two exact draws.

    sliced_w2, sliced_w2_floor  distance of samples, and of exact2, to exact; in the data's unit
    modes, modes_total          components that hold at least a tenth of their expected share, of how many
    weight_tv                   total variation in [0, 1] between the nearest-mean histogram and the weights
    outside, outside_exact      share farther from every mean than the radius beyond which a Gaussian has
                                0.011 of its mass (3 sigma in 2-D); a little less where components overlap

    Floats have 8 significant digits. Raises ValueError for unequal shapes or values that are not finite.
    """
    nearest, near = _assignment(samples, means, sigma)
    counts = torch.bincount(nearest, minlength=len(means)).double()
    found = torch.bincount(nearest[near], minlength=len(means)).double()
    weights = weights.double() / weights.double().sum()
    scores = {
        "sliced_w2": sliced_wasserstein(samples, exact),
        "sliced_w2_floor": sliced_wasserstein(exact2, exact),
        "weight_tv": (counts / len(samples) - weights).abs().sum().item() / 2,
        "outside": 1 - near.double().mean().item(),
        "outside_exact": 1 - _assignment(exact, means, sigma)[1].double().mean().item(),
    }
    return {
        **{name: float(f"{value:.8g}") for name, value in scores.items()},
        "modes": int((found >= LEAST_SHARE * weights * len(samples)).sum()),
        "modes_total": len(means),
    }


def sliced_wasserstein(a: Tensor, b: Tensor, projections: int = 256, seed: int = 0) -> float:
    """Root mean square over directions of the 1-D 2-Wasserstein distance; Bonneel et al. 2015.

    a, b [N,D] -> float >= 0 in the data's unit. A shift by d gives |d|/sqrt(D). Positive (about N^-1/2) even
    for two draws of one law, so read it next to such a floor. In 2-D the directions are equally spaced, else
    seeded. Raises ValueError for unequal shapes or values that are not finite.
    """
    if a.shape != b.shape or a.ndim != 2:
        raise ValueError(f"need two equal [N,D], got {list(a.shape)} and {list(b.shape)}")
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ValueError("values that are not finite have no distance")
    total = 0.0
    for part in _directions(a.shape[1], projections, seed).split(
        32
    ):  # at N = 20,000 some 5 MB at a time
        difference = (part @ a.double().T).sort().values - (part @ b.double().T).sort().values
        total += difference.square().mean(dim=1).sum().item()
    return math.sqrt(total / projections)


def _directions(dimension: int, projections: int, seed: int) -> Tensor:
    """Unit vectors [projections, dimension], float64. Half the circle is enough: opposites project alike."""
    if dimension == 2:
        angle = torch.arange(projections, dtype=torch.float64) * math.pi / projections
        return torch.stack([angle.cos(), angle.sin()], dim=1)
    rng = torch.Generator().manual_seed(seed)
    draws = torch.randn(projections, dimension, generator=rng, dtype=torch.float64)
    return draws / draws.norm(dim=1, keepdim=True)


def _assignment(samples: Tensor, means: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """Index [N] of the nearest mean, and whether all but 0.011 of its component's samples are as near."""
    distance, nearest = torch.cdist(samples.double(), means.double()).min(dim=1)
    return nearest, distance <= sigma * math.sqrt(chi2.ppf(1 - OUTSIDE, df=samples.shape[1]))
