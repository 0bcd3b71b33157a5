"""Memorisation: how many generated images are copies of training images, in pixel space."""

import torch
from torch import Tensor

ROWS = 2048  # at once: bounds memory


def memorisation(gen_pixels: Tensor, train_pixels: Tensor, rows: int = ROWS) -> float:
    """1 - AuthPct (Alaa et al. 2022, authenticity) in pixel space.

    The share of generated images at least as near to their nearest training image as that one is
    to its own nearest other training image.

    gen uint8 [N,...], train uint8 [M,...], same image shape -> float in [0, 1]. Copies give 1;
    unseen real images give far more than 0 (the fixed row `floor` says what). As near counts, as
    in the authors' code, so that a copy of a repeated image is one. `rows` bounds memory and
    changes no score. Raises ValueError for other shapes or dtypes, N < 1 or M < 2.
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
    own = []
    for part in train_pixels.split(rows):
        distances, _ = _nearest(part, train_pixels, rows)
        own.append(distances[:, 1])  # the first is the image itself
    own_distances = torch.cat(own)
    copied = 0
    for part in gen_pixels.split(rows):
        distances, nearest = _nearest(part, train_pixels, rows)
        copied += int((distances[:, 0] <= own_distances[nearest]).sum())
    return copied / len(gen_pixels)


def _nearest(images_u8: Tensor, others_u8: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Squared distances float64 [N,2] to the two nearest others, and the index [N] of the nearest.

    `rows` others at a time; of equals, the first. Integers: squared distances, and hence ties, are
    exact in this cheap form.
    """
    a = images_u8.flatten(1).double()
    best = a.new_full((len(a), 2), torch.inf)
    nearest = torch.zeros(len(a), dtype=torch.long)
    for start in range(0, len(others_u8), rows):
        b = others_u8[start : start + rows].flatten(1).double()
        squared = a.square().sum(1)[:, None] - 2 * (a @ b.T) + b.square().sum(1)
        least, place = squared.min(1)
        nearest = torch.where(least < best[:, 0], place + start, nearest)
        two = squared.topk(min(2, len(b)), largest=False).values
        best = torch.cat([best, two], dim=1).topk(2, largest=False).values
    return best, nearest
