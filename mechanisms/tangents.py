"""Along which velocity should MeanFlow differentiate? On a mixture, whose marginal velocity v is known.

MeanFlow's target is (e - x) - (t-s) du/dt with du/dt along (dx, dt, ds) = (a, 1, 0) and a = e - x, the sample's velocity (arXiv
2505.13447). iMF (arXiv 2512.02012, Eqs. 8-12, Figure 3) objects that a network cannot know e - x, and takes its own u(x_t, t, t).
With n = e - x - v, the target without noise, v - (t-s) du/dt along v, is missed by (I - (t-s) d_x u) n with the sample's velocity, by
n with the marginal v, by n and a bias, (t-s) d_x u (v - u(x_t, t, t)), with the network's. Halfway through a run of UPDATES updates
from scratch, of each:

    {sample,network,marginal}_target    mean square of the miss over rows with s < t
    {sample,network,marginal}_median    its median: a few rows between modes dominate the mean
    {sample,network,marginal}_gradient  mean square of a batch's error of the gradient of |u - target|^2, in squared lengths of it
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
from distillbench.seeds import Rng
from distillbench.teachers.exact import MixtureVelocity

BENCHMARK = "gaussians-ring"
METHODS = ("meanflow",)
ARM = "meanflow@scratch"
UPDATES, BATCHES, ROWS = 600, 32, 256
CHOICES = ("sample", "network", "marginal")


def measure(seed: int) -> dict[str, float]:
    run, _ = ready(BENCHMARK, ARM, seed)
    run.task.players["student"].total_updates = UPDATES
    for i in range(UPDATES // 2):
        one_step(run, i, UPDATES)
    method: Any = run.method
    assert isinstance(run.data, Mixture)
    c, player, rng = method.config, run.task.players["student"], Rng(seed, "tangents")
    net, exact = player.networks[0], MixtureVelocity(run.data)
    missed: dict[str, list[Tensor]] = {name: [] for name in (*CHOICES, "bias")}
    wrong, length = dict.fromkeys(CHOICES, 0.0), 0.0

    for _ in range(BATCHES):
        x, _ = run.data.draw(rng, ROWS)
        t, s = times.sorted_pair(rng, ROWS, c.time_mean, c.time_std, diagonal=0)
        e = rng.normal(*x.shape)
        x_t = noised(x, e, t)
        v, gap = exact(x_t, t), over(t - s, x)
        along = {"sample": e - x, "network": net(x_t, t, s=t).detach(), "marginal": v}
        derivative = lambda a: run.task.jvp(
            net, (x_t, t, s), (a, torch.ones_like(t), torch.zeros_like(s)), Condition(None)
        )[1]  # noqa: B023
        du = {name: derivative(a) for name, a in along.items()}
        u, clean = net(x_t, t, s=s), v - gap * du["marginal"]

        def gradient(target: Tensor, u: Tensor = u) -> Tensor:
            loss = (u - target).square().sum(1).mean()
            parts = torch.autograd.grad(
                loss,
                player.parameters,
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            return torch.cat([g.flatten() for g in parts]).double()

        g = gradient(clean)
        length += g.square().sum().item()
        for name in CHOICES:
            target = e - x - gap * du[name]
            missed[name].append((target - clean).square().sum(1))
            wrong[name] += (gradient(target) - g).square().sum().item()
        missed["bias"].append((gap * (du["network"] - du["marginal"])).square().sum(1))

    rows = {name: torch.cat(parts).double() for name, parts in missed.items()}
    out = {"network_bias": rows["bias"].mean().item()} | {
        f"{name}_gradient": wrong[name] / length for name in CHOICES
    }
    return (
        out
        | {f"{k}_target": rows[k].mean().item() for k in CHOICES}
        | {f"{k}_median": rows[k].median().item() for k in CHOICES}
    )
