"""Features of the held-out images, and what scores need of one set of features alone.

Generated first, reference second, everywhere. Features are float32 or float64 [N,D], scaled to
RMS 1 by the extractors of the digits, and as published by those of image scale.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from eval.features.extractors import Extractor
from eval.metrics.pairwise import Cloud, Within, within

LARGEST = 1e15  # of features: squares of larger ones leave float32


@dataclass(frozen=True)
class Gaussian:
    """Mean [D] and covariance [D,D], both float64, of features: all that FID sees of them."""

    mean: Tensor
    covariance: Tensor

    @classmethod
    def of(cls, cloud: Cloud) -> Gaussian:
        """The Gaussian with the mean and the unbiased covariance of a cloud."""
        return cls(cloud.mean, cloud.covariance())

    @cached_property
    def root(self) -> Tensor:
        """h [D,D] float64 with h h^T = covariance, by its eigenvectors.

        Singular covariances (N <= D, dead features) have one as well.
        """
        values, vectors = torch.linalg.eigh(self.covariance)
        return vectors.mul_(values.clamp_min_(0).sqrt_())


class Statistics:
    """Statistics of one set of features [N,D], each computed once and on demand."""

    def __init__(self, features: Tensor) -> None:
        self.cloud = Cloud(features)
        self.digest = _digest(features)

    @cached_property
    def gaussian(self) -> Gaussian:
        """Mean and covariance, for FID."""
        return Gaussian.of(self.cloud)

    @cached_property
    def within(self) -> Within:
        """Kernel sum and radii of all N rows as one piece, for KID and scores of neighbours."""
        return within(self.cloud, len(self.cloud))


@dataclass(frozen=True)
class Reference:
    """Features [M,D] of the held-out images, and the hash of the extractor that made them."""

    features: Tensor
    extractor_sha256: str

    @classmethod
    def of(cls, images_u8: Tensor, extractor: Extractor) -> Reference:
        """Features of images uint8 [M,C,H,W] under an extractor; ValueError as it raises."""
        features, _ = extractor.features(images_u8)
        return cls(features, extractor.sha256)

    def statistics(self) -> Statistics:
        """Statistics of the features, computed once.

        Raises ValueError if the features were changed in place after the first call: what is kept
        is of the old ones.
        """
        if self._statistics.digest != _digest(self.features):
            raise ValueError(
                "the features of a Reference have changed since its statistics were computed: "
                "make another one"
            )
        return self._statistics

    @cached_property
    def _statistics(self) -> Statistics:
        return Statistics(self.features)


def check_features(gen: Tensor, ref: Tensor, at_least: int) -> None:
    """ValueError unless gen [N,D] and ref [M,D] are features that can be scored.

    That is float32 or float64, of one width D > 0, of `at_least` rows or more, finite and below
    1e15 in size.
    """
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


def _digest(features: Tensor) -> str:
    """SHA-256 of the bytes of features."""
    content = features.contiguous().view(torch.uint8).numpy().data
    return hashlib.sha256(content).hexdigest()
