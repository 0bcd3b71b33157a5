"""What a MeanFlow update costs against flow matching: our dual forward and torch's forward mode, side by side.

Part of `make bench`: FLOPs in units of one forward pass and time ratios of one run, on one thread.
"""

from __future__ import annotations

import statistics
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from distillbench.jvp import value_and_tangent
from distillbench.networks.mlp import VelocityMLP

B, SHAPE, ROUNDS = 128, (1, 8, 8), 60


def measure() -> list[tuple[str, float, float]]:
    """(update, FLOPs / forward, time / flow matching)."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = VelocityMLP(SHAPE, 10, width=192, depth=3, second_time=True)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.05)
    x, v, t = torch.randn(B, *SHAPE), torch.randn(B, *SHAPE), torch.rand(B)
    s, labels, one, zero = t * torch.rand(B), torch.randint(10, (B,)), torch.ones(B), torch.zeros(B)

    def function(x, t, s):
        return net(x, t, labels, s=s)

    def loss_of(u, du):
        m = len(du)
        target = v.clone()
        target[:m] -= (t - s)[:m, None, None, None] * du
        return (u - target.detach()).square().mean()

    def flow_matching():
        torch.autograd.grad((function(x, t, s) - v).square().mean(), net.parameters())

    def dual(m):
        torch.autograd.grad(
            loss_of(*value_and_tangent(function, (x, t, s), (v[:m], one[:m], zero[:m]), False)),
            net.parameters(),
        )

    def official_graph():  # torch.func.jvp with its graph, tangent detached (MeanFlow's PyTorch code)
        u, du = torch.func.jvp(function, (x, t, s), (v, one, zero))
        torch.autograd.grad(loss_of(u, du.detach()), net.parameters())

    def separate():  # tangent without a graph, value again with one
        with torch.no_grad():
            _, du = torch.func.jvp(function, (x, t, s), (v, one, zero))
        torch.autograd.grad(loss_of(function(x, t, s), du), net.parameters())

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function(x, t, s)
    forward = counter.get_total_flops()
    cases = {
        "flow matching": flow_matching,
        "MeanFlow, dual, 25 % of rows s = t": lambda: dual(96),
        "MeanFlow, dual, no row s = t": lambda: dual(128),
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
        rows.append(
            (name, counter.get_total_flops() / forward, statistics.median(seconds[name]) / base)
        )
    return rows
