"""Scores of generated images against held-out reality: pure functions on features.

Generated first, reference second, everywhere. Features are float32 or float64 [N,D], scaled to RMS 1 by the extractor.
`feature_scores` gives all that needs features alone, in one pass over the inner products of all pairs of rows
(`eval/pairwise.py`); tests hold FID, KID, precision and recall to torch-fidelity, FID to clean-fid, density and coverage to
prdc. IS is torch-fidelity's function.

Never rank on FID alone: conditional-mean blur, the typical failure of distillation, beats real data on IS and
passes precision; only recall and coverage see it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric

from eval.features.extractors import Extractor
from eval.metrics.pairwise import NEIGHBOURS, Cloud, Pairs, Within, product, within

LEAST_LOG_PROBABILITY = (
    -600.0
)  # exp(-600) = 1e-261 stays above 0 in float64, even averaged over many rows
LARGEST = 1e15  # of features: squares of larger ones leave float32
K_PRECISION_RECALL, K_DENSITY_COVERAGE = 3, 5


@dataclass(frozen=True)
class Gaussian:
    """Mean [D] and covariance [D,D], both float64, of features: all that FID sees of them."""

    mean: Tensor
    covariance: Tensor

    @classmethod
    def of(cls, cloud: Cloud) -> Gaussian:
        return cls(cloud.mean, cloud.covariance())

    @cached_property
    def root(self) -> Tensor:
        """h with h h^T = covariance, by its eigenvectors: stands singular covariances (N <= D, dead features)."""
        values, vectors = torch.linalg.eigh(self.covariance)
        return vectors.mul_(values.clamp_min_(0).sqrt_())


class Known:
    """What scores need of one set of features alone, each part computed once."""

    def __init__(self, features: Tensor) -> None:
        self.cloud, self.digest = Cloud(features), _digest(features)

    @cached_property
    def gaussian(self) -> Gaussian:
        return Gaussian.of(self.cloud)

    @cached_property
    def within(self) -> Within:
        return within(self.cloud, len(self.cloud))


@dataclass(frozen=True)
class Reference:
    """Features [M,D] of the held-out images, and the hash of the extractor that made them."""

    features: Tensor
    extractor_sha256: str

    @classmethod
    def of(cls, images_u8: Tensor, extractor: Extractor) -> Reference:
        return cls(extractor.features(images_u8)[0], extractor.sha256)

    def known(self) -> Known:
        """Raises ValueError if the features were changed in place after the first call: the kept numbers are of the old ones."""
        if self._known.digest != _digest(self.features):
            raise ValueError(
                "the features of a Reference have changed since its statistics were computed: make another one"
            )
        return self._known

    @cached_property
    def _known(self) -> Known:
        return Known(self.features)


def feature_scores(gen: Tensor, reference: Reference) -> dict[str, float]:
    """fid, kid, precision, recall, density, coverage and c2st of gen [N,D] against a reference [M,D].

    fid, kid: `frechet_distance`, `kid`, of all N rows.

    precision, recall (Kynkaanniemi et al. 2019, eq. 1-2; k = 3) and coverage in [0, 1], density in [0, inf) (Naeem et al.
    2020, sec. 3; k = 5). Same distribution: density 1, coverage 1 - 2^-5, precision and recall well below 1 (0.6 for Gaussians
    in 64-d). Literal copies: 1, 1, 1, 1. A distance equal to a radius counts for precision and recall (torch-fidelity's <=),
    and does not for density and coverage (prdc's <, as <= gives copies density 1 + 1/k).

    c2st in [0, 1]: accuracy of the leave-one-out nearest neighbour at telling generated from held-out rows (Lopez-Paz & Oquab
    2017; Xu et al. 2018). 0.5: indistinguishable; 1: told apart; below 0.5: copies of the held-out rows. A row as near to the
    other set as to its own counts half.

    All but fid and kid grow with N, so numbers must be equal: gen is cut into consecutive pieces of M rows, each is compared
    with the reference, and the mean is returned; a last incomplete piece is left out, unless it is the only one (then c2st
    takes the first N rows of the reference). Memory: no N x M matrix, only blocks.

    Raises ValueError unless both are float32 or float64, of one width, of 6 rows or more, finite and below 1e15.
    """
    _check(gen, reference.features, at_least=NEIGHBOURS[-1] + 1)
    ref, cloud = reference.known(), Cloud(gen)
    own = within(cloud, min(len(gen), len(ref.cloud)))
    cross_sum, scores = _across(cloud, own, ref.cloud, ref.within)
    if len(gen) < len(ref.cloud):
        few = Cloud(reference.features[: len(gen)])
        scores["c2st"] = _across(cloud, own, few, within(few, len(few)))[1]["c2st"]
    return {
        "fid": _frechet(Gaussian.of(cloud), ref.gaussian),
        "kid": _unbiased(
            own.kernel_sum, ref.within.kernel_sum, cross_sum, len(gen), len(ref.cloud)
        ),
        **scores,
    }


def frechet_distance(gen: Tensor, ref: Tensor | Reference) -> float:
    """FID: |mu_g - mu_r|^2 + tr(S_g + S_r - 2 (S_g S_r)^(1/2)); Heusel et al. 2017, eq. 6.

    gen [N,D], ref [M,D] or a Reference, whose factors are then computed once -> float >= 0 up to rounding (copies give about
    -1e-7), in squared feature units (x3 gives x9). Float64 inside. Raises ValueError for other shapes or dtypes, fewer than
    two rows, or values that are not finite.
    """
    reference = ref if isinstance(ref, Reference) else Reference(ref, "")
    _check(gen, reference.features, at_least=2)
    return _frechet(Gaussian.of(Cloud(gen)), reference.known().gaussian)


def kid(gen: Tensor, ref: Tensor) -> float:
    """KID: unbiased squared MMD under the kernel (x.y/D + 1)^3; Binkowski et al. 2018.

    gen [N,D], ref [M,D] -> float, over all pairs of rows, no subsets. Unbiased, so negative values are right: literal copies
    score below 0. No scale-free unit: assumes features of RMS 1. Raises ValueError as `frechet_distance` does.
    """
    _check(gen, ref, at_least=2)
    x, y = Cloud(gen), Cloud(ref)
    of_gen, of_ref, across = (
        sum(p.kernel_sum(*block) for block in p.blocks())
        for p in (Pairs(x, x), Pairs(y, y), Pairs(x, y))
    )
    return _unbiased(of_gen, of_ref, across, len(gen), len(ref))


def inception_score(logits: Tensor) -> float:
    """IS: exp E_x KL(p(y|x) | p(y)); Salimans et al. 2016, sec. 4.

    logits [N,C] -> float in [1, C]. One split: the usual ten bias it down where N is small. Log-probabilities
    are floored, since torch-fidelity answers NaN (0 times inf) where a class underflows to 0 in every row.
    Raises ValueError for other shapes or values that are not finite.
    """
    _check(logits, logits, at_least=1)
    log_p = logits.double().log_softmax(dim=1).clamp_min(LEAST_LOG_PROBABILITY)
    return isc_features_to_metric(log_p, splits=1, shuffle=False)[KEY_METRIC_ISC_MEAN]


def memorisation(gen_pixels: Tensor, train_pixels: Tensor, rows: int = 2048) -> float:
    """1 - AuthPct (Alaa et al. 2022, authenticity) in pixel space: the share of generated images at least as
    near to their nearest training image as that one is to its own nearest other training image.

    gen uint8 [N,...], train uint8 [M,...], same image shape -> float in [0, 1]. Copies give 1; unseen real
    images give far more than 0 (the fixed row `floor` says what). As near counts, as in the authors' code, so
    that a copy of a repeated image is one. Raises ValueError for other shapes or dtypes, or M < 2.
    """
    if gen_pixels.dtype != torch.uint8 or train_pixels.dtype != torch.uint8:
        raise ValueError(f"uint8 pixels expected, got {gen_pixels.dtype} and {train_pixels.dtype}")
    if (
        gen_pixels.ndim < 2
        or gen_pixels.shape[1:] != train_pixels.shape[1:]
        or len(gen_pixels) == 0
        or len(train_pixels) < 2
    ):
        got = f"{list(gen_pixels.shape)} and {list(train_pixels.shape)}"
        raise ValueError(
            f"need images of one shape, one generated and two of training at least, got {got}"
        )
    own = torch.cat(
        [_nearest(part, train_pixels, rows)[0][:, 1] for part in train_pixels.split(rows)]
    )  # the first is the image itself
    copied = 0
    for part in gen_pixels.split(rows):
        distances, nearest = _nearest(part, train_pixels, rows)
        copied += int((distances[:, 0] <= own[nearest]).sum())
    return copied / len(gen_pixels)


def _nearest(images_u8: Tensor, others_u8: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Squared distances float64 [N,2] to the two nearest of the others, so many at once, and which is nearest, the first of equals."""
    a = images_u8.flatten(
        1
    ).double()  # integers: squared distances, and hence ties, are exact in this cheap form
    best, nearest = a.new_full((len(a), 2), torch.inf), torch.zeros(len(a), dtype=torch.long)
    for start in range(0, len(others_u8), rows):
        b = others_u8[start : start + rows].flatten(1).double()
        squared = a.square().sum(1)[:, None] - 2 * (a @ b.T) + b.square().sum(1)
        least, place = squared.min(1)
        nearest = torch.where(least < best[:, 0], place + start, nearest)
        two = squared.topk(min(2, len(b)), largest=False).values
        best = torch.cat([best, two], dim=1).topk(2, largest=False).values
    return best, nearest


def _frechet(gen: Gaussian, ref: Gaussian) -> float:
    """(S_g S_r)^(1/2) has the trace of (h^T S_g h)^(1/2), h h^T = S_r, which is symmetric: no complex square root."""
    cross = (
        torch.linalg.eigvalsh(product(product(ref.root.T, gen.covariance), ref.root))
        .clamp_min_(0)
        .sqrt_()
        .sum()
    )
    gap = (gen.mean - ref.mean).square().sum()
    return (gap + gen.covariance.trace() + ref.covariance.trace() - 2 * cross).item()


def _unbiased(gen_sum: float, ref_sum: float, cross_sum: float, n: int, m: int) -> float:
    """Binkowski et al. 2018, eq. 4, from sums of the kernel; those within a set are over pairs of two rows."""
    return gen_sum / (n * (n - 1)) + ref_sum / (m * (m - 1)) - 2 * cross_sum / (n * m)


def _across(
    gen: Cloud, gen_within: Within, ref: Cloud, ref_within: Within
) -> tuple[float, dict[str, float]]:
    """Kernel sum over all pairs of gen [N,D] and ref [M,D]; the scores of neighbours, over pieces of M rows of gen."""
    pairs, m = Pairs(gen, ref), len(ref)
    used = len(gen_within.radii)
    gen_radii, ref_radii = (
        dict(zip(NEIGHBOURS, w.radii.T.contiguous(), strict=True)) for w in (gen_within, ref_within)
    )
    gen_limits = gen_within.radii[:, [NEIGHBOURS.index(1), NEIGHBOURS.index(K_PRECISION_RECALL)]]
    precise, recalled, covered = (
        torch.zeros(size, dtype=torch.bool) for size in (used, -(-used // m) * m, -(-used // m) * m)
    )
    # How far the other set is the nearest: 1, or 1/2 where both are as near, else 0. Per row of gen, and of ref in every piece.
    gen_taken, ref_taken = torch.zeros(used), torch.zeros(len(recalled))
    inside, cross_sum = 0, 0.0
    for rows, cols, products in pairs.blocks():
        cross_sum += pairs.kernel_sum(rows, cols, products)
        rows = slice(rows.start, max(rows.start, min(rows.stop, used)))
        lower = pairs.lower_(rows, cols, products[: rows.stop - rows.start])
        i, j, squared = pairs.near(rows, cols, lower, gen_limits, ref_within.radii)
        in_piece = i // m * m + j  # row of ref, in the piece of row i
        precise[i[squared <= ref_radii[K_PRECISION_RECALL][j]]] = True
        recalled[in_piece[squared <= gen_radii[K_PRECISION_RECALL][i]]] = True
        dense = squared < ref_radii[K_DENSITY_COVERAGE][j]
        inside += int(dense.sum())
        covered[in_piece[dense]] = True
        for taken, index, nearest in (
            (gen_taken, i, gen_radii[1][i]),
            (ref_taken, in_piece, ref_radii[1][j]),
        ):
            taken.scatter_reduce_(
                0, index, ((squared < nearest).float() + (squared <= nearest).float()) / 2, "amax"
            )
    return cross_sum, {
        "precision": precise.double().mean().item(),
        "recall": recalled.double().mean().item(),
        "density": inside / (K_DENSITY_COVERAGE * used),
        "coverage": covered.double().mean().item(),
        "c2st": 1 - (gen_taken.double().mean().item() + ref_taken.double().mean().item()) / 2,
    }


def _digest(features: Tensor) -> str:
    return hashlib.sha256(features.contiguous().view(torch.uint8).numpy().data).hexdigest()


def _check(gen: Tensor, ref: Tensor, at_least: int) -> None:
    for features in (ref, gen):
        if (
            features.ndim != 2
            or features.shape[1] != ref.shape[1]
            or features.shape[1] == 0
            or len(features) < at_least
        ):
            got = f"{list(gen.shape)} and {list(ref.shape)}"
            raise ValueError(
                f"need two matrices of one width and {at_least} rows or more, got {got}"
            )
        if features.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"need float32 or float64, got {features.dtype}")
        low, high = features.aminmax()
        if not (low > -LARGEST and high < LARGEST):
            raise ValueError("values that are not finite, or beyond 1e15, have no score")
