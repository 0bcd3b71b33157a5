"""A labelled set of images with its split, and the bytes that images are stored and scored as."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distillbench.seeds import Rng


@dataclass(frozen=True)
class Images:
    """`train` for teacher and students, `reference` for evaluation only.

    Images are float32 [N, C, H, W] in [-1, 1], labels int64 [N] in 0..classes-1.
    """

    train: Tensor
    train_labels: Tensor
    reference: Tensor
    reference_labels: Tensor
    classes: int

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W)."""
        return tuple(self.train.shape[1:])

    def draw(self, rng: Rng, n: int) -> tuple[Tensor, Tensor]:
        """n training images [n, C, H, W] and their labels [n], with replacement, on the CPU."""
        index = rng.integers(n, len(self.train)).cpu()
        return self.train[index], self.train_labels[index]


def to_bytes(x: Tensor) -> Tensor:
    """Images [N, C, H, W] float32 in [-1, 1] -> uint8 in 0..255, rounded and clipped."""
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
