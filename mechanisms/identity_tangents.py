"""What MeanFlow's target is worth with a wrong tangent (arXiv 2505.13447, Table 1b), on a mixture.

There all of it is known. The identity u = v - (t-s) du/dt (Eq. 6) has the total derivative, along
(dx, dt, ds) = (v, 1, 0) (Eq. 8). Table 1b trains with three others, in the paper's order of
arguments (z, r, t) with r our s. At the exact average velocity, pairs by the paper's LN(-0.4, 1):
the root mean square of u - (v - (t-s) du) with du along each of them, in root mean squares of u.

    right    (v, 1, 0)    zero but for the solver's error
    both     (v, 1, 1)    off by (t-s) du/ds = u - v(X, s), nothing where paths are straight
    no_time  (v, 0, 0)    off by (t-s) du/dt at fixed x
    swapped  (v, 0, 1)    off by both
"""

from __future__ import annotations

import torch
from torch import Tensor

from distillbench import config, times
from distillbench.data import kinds
from distillbench.data.mixture import Mixture
from distillbench.paths import average_velocity, noised, over
from distillbench.samplers import heun_slope
from distillbench.seeds import Rng
from distillbench.teachers.exact import MixtureVelocity

BENCHMARK = "gaussians-ring"
METHODS = ("meanflow",)
ROWS = 1024
STEPS = 64
# Of t and s.
TANGENTS = {
    "right": (1.0, 0.0),
    "both": (1.0, 1.0),
    "no_time": (0.0, 0.0),
    "swapped": (0.0, 1.0),
}


def measure(seed: int) -> dict[str, float]:
    """The residual of the identity with each tangent."""
    rng = Rng(seed, "identity")
    mixture = kinds.load(config.benchmark(BENCHMARK).data)
    assert isinstance(mixture, Mixture)
    velocity = MixtureVelocity(mixture).double()
    x, _ = mixture.draw(rng, ROWS)
    t, s = times.sorted_pair(rng, ROWS, -0.4, 1.0, diagonal=0)
    t = t.double()
    s = s.double()
    x_t = noised(x.double(), rng.normal(*x.shape).double(), t)

    def average(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """u = (x_t - x_s) / (t-s) of the exact flow, by Heun's method."""
        end = x
        width = (t - s) / STEPS
        for i in range(STEPS):
            a = t - i * width
            end = end - over(width, x) * heun_slope(velocity, end, a, a - width)
        return average_velocity(x, end, t, s)

    v = velocity(x_t, t)
    one = torch.ones_like(t)
    residuals = {}
    for name, (dt, ds) in TANGENTS.items():
        u, du = torch.func.jvp(average, (x_t, t, s), (v, dt * one, ds * one))[:2]
        error = u - v + over(t - s, u) * du
        residuals[name] = (error.square().mean() / u.square().mean()).sqrt().item()
    return residuals
