"""scikit-learn's 1797 handwritten digits of 8x8 pixels, split into two halves of like writers."""

from __future__ import annotations

import numpy as np
import torch

from distillbench.config import DigitsData
from distillbench.data.images import Images


def alternate(labels: np.ndarray) -> np.ndarray:
    """[N] bool: within every class, by index, the 1st, 3rd, ... occurrence.

    Writers alternate in the file, so both halves are alike.
    """
    first = np.zeros(len(labels), bool)
    for c in np.unique(labels):
        first[np.flatnonzero(labels == c)[::2]] = True
    return first


def load(spec: DigitsData) -> Images:
    """Digits [N, 1, 8, 8] with ten classes, in halves.

    With `inner` the training half is split once more, and the reference half is not looked at.
    """
    from sklearn.datasets import load_digits

    raw = load_digits()
    images = torch.from_numpy(raw.images / 8 - 1).float()[:, None]  # 0..16 -> [-1, 1]
    labels = torch.from_numpy(raw.target).long()
    train = alternate(raw.target)
    reference = ~train
    if spec.inner:
        half = np.flatnonzero(train)
        first = alternate(raw.target[half])
        train = half[first]
        reference = half[~first]
    return Images(images[train], labels[train], images[reference], labels[reference], 10)
