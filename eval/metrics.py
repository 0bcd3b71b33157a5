"""Scores of generated images against held-out reality: pure functions on features.

Generated first, reference second, everywhere. Features are float32 [N,D], scaled to RMS 1 by the extractor.
FID, KID and IS are torch-fidelity's feature-level functions, so that the numbers are the ones others get.
Precision, recall, density and coverage are ours: torch-fidelity has neither D and C nor equal N.

Never rank on FID alone: conditional-mean blur, the typical failure of distillation, beats real data on IS and
passes precision; only recall and coverage see it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric

from eval.extractors import Extractor

LEAST_LOG_PROBABILITY = -600.0  # exp(-600) = 1e-261 stays above 0 in float64, even averaged over many rows


@dataclass(frozen=True)
class Reference:
    """Features [N,D] of the held-out images, computed once, and the hash of the extractor that made them."""

    features: Tensor
    extractor_sha256: str

    @classmethod
    def of(cls, images_u8: Tensor, extractor: Extractor) -> "Reference":
        return cls(extractor.features(images_u8)[0], extractor.sha256)


def evaluate_images(
    images_u8: Tensor,
    extractor: Extractor,
    reference: Reference,
    teacher_features: Tensor | None = None,
    train_images: Tensor | None = None,
) -> dict[str, float | None]:
    """Every score of generated images, from one feature pass.

    images_u8 is uint8 [N,C,H,W] with interleaved labels, since P/R/D/C read consecutive chunks.
    `teacher_features` [M,D] (same extractor) add `fid_teacher`; `train_images` uint8 add `memorisation`; each
    is None without. Floats have 8 significant digits: more is the noise of BLAS.
    Raises ValueError if the reference was made by another extractor.
    """
    if reference.extractor_sha256 != extractor.sha256:
        raise ValueError(f"reference features are not by {extractor.name} {extractor.sha256[:12]}")
    features, logits = extractor.features(images_u8)
    scores = {
        "fid": frechet_distance(features, reference.features),
        "fid_teacher": None if teacher_features is None else frechet_distance(features, teacher_features),
        "kid": kid(features, reference.features),
        "is": inception_score(logits),
        **precision_recall_density_coverage(features, reference.features),
        "memorisation": None if train_images is None else memorisation(images_u8, train_images),
    }
    return {name: None if value is None else float(f"{value:.8g}") for name, value in scores.items()}


def frechet_distance(gen: Tensor, ref: Tensor) -> float:
    """FID: |mu_g - mu_r|^2 + tr(S_g + S_r - 2 (S_g S_r)^(1/2)); Heusel et al. 2017, eq. 6.

    gen [N,D], ref [M,D] -> float >= 0 up to rounding (copies give about -1e-7), in squared feature units (x3
    gives x9). Float64 inside: torch-fidelity averages in the dtype it is given, and in float32 an offset
    spoils the result. Raises ValueError for other shapes, fewer than two rows, or values that are not finite.
    """
    _check(gen, ref, at_least=2)
    gaussians = (fid_features_to_statistics(features.double()) for features in (gen, ref))
    return fid_statistics_to_metric(*gaussians, verbose=False)[KEY_METRIC_FID]


def kid(gen: Tensor, ref: Tensor, subsets: int = 20, seed: int = 0) -> float:
    """KID: unbiased squared MMD under the kernel (x.y/D + 1)^3; Binkowski et al. 2018.

    gen [N,D], ref [M,D] -> float, the mean over seeded subsets of min(N, M) rows of each; with equal N and M
    every subset is everything, hence one exact estimate. Unbiased, so negative values are right: literal
    copies score below 0. No scale-free unit: assumes features of RMS 1. Raises ValueError as
    `frechet_distance` does.
    """
    _check(gen, ref, at_least=2)
    size = min(len(gen), len(ref))
    found = kid_features_to_metric(gen.double(), ref.double(), kid_subsets=subsets, kid_subset_size=size, rng_seed=seed, verbose=False)
    return found[KEY_METRIC_KID_MEAN]


def inception_score(logits: Tensor) -> float:
    """IS: exp E_x KL(p(y|x) | p(y)); Salimans et al. 2016, sec. 4.

    logits [N,C] -> float in [1, C]. One split: the usual ten bias it down where N is small. Log-probabilities
    are floored, since torch-fidelity answers NaN (0 times inf) where a class underflows to 0 in every row.
    Raises ValueError for other shapes or values that are not finite.
    """
    _check(logits, logits, at_least=1)
    log_p = logits.double().log_softmax(dim=1).clamp_min(LEAST_LOG_PROBABILITY)
    return isc_features_to_metric(log_p, splits=1, shuffle=False)[KEY_METRIC_ISC_MEAN]


def precision_recall_density_coverage(gen: Tensor, ref: Tensor, k_pr: int = 3, k_dc: int = 5) -> dict[str, float]:
    """Precision, recall (Kynkaanniemi et al. 2019, eq. 1-2), density, coverage (Naeem et al. 2020, sec. 3).

    gen [N,D], ref [M,D] -> precision, recall, coverage in [0, 1], density in [0, inf). Same distribution:
    density 1, coverage 1 - 2^-k_dc, precision and recall well below 1 (0.6 for Gaussians in 64-d).
    Literal copies: 1, 1, 1, 1.

    Recall and coverage grow with N, so N must equal M: gen is cut into consecutive chunks of M rows, each is
    compared with ref, and the mean is returned; a last incomplete chunk is left out, unless it is the only
    one. Memory: a few M x M matrices.
    Raises ValueError as `frechet_distance` does, and where there are max(k_pr, k_dc) rows or fewer.
    """
    _check(gen, ref, at_least=max(k_pr, k_dc) + 1)
    radius_pr, radius_dc = _radii(ref, k_pr), _radii(ref, k_dc)
    chunks = gen.split(len(ref))
    scores = []
    for chunk in [part for part in chunks if len(part) == len(ref)] or chunks:
        distance = _distances(chunk, ref)
        scores.append(
            [
                # Ties matter for repeated images only. Each convention is its reference implementation's:
                # <= (torch-fidelity) for P and R; < (prdc) for D and C, as <= gives copies density 1 + 1/k.
                (distance <= radius_pr).any(dim=1).double().mean(),
                (distance <= _radii(chunk, k_pr)[:, None]).any(dim=0).double().mean(),
                (distance < radius_dc).double().sum(dim=1).mean() / k_dc,
                (distance < radius_dc).any(dim=0).double().mean(),
            ]
        )
    means = torch.tensor(scores, dtype=torch.float64).mean(dim=0).tolist()
    return dict(zip(("precision", "recall", "density", "coverage"), means, strict=True))


def memorisation(gen_pixels: Tensor, train_pixels: Tensor, rows: int = 2048) -> float:
    """1 - AuthPct (Alaa et al. 2022, authenticity) in pixel space: the share of generated images at least as
    near to their nearest training image as that one is to its own nearest other training image.

    gen uint8 [N,...], train uint8 [M,...], same image shape -> float in [0, 1]. Copies give 1; unseen real
    images give far more than 0 (the fixed row `floor` says what). As near counts, as in the authors' code, so
    that a copy of a repeated image is one. Raises ValueError for other shapes or dtypes, or M < 2.
    """
    if gen_pixels.dtype != torch.uint8 or train_pixels.dtype != torch.uint8:
        raise ValueError(f"uint8 pixels expected, got {gen_pixels.dtype} and {train_pixels.dtype}")
    # Integers in float64 make squared distances, and hence ties, exact.
    gen, train = gen_pixels.flatten(1).double(), train_pixels.flatten(1).double()
    _check(gen, train, at_least=1)
    if len(train) < 2:
        raise ValueError("a single training image has no neighbour")
    pairs = [_squared_distances(part, train).topk(2, largest=False).values for part in train.split(rows)]
    own = torch.cat(pairs)[:, 1]  # the nearest of all is the image itself
    copied = 0
    for part in gen.split(rows):
        distance, nearest = _squared_distances(part, train).min(dim=1)
        copied += int((distance <= own[nearest]).sum())
    return copied / len(gen)


def _check(gen: Tensor, ref: Tensor, at_least: int) -> None:
    for features in (ref, gen):
        if features.ndim != 2 or features.shape[1] != ref.shape[1] or len(features) < at_least:
            got = f"{list(gen.shape)} and {list(ref.shape)}"
            raise ValueError(f"need two matrices of one width and {at_least} rows or more, got {got}")
        if not features.isfinite().all():
            raise ValueError("values that are not finite have no score")


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distances [len(a), len(b)] by direct differences.

    Not by |a|^2 - 2ab + |b|^2, which neither gives 0 for equal rows nor stands a shift of the features
    (precision 0.60 becomes 1.0 at offset 1e4): it would need centring. This one is exact to rounding, and
    fast enough at N = M.
    """
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def _radii(features: Tensor, k: int) -> Tensor:
    """Distance [N] of every row to its k-th nearest other row (`kthvalue` would be some 40 times slower)."""
    return _distances(features, features).topk(k + 1, largest=False).values[:, k]


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """[len(a), len(b)], for integers held in float64 only, where this cheap form is exact."""
    return a.square().sum(1)[:, None] - 2 * (a @ b.T) + b.square().sum(1)
