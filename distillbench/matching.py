"""Distribution-matching gradients of a sample x, in velocities, and the loss of a critic.

x_t = (1-t) x + t e; v_real and v_fake are the teacher's and the critic's velocity at x_t, shape
[B, ...]. Descent along the returned gradient moves x towards the teacher's denoised sample and away
from the critic's.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from distillbench.paths import over

# Of both normalisers: a sample that the teacher reconstructs exactly has a finite gradient.
FLOOR = 1e-6


def mean_abs(v: Tensor) -> Tensor:
    """Mean |v| over all elements of a sample, [B, 1, ...] for v [B, ...], >= FLOOR."""
    elements = tuple(range(1, v.dim()))
    return v.abs().mean(dim=elements, keepdim=True).clamp_min(FLOOR)


def residual(v_real: Tensor, x: Tensor, e: Tensor) -> Tensor:
    """Mean |v_real - (e - x)| over all elements of a sample, [B, 1, ...], >= FLOOR.

    Equal to mean |x - x0_real| / t: the normaliser of DMD (arXiv 2311.18828) over t. v_real, x, e:
    [B, ...].
    """
    return mean_abs(v_real - (e - x))


# Factor of (v_real - v_fake) in dL/dx, as a function of t [B, 1, ...], v_real, x and e [B, ...];
# above each the general form it equals for x_t = alpha x + sigma e.
WEIGHTINGS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    # alpha (s_fake - s_real): the exact gradient of KL(q_t || p_t)
    "reverse_kl": lambda t, v_real, x, e: (1 - t) ** 2 / t,
    # eps_real - eps_fake: "sigma/alpha" in DMD Table 2
    "sigma_alpha": lambda t, v_real, x, e: 1 - t,
    # sigma^2 (eps_real - eps_fake): "sigma^3/alpha" in DMD Table 2
    "sigma3_alpha": lambda t, v_real, x, e: t**2 * (1 - t),
    # (x0_fake - x0_real) / mean |x - x0_real|: DMD Algorithm 2; the two factors t cancel, so
    # nothing is 0/0 at small t
    "residual": lambda t, v_real, x, e: 1 / residual(v_real, x, e),
    # the same times alpha: DMD Eq. 7 with Eq. 8 taken literally
    "alpha_residual": lambda t, v_real, x, e: (1 - t) / residual(v_real, x, e),
    # (x0_fake - x0_real) / mean |x_t - x0_real|, with the noisy x_t where DMD has the clean x; as
    # x_t - x0_real = t v_real, the factors t cancel here too: DP-DMD (arXiv 2602.03139,
    # train_sd35_dpdmd.py:145-150 of its code)
    "noisy_residual": lambda t, v_real, x, e: 1 / mean_abs(v_real),
    # unit weight on the velocity difference
    "velocity": lambda t, v_real, x, e: 1 + 0 * t,
}


def matching_gradient(
    v_real: Tensor, v_fake: Tensor, x: Tensor, e: Tensor, t: Tensor, weighting: str
) -> Tensor:
    """g = weight (v_real - v_fake), [B, ...], detached.

    v_real, v_fake, x, e: [B, ...]; t: [B] in (0, 1); `weighting`: a key of WEIGHTINGS (KeyError
    otherwise). DMD (arXiv 2311.18828), Eq. 7-8 and Algorithm 2.
    """
    weight = WEIGHTINGS[weighting](over(t, x), v_real, x, e)
    return (weight * (v_real - v_fake)).detach()


def pseudo_loss(x: Tensor, g: Tensor) -> Tensor:
    """0.5 mean (x - sg(x - g))^2: a scalar whose gradient in x [B, D] is g / (B D).

    g: [B, D]. DMD (arXiv 2311.18828), Algorithm 2.
    """
    return 0.5 * (x - (x - g).detach()).square().mean()


def critic_loss(v_fake: Tensor, x: Tensor, e: Tensor) -> Tensor:
    """Flow matching of a critic to the student's samples: mean |v_fake - (e - sg x)|^2, a scalar.

    The mean is over all elements of [B, ...]. v_fake: the critic at (1-t) x + t e; e: the noise in
    it. L_denoise of DMD (arXiv 2311.18828, Eq. 6) with unit weight on velocities.
    """
    return (v_fake - (e - x.detach())).square().mean()
