"""Trivial generators: what they score tells how to read a method's number.

And which score catches which failure. All of them know the training half only. FID alone likes
several (on 8x8 digits they close most of the gap between class means and reality), which is why
GENERATORS stand next to every method; docs/protocol.md has all of them.

A generator takes train_images uint8 [T,C,H,W], train_labels int64 [T] in 0..K-1, n and a numpy
generator of random numbers, and returns uint8 [n,C,H,W], image i for class i % K.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

Generator = Callable[[Tensor, Tensor, int, np.random.Generator], Tensor]

# Of a grey level cut to an integer: enough to make every covariance regular.
ROUNDING_VARIANCE = 1 / 12


def class_means(
    train_images: Tensor, train_labels: Tensor, n: int, rng: np.random.Generator
) -> Tensor:
    """The class's mean image.

    Exactly what one Euler step of an unguided class-conditional teacher gives.
    """

    def draw(x: np.ndarray, m: int) -> np.ndarray:
        return np.broadcast_to(x.mean(0), (m, x.shape[1]))

    return _per_class(train_images, train_labels, n, draw)


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
        first = x[rng.integers(len(x), size=m)]
        second = x[rng.integers(len(x), size=m)]
        return weight * first + (1 - weight) * second

    return _per_class(train_images, train_labels, n, draw)


def memoriser(
    train_images: Tensor, train_labels: Tensor, n: int, rng: np.random.Generator
) -> Tensor:
    """Training images of the class, drawn with replacement."""

    def draw(x: np.ndarray, m: int) -> np.ndarray:
        return x[rng.integers(len(x), size=m)]

    return _per_class(train_images, train_labels, n, draw)


def one_class_missing(
    train_images: Tensor, train_labels: Tensor, n: int, rng: np.random.Generator
) -> Tensor:
    """The memoriser without the last class: who asks for it gets images of the others."""
    missing = train_labels.max()
    pixels = memoriser(train_images, train_labels, n, rng)
    kept = train_images[train_labels != missing]
    asked = torch.arange(n) % (int(missing) + 1) == missing
    replacements = rng.integers(len(kept), size=int(asked.sum()))
    pixels[asked] = kept[torch.from_numpy(replacements)]
    return pixels


def one_image_repeated(
    train_images: Tensor, train_labels: Tensor, n: int, rng: np.random.Generator
) -> Tensor:
    """Total collapse: one training image, whatever is asked for."""
    return train_images[int(rng.integers(len(train_images)))].repeat(n, 1, 1, 1)


def noise(train_images: Tensor, train_labels: Tensor, n: int, rng: np.random.Generator) -> Tensor:
    """Pixels of N(127.5, 64^2), cut to 0..255: what an untrained student gives."""
    return _bytes(rng.normal(127.5, 64, (n, train_images[0].numel())), train_images)


# Rows of every table.
GENERATORS: tuple[Generator, ...] = (class_means, class_gaussian, mixup, memoriser)
# No method should come near them.
FAILURES: tuple[Generator, ...] = (one_class_missing, one_image_repeated, noise)


def _per_class(
    train_images: Tensor,
    train_labels: Tensor,
    n: int,
    draw: Callable[[np.ndarray, int], np.ndarray],
) -> Tensor:
    """uint8 [n,C,H,W], image i of class i % classes.

    draw(x, m) makes m images float64 [m,C*H*W] from those of one class, x float64 [T,C*H*W].
    Balanced, as the students' samples are: imbalance costs half a floor.
    """
    pixels = train_images.flatten(1).double().numpy()
    labels = train_labels.numpy()
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
