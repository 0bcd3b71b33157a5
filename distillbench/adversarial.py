"""Discriminators on features: heads, the losses of both players, the gradient penalty.

Logits are [B] or [B, tokens], high for real. Losses are means over a head's logits; a method sums over its heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

VIRTUAL_BATCH = 8  # rows that share statistics in `LocalBatchNorm`


def softplus_generator(fake: Tensor) -> Tensor:
    """mean softplus(-D(fake)), log 2 at D = 0: the non-saturating loss of Goodfellow et al. 2014, as in DMD2's code."""
    return F.softplus(-fake).mean()


def softplus_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """mean softplus(-D(real)) + mean softplus(D(fake)), 2 log 2 at D = 0; DMD2 (arXiv 2405.14867) Eq. 4 as its code means it."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def hinge_generator(fake: Tensor) -> Tensor:
    """-mean D(fake): ADD (arXiv 2311.17042) Eq. 2."""
    return -fake.mean()


def hinge_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """mean max(0, 1 - D(real)) + mean max(0, 1 + D(fake)), 2 at D = 0: ADD Eq. 3 without its penalty."""
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def r1(logits: Tensor, features: Tensor) -> Tensor:
    """Mean over rows of |d logits / d features|^2 (Mescheder et al. 2018, Eq. 9; ADD: with respect to a head's own input).

    features [B, ...] require a gradient and `logits` were computed from them; differentiable in the head's weights.
    """
    (gradient,) = torch.autograd.grad(logits.sum(), features, create_graph=True)
    return gradient.square().flatten(1).sum(1).mean()


class VectorHead(nn.Module):
    """Features [B, width] -> logits [B]: one hidden layer, read out by a direction common to all plus one for each class."""

    def __init__(self, width: int, hidden: int, classes: int):
        super().__init__()
        self.hidden, self.common = nn.Linear(width, hidden), nn.Linear(hidden, 1)
        self.label = nn.Embedding(classes, hidden) if classes else None

    def forward(self, features: Tensor, labels: Tensor | None) -> Tensor:
        h = F.silu(self.hidden(features))
        logits = self.common(h)[:, 0]
        if self.label is not None:
            logits = logits + (h * self.label(labels)).mean(1)
        return logits


class LocalBatchNorm(nn.Module):
    """[B, C, T] normalised per channel over T and groups of VIRTUAL_BATCH rows (all rows if these do not divide), scaled, shifted.

    Rows of one group see each other, so real and generated rows must come in calls of their own.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(torch.ones(channels)),
            nn.Parameter(torch.zeros(channels)),
        )

    def forward(self, x: Tensor) -> Tensor:
        size = VIRTUAL_BATCH if len(x) % VIRTUAL_BATCH == 0 else len(x)
        groups = x.unflatten(0, (-1, size))
        variance, mean = torch.var_mean(groups, dim=(1, 3), keepdim=True, correction=0)
        return ((groups - mean) * (variance + 1e-5).rsqrt()).flatten(0, 1) * self.weight[
            :, None
        ] + self.bias[:, None]


class TokenHead(nn.Module):
    """Tokens [B, T, width] -> logits [B, T], as the heads that ADD takes from StyleGAN-T (Sauer et al. 2023, section 3.2):
    a pointwise and a residual convolution over the tokens, spectrally normalised, projected on the class.
    """

    def __init__(self, width: int, hidden: int, kernel: int, classes: int):
        super().__init__()
        conv = lambda a, b, k: spectral_norm(
            nn.Conv1d(a, b, k, padding=k // 2, padding_mode="circular" if k > 1 else "zeros")
        )
        self.enter, self.mix = conv(width, hidden, 1), conv(hidden, hidden, kernel)
        self.norm_enter, self.norm_mix = LocalBatchNorm(hidden), LocalBatchNorm(hidden)
        self.leave = conv(hidden, hidden if classes else 1, 1)
        self.label = nn.Embedding(classes, hidden) if classes else None

    def forward(self, tokens: Tensor, labels: Tensor | None) -> Tensor:
        h = F.leaky_relu(self.norm_enter(self.enter(tokens.mT)), 0.2)
        h = (h + F.leaky_relu(self.norm_mix(self.mix(h)), 0.2)) / 2**0.5
        out = self.leave(h)
        if self.label is None:
            return out[:, 0]
        return (out * self.label(labels)[:, :, None]).sum(1) / out.shape[1] ** 0.5
