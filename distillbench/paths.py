"""The straight path x_t = (1-t) x + t e and what follows from it.

Every formula here is an identity (docs/convention.md). Shapes: `x`, `e`, `x_t`, `v`, `u` are
[B, ...] of one shape, `t` and `s` are [B] in [0, 1] with t=0 data and t=1 noise. All functions are
differentiable, keep the dtype and raise nothing.
"""

from __future__ import annotations

from torch import Tensor


def over(t: Tensor, x: Tensor) -> Tensor:
    """[B] -> [B, 1, ..., 1], so that `t` multiplies `x` of shape [B, ...] row by row."""
    return t.reshape(t.shape[0], *([1] * (x.dim() - 1)))


def noised(x: Tensor, e: Tensor, t: Tensor) -> Tensor:
    """x_t = (1-t) x + t e, [B, ...]."""
    t = over(t, x)
    return (1 - t) * x + t * e


def denoiser(x_t: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """x0 = x_t - t v [B, ...]: the posterior mean of the data when v is the marginal velocity."""
    return x_t - over(t, x_t) * v


def noise(x_t: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """e_hat = x_t + (1-t) v [B, ...]: the posterior mean of the noise."""
    return x_t + (1 - over(t, x_t)) * v


def score(x_t: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """s = -e_hat / t = -(x_t - (1-t) x0) / t^2 [B, ...]: the gradient of log p_t, for t > 0."""
    return -noise(x_t, v, t) / over(t, x_t)


def velocity_of_denoiser(x_t: Tensor, x0: Tensor, t: Tensor) -> Tensor:
    """v = (x_t - x0) / t [B, ...]: inverse of `denoiser`, for t > 0."""
    return (x_t - x0) / over(t, x_t)


def velocity_of_noise(x_t: Tensor, e_hat: Tensor, t: Tensor) -> Tensor:
    """v = (e_hat - x_t) / (1-t) [B, ...]: inverse of `noise`, for t < 1."""
    return (e_hat - x_t) / (1 - over(t, x_t))


def velocity_of_score(x_t: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """v = -(x_t + t s) / (1-t) [B, ...]: inverse of `score`, for t < 1."""
    return velocity_of_noise(x_t, -over(t, x_t) * s, t)


def jump(x_t: Tensor, u: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Flow map X(x_t, t, s) = x_t - (t-s) u [B, ...] with average velocity u over [s, t]."""
    return x_t - over(t - s, x_t) * u


def average_velocity(x_t: Tensor, x_s: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """u = (x_t - x_s) / (t-s) [B, ...]: inverse of `jump`, for t != s."""
    return (x_t - x_s) / over(t - s, x_t)


def guided(v_null: Tensor, v_cond: Tensor, w: float | Tensor) -> Tensor:
    """v_null + w (v_cond - v_null), [B, ...]; w: a number, or weights [B, 1, ..., 1].

    The same w guides x0, noise and score, which are affine in v.
    """
    return v_null + w * (v_cond - v_null)


def to_flow(x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """(x_t, t) of any process's state x = alpha x0 + sigma e, with t = sigma / (alpha + sigma).

    x, x_t: [B, ...]; alpha, sigma, t: [B], alpha + sigma > 0.
    """
    total = alpha + sigma
    return x / over(total, x), sigma / total


def from_flow(x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """EDM's state x0 + sigma e [B, ...] and sigma = t / (1-t) [B] of (x_t, t), for t < 1."""
    return x_t / over(1 - t, x_t), t / (1 - t)
