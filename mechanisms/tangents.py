"""Along which velocity should MeanFlow differentiate?

Asked on a mixture, whose marginal velocity v is known. MeanFlow's target is (e - x) - (t-s) du/dt
with du/dt along (dx, dt, ds) = (a, 1, 0) and a = e - x, the sample's velocity (arXiv 2505.13447).
iMF (arXiv 2512.02012, Eqs. 8-12, Figure 3) objects that a network cannot know e - x, and takes its
own u(x_t, t, t). With n = e - x - v, the target without noise, v - (t-s) du/dt along v, is missed
by (I - (t-s) d_x u) n with the sample's velocity, by n with the marginal v, by n and a bias,
(t-s) d_x u (v - u(x_t, t, t)), with the network's. Halfway through a run of UPDATES updates from
scratch, of each:

    {sample,network,marginal}_target    mean square of the miss over rows with s < t
    {sample,network,marginal}_median    its median: a few rows between modes dominate the mean
    {sample,network,marginal}_gradient  mean square of a batch's error of the gradient of
                                        |u - target|^2, in squared lengths of it
    network_bias                        mean square of the network's bias
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distillbench import times
from distillbench.audits.mechanism import ready
from distillbench.cells.steps import one_step
from distillbench.data.mixture import Mixture
from distillbench.method import Condition
from distillbench.paths import noised, over
from distillbench.players import Player
from distillbench.seeds import Rng
from distillbench.teachers.exact import MixtureVelocity

BENCHMARK = "gaussians-ring"
METHODS = ("meanflow",)
ARM = "meanflow@scratch"
UPDATES = 600
BATCHES = 32
ROWS = 256
CHOICES = ("sample", "network", "marginal")


def measure(seed: int) -> dict[str, float]:
    """The miss of every choice of velocity, its median, its gradient's error, and the bias."""
    run, _ = ready(BENCHMARK, ARM, seed)
    player = run.task.players["student"]
    player.total_updates = UPDATES
    for i in range(UPDATES // 2):
        one_step(run, i, UPDATES)
    method: Any = run.method
    assert isinstance(run.data, Mixture)
    c = method.config
    rng = Rng(seed, "tangents")
    net = player.networks[0]
    exact = MixtureVelocity(run.data)
    missed: dict[str, list[Tensor]] = {name: [] for name in (*CHOICES, "bias")}
    wrong = dict.fromkeys(CHOICES, 0.0)
    length = 0.0

    for _ in range(BATCHES):
        x, _ = run.data.draw(rng, ROWS)
        t, s = times.sorted_pair(rng, ROWS, c.time_mean, c.time_std, diagonal=0)
        e = rng.normal(*x.shape)
        x_t = noised(x, e, t)
        v = exact(x_t, t)
        gap = over(t - s, x)
        along = {"sample": e - x, "network": net(x_t, t, s=t).detach(), "marginal": v}
        du = {}
        for name, velocity in along.items():
            tangents = (velocity, torch.ones_like(t), torch.zeros_like(s))
            _, du[name] = run.task.jvp(net, (x_t, t, s), tangents, Condition(None))
        u = net(x_t, t, s=s)
        clean = v - gap * du["marginal"]

        g = gradient(player, u, clean)
        length += g.square().sum().item()
        for name in CHOICES:
            target = e - x - gap * du[name]
            missed[name].append((target - clean).square().sum(1))
            wrong[name] += (gradient(player, u, target) - g).square().sum().item()
        bias = gap * (du["network"] - du["marginal"])
        missed["bias"].append(bias.square().sum(1))

    rows = {name: torch.cat(parts).double() for name, parts in missed.items()}
    quantities = {"network_bias": rows["bias"].mean().item()}
    for name in CHOICES:
        quantities[f"{name}_gradient"] = wrong[name] / length
    for name in CHOICES:
        quantities[f"{name}_target"] = rows[name].mean().item()
    for name in CHOICES:
        quantities[f"{name}_median"] = rows[name].median().item()
    return quantities


def gradient(player: Player, u: Tensor, target: Tensor) -> Tensor:
    """Gradient of |u - target|^2 in all of the player's weights, flat, float64."""
    loss = (u - target).square().sum(1).mean()
    parts = torch.autograd.grad(
        loss,
        player.parameters,
        retain_graph=True,
        allow_unused=True,
        materialize_grads=True,
    )
    return torch.cat([g.flatten() for g in parts]).double()
