"""Discriminators on features: heads, the losses of both players, the gradient penalty.

Logits are [B] or [B, tokens] float32, high for real. Losses are scalars, means over a head's
logits; a method sums over its heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

VIRTUAL_BATCH = 8  # rows that share statistics in `LocalBatchNorm`


def softplus_generator(fake: Tensor) -> Tensor:
    """mean softplus(-D(fake)), a scalar, log 2 at D = 0; `fake`: logits [B] or [B, tokens].

    The non-saturating loss of Goodfellow et al. 2014, as in DMD2's code.
    """
    return F.softplus(-fake).mean()


def softplus_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """mean softplus(-D(real)) + mean softplus(D(fake)), a scalar, 2 log 2 at D = 0.

    real, fake: logits [B] or [B, tokens]. DMD2 (arXiv 2405.14867), Eq. 4 as its code means it.
    """
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def hinge_generator(fake: Tensor) -> Tensor:
    """-mean D(fake), a scalar; `fake`: logits [B] or [B, tokens]. ADD (arXiv 2311.17042), Eq. 2."""
    return -fake.mean()


def hinge_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """mean max(0, 1 - D(real)) + mean max(0, 1 + D(fake)), a scalar, 2 at D = 0.

    real, fake: logits [B] or [B, tokens]. ADD (arXiv 2311.17042), Eq. 3 without its penalty.
    """
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def r1(logits: Tensor, features: Tensor) -> Tensor:
    """Mean over rows of |d logits / d features|^2, a scalar, differentiable in the head's weights.

    features [B, ...] require a gradient and `logits` [B] or [B, tokens] were computed from them
    (RuntimeError otherwise). Mescheder et al. 2018, Eq. 9; ADD (arXiv 2311.17042): with respect to
    a head's own input.
    """
    (gradient,) = torch.autograd.grad(logits.sum(), features, create_graph=True)
    return gradient.square().flatten(1).sum(1).mean()


class VectorHead(nn.Module):
    """Features [B, width] -> logits [B]: one hidden layer and a direction to read it out.

    The direction is one common to all plus, where there are classes, one for each class; labels:
    [B] int64 in [0, classes).
    """

    def __init__(self, width: int, hidden: int, classes: int):
        super().__init__()
        self.hidden = nn.Linear(width, hidden)
        self.common = nn.Linear(hidden, 1)
        self.label = nn.Embedding(classes, hidden) if classes else None

    def forward(self, features: Tensor, labels: Tensor | None) -> Tensor:
        h = F.silu(self.hidden(features))
        logits = self.common(h)[:, 0]
        if self.label is not None:
            logits = logits + (h * self.label(labels)).mean(1)
        return logits


class LocalBatchNorm(nn.Module):
    """[B, C, T] normalised per channel over T and groups of VIRTUAL_BATCH rows, scaled, shifted.

    All rows are one group if VIRTUAL_BATCH does not divide their number. Rows of one group see each
    other, so real and generated rows must come in calls of their own.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        size = VIRTUAL_BATCH if len(x) % VIRTUAL_BATCH == 0 else len(x)
        groups = x.unflatten(0, (-1, size))
        variance, mean = torch.var_mean(groups, dim=(1, 3), keepdim=True, correction=0)
        normal = ((groups - mean) * (variance + 1e-5).rsqrt()).flatten(0, 1)
        return normal * self.weight[:, None] + self.bias[:, None]


def _convolution(channels: int, out: int, kernel: int) -> nn.Module:
    """A spectrally normalised convolution [B, channels, T] -> [B, out, T], circular over tokens."""
    layer = nn.Conv1d(
        channels,
        out,
        kernel,
        padding=kernel // 2,
        padding_mode="circular" if kernel > 1 else "zeros",
    )
    return spectral_norm(layer)


class TokenHead(nn.Module):
    """Tokens [B, T, width] -> logits [B, T], as the heads that ADD takes from StyleGAN-T.

    A pointwise and a residual convolution over the tokens, spectrally normalised, projected on the
    class where there are classes (Sauer et al. 2023, section 3.2); labels: [B] int64 in
    [0, classes).
    """

    def __init__(self, width: int, hidden: int, kernel: int, classes: int):
        super().__init__()
        self.enter = _convolution(width, hidden, 1)
        self.mix = _convolution(hidden, hidden, kernel)
        self.norm_enter = LocalBatchNorm(hidden)
        self.norm_mix = LocalBatchNorm(hidden)
        self.leave = _convolution(hidden, hidden if classes else 1, 1)
        self.label = nn.Embedding(classes, hidden) if classes else None

    def forward(self, tokens: Tensor, labels: Tensor | None) -> Tensor:
        h = F.leaky_relu(self.norm_enter(self.enter(tokens.mT)), 0.2)
        mixed = F.leaky_relu(self.norm_mix(self.mix(h)), 0.2)
        h = (h + mixed) / 2**0.5
        out = self.leave(h)
        if self.label is None:
            return out[:, 0]
        return (out * self.label(labels)[:, :, None]).sum(1) / out.shape[1] ** 0.5
