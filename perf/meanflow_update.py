"""What a MeanFlow update costs against flow matching.

By our dual forward and by torch's forward mode, side by side. Part of `make bench`: FLOPs in units
of one forward pass and time ratios of one run, on one thread.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from distillbench.jvp import value_and_tangent
from distillbench.networks.mlp import VelocityMLP

B = 128
SHAPE = (1, 8, 8)
ROUNDS = 60


def measure() -> list[tuple[str, float, float]]:
    """(update, FLOPs / forward, time / flow matching) of every way to update."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = VelocityMLP(SHAPE, 10, width=192, depth=3, second_time=True)
    weights = list(net.parameters())
    for p in weights:
        torch.nn.init.normal_(p, std=0.05)
    x = torch.randn(B, *SHAPE)
    v = torch.randn(B, *SHAPE)
    t = torch.rand(B)
    s = t * torch.rand(B)
    labels = torch.randint(10, (B,))
    one = torch.ones(B)
    zero = torch.zeros(B)

    def function(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        u = net(x, t, labels, s=s)
        assert isinstance(u, Tensor)
        return u

    def loss_of(u: Tensor, du: Tensor) -> Tensor:
        m = len(du)
        target = v.clone()
        target[:m] -= (t - s)[:m, None, None, None] * du
        return (u - target.detach()).square().mean()

    def flow_matching() -> None:
        torch.autograd.grad((function(x, t, s) - v).square().mean(), weights)

    def dual(m: int) -> None:
        tangents = (v[:m], one[:m], zero[:m])
        u, du = value_and_tangent(function, (x, t, s), tangents, False)
        torch.autograd.grad(loss_of(u, du), weights)

    def official_graph() -> None:
        """torch.func.jvp with its graph, tangent detached (MeanFlow's PyTorch code)."""
        u, du = torch.func.jvp(function, (x, t, s), (v, one, zero))[:2]
        torch.autograd.grad(loss_of(u, du.detach()), weights)

    def separate() -> None:
        """The tangent without a graph, the value again with one."""
        with torch.no_grad():
            _, du = torch.func.jvp(function, (x, t, s), (v, one, zero))[:2]
        torch.autograd.grad(loss_of(function(x, t, s), du), weights)

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function(x, t, s)
    forward = counter.get_total_flops()
    cases: dict[str, Callable[[], None]] = {
        "flow matching": flow_matching,
        "MeanFlow, dual, 25 % of rows s = t": partial(dual, 96),
        "MeanFlow, dual, no row s = t": partial(dual, 128),
        "MeanFlow, torch.func.jvp with graph": official_graph,
        "MeanFlow, torch.func.jvp without graph, then forward": separate,
    }
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(ROUNDS):  # interleaved, so that load on the machine falls on all alike
        for name, run in cases.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    base = statistics.median(seconds["flow matching"])
    rows = []
    for name, run in cases.items():
        with FlopCounterMode(display=False) as counter:
            run()
        flops = counter.get_total_flops() / forward
        rows.append((name, flops, statistics.median(seconds[name]) / base))
    return rows
