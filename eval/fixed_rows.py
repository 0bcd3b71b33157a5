"""Rows that every table carries: what trivial generators score, so that a method's number can be read.

All of them know the training half only. FID alone likes several (on 8x8 digits they close most of the gap
between class means and reality), which is why they stand next to every method.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from eval.extractors import Extractor
from eval.metrics import Reference, evaluate_images, memorisation

Generator = Callable[[Tensor, Tensor, int, np.random.Generator], Tensor]

ROUNDING_VARIANCE = 1 / 12  # of a grey level cut to an integer: enough to make every covariance regular


def class_means(train_images: Tensor, train_labels: Tensor, n: int, rng: np.random.Generator) -> Tensor:
    """The class's mean image: exactly what one Euler step of an unguided class-conditional teacher gives."""
    return _per_class(train_images, train_labels, n, lambda x, m: np.broadcast_to(x.mean(0), (m, x.shape[1])))


def class_gaussian(train_images: Tensor, train_labels: Tensor, n: int, rng: np.random.Generator) -> Tensor:
    """A draw from the Gaussian with the class's mean and full pixel covariance, cut to 0..255."""

    def draw(x: np.ndarray, m: int) -> np.ndarray:
        covariance = np.cov(x, rowvar=False) + ROUNDING_VARIANCE * np.eye(x.shape[1])
        return x.mean(0) + rng.standard_normal((m, x.shape[1])) @ np.linalg.cholesky(covariance).T

    return _per_class(train_images, train_labels, n, draw)


def mixup(train_images: Tensor, train_labels: Tensor, n: int, rng: np.random.Generator) -> Tensor:
    """A convex combination, its weight uniform in [0, 1], of two draws from the class."""

    def draw(x: np.ndarray, m: int) -> np.ndarray:
        weight = rng.random((m, 1))
        return weight * x[rng.integers(len(x), size=m)] + (1 - weight) * x[rng.integers(len(x), size=m)]

    return _per_class(train_images, train_labels, n, draw)


def memoriser(train_images: Tensor, train_labels: Tensor, n: int, rng: np.random.Generator) -> Tensor:
    """Training images of the class, drawn with replacement."""
    return _per_class(train_images, train_labels, n, lambda x, m: x[rng.integers(len(x), size=m)])


GENERATORS: tuple[Generator, ...] = (class_means, class_gaussian, mixup, memoriser)


def fixed_rows(
    train_images: Tensor, train_labels: Tensor, ref_images: Tensor, extractor: Extractor, n: int, seed: int
) -> list[dict[str, str | float | None]]:
    """One row {"name": ..., **scores} for the floor and for each trivial generator with n images.

    Images uint8 [N,C,H,W], labels int64 [N] in 0..classes-1. The same seed gives the same rows.
    """
    reference = Reference.of(ref_images, extractor)
    floor = {"name": "floor", **evaluate_images(train_images, extractor, reference)}
    # The training half copies itself, trivially. What a reader needs here is what real unseen images score.
    floor["memorisation"] = float(f"{memorisation(ref_images, train_images):.8g}")
    rows = [floor]
    for index, generate in enumerate(GENERATORS):
        images = generate(train_images, train_labels, n, np.random.default_rng([seed, index]))
        scores = evaluate_images(images, extractor, reference, train_images=train_images)
        rows.append({"name": generate.__name__, **scores})
    return rows


def _per_class(train_images: Tensor, train_labels: Tensor, n: int, draw: Callable[[np.ndarray, int], np.ndarray]) -> Tensor:
    """uint8 [n,C,H,W], image i of class i % classes; draw(x, m) makes m images from x, those of one class.

    Everything flat and float64 inside. Balanced, as the students' samples are: imbalance costs half a floor.
    """
    pixels, labels = train_images.flatten(1).double().numpy(), train_labels.numpy()
    classes = labels.max() + 1
    out = np.empty((n, pixels.shape[1]))
    for c in range(classes):
        rows = np.arange(c, n, classes)
        out[rows] = draw(pixels[labels == c], len(rows))
    grey = np.clip(np.round(out), 0, 255).astype(np.uint8)
    return torch.from_numpy(grey).view(n, *train_images.shape[1:])
