"""Trivial generators: what they score tells how to read a method's number, and which score catches which failure.

All of them know the training half only. FID alone likes several (on 8x8 digits they close most of the gap
between class means and reality), which is why GENERATORS stand next to every method; docs/protocol.md has all of them.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

Generator = Callable[[Tensor, Tensor, int, np.random.Generator], Tensor]

ROUNDING_VARIANCE = (
    1 / 12
)  # of a grey level cut to an integer: enough to make every covariance regular


def class_means(
    train_images: Tensor, train_labels: Tensor, n: int, rng: np.random.Generator
) -> Tensor:
    """The class's mean image: exactly what one Euler step of an unguided class-conditional teacher gives."""
    return _per_class(
        train_images, train_labels, n, lambda x, m: np.broadcast_to(x.mean(0), (m, x.shape[1]))
    )


def class_gaussian(
    train_images: Tensor, train_labels: Tensor, n: int, rng: np.random.Generator
) -> Tensor:
    """A draw from the Gaussian with the class's mean and full pixel covariance, cut to 0..255."""

    def draw(x: np.ndarray, m: int) -> np.ndarray:
        covariance = np.cov(x, rowvar=False) + ROUNDING_VARIANCE * np.eye(x.shape[1])
        return x.mean(0) + rng.standard_normal((m, x.shape[1])) @ np.linalg.cholesky(covariance).T

    return _per_class(train_images, train_labels, n, draw)


def mixup(train_images: Tensor, train_labels: Tensor, n: int, rng: np.random.Generator) -> Tensor:
    """A convex combination, its weight uniform in [0, 1], of two draws from the class."""

    def draw(x: np.ndarray, m: int) -> np.ndarray:
        weight = rng.random((m, 1))
        return (
            weight * x[rng.integers(len(x), size=m)]
            + (1 - weight) * x[rng.integers(len(x), size=m)]
        )

    return _per_class(train_images, train_labels, n, draw)


def memoriser(
    train_images: Tensor, train_labels: Tensor, n: int, rng: np.random.Generator
) -> Tensor:
    """Training images of the class, drawn with replacement."""
    return _per_class(train_images, train_labels, n, lambda x, m: x[rng.integers(len(x), size=m)])


def one_class_missing(
    train_images: Tensor, train_labels: Tensor, n: int, rng: np.random.Generator
) -> Tensor:
    """The memoriser without the last class: who asks for it gets images of the others."""
    pixels = memoriser(train_images, train_labels, n, rng)
    kept = train_images[train_labels != train_labels.max()]
    asked = torch.arange(n) % (int(train_labels.max()) + 1) == train_labels.max()
    pixels[asked] = kept[torch.from_numpy(rng.integers(len(kept), size=int(asked.sum())))]
    return pixels


def one_image_repeated(
    train_images: Tensor, train_labels: Tensor, n: int, rng: np.random.Generator
) -> Tensor:
    """Total collapse: one training image, whatever is asked for."""
    return train_images[int(rng.integers(len(train_images)))].repeat(n, 1, 1, 1)


def noise(train_images: Tensor, train_labels: Tensor, n: int, rng: np.random.Generator) -> Tensor:
    """Pixels of N(127.5, 64^2), cut to 0..255: what an untrained student gives."""
    return _bytes(rng.normal(127.5, 64, (n, train_images[0].numel())), train_images)


GENERATORS: tuple[Generator, ...] = (
    class_means,
    class_gaussian,
    mixup,
    memoriser,
)  # rows of every table
FAILURES: tuple[Generator, ...] = (
    one_class_missing,
    one_image_repeated,
    noise,
)  # no method should come near them


def _per_class(
    train_images: Tensor,
    train_labels: Tensor,
    n: int,
    draw: Callable[[np.ndarray, int], np.ndarray],
) -> Tensor:
    """uint8 [n,C,H,W], image i of class i % classes; draw(x, m) makes m images from x, those of one class.

    Everything flat and float64 inside. Balanced, as the students' samples are: imbalance costs half a floor.
    """
    pixels, labels = train_images.flatten(1).double().numpy(), train_labels.numpy()
    classes = labels.max() + 1
    out = np.empty((n, pixels.shape[1]))
    for c in range(classes):
        rows = np.arange(c, n, classes)
        out[rows] = draw(pixels[labels == c], len(rows))
    return _bytes(out, train_images)


def _bytes(flat: np.ndarray, like: Tensor) -> Tensor:
    """float64 [n,C*H*W], rounded and cut -> uint8 [n,C,H,W]."""
    grey = np.clip(np.round(flat), 0, 255).astype(np.uint8)
    return torch.from_numpy(grey).view(len(flat), *like.shape[1:])
