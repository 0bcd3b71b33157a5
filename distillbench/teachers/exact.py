"""The exact velocity of a Gaussian mixture: the teacher of benchmarks whose truth is known."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distillbench.data.mixture import Mixture


class MixtureVelocity(nn.Module):
    """v(x, t) = E[e - x0 | x_t = x] of an isotropic Gaussian mixture, of one class or of all.

    Under component k, x_t ~ N((1-t) mu_k, S^2) with S^2 = (1-t)^2 sigma^2 + t^2, and e and x0 are
    jointly Gaussian with x_t, so that with d = x_t - (1-t) mu_k

        E[e | x_t, k] = t d / S^2,    E[x0 | x_t, k] = mu_k + (1-t) sigma^2 d / S^2.

    Nothing is divided by t: t=0 and t=1 are ordinary points.
    """

    means: Tensor
    log_weights: Tensor
    component_class: Tensor

    def __init__(self, mixture: Mixture):
        super().__init__()
        self.sigma = mixture.sigma
        self.classes = mixture.classes
        self.register_buffer("means", mixture.means.flatten(1))
        self.register_buffer("log_weights", mixture.weights.log())
        self.register_buffer("component_class", mixture.component_class)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """v like x [B, *shape] at t [B] in [0, 1]; labels: [B], `classes` meaning all of them."""
        t = t[:, None]
        d = x.flatten(1)[:, None] - (1 - t)[..., None] * self.means  # [B, K, D]
        variance = (1 - t) ** 2 * self.sigma**2 + t**2  # [B, 1]
        log_r = self.log_weights - d.square().sum(-1) / (2 * variance)
        if labels is not None:
            other = (self.component_class != labels[:, None]) & (labels[:, None] != self.classes)
            log_r = log_r.masked_fill(other, -torch.inf)
        r = log_r.softmax(1)
        mean_d = (r[..., None] * d).sum(1)
        slope = (t - (1 - t) * self.sigma**2) / variance
        return (slope * mean_d - r @ self.means).reshape(x.shape)
