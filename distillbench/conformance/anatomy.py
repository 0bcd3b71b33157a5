"""What a method consists of on a benchmark: its networks, their size and cost, its needs.

`anatomy` constructs the method with random weights, on the CPU, and trains nothing:

    needs     the fields of `method.Needs`
    players   name -> networks that one optimiser steps: role (of the meter), kind, params, flops,
              blocks
    networks  role -> (kind, params, flops, blocks) of everything that is evaluated: players,
              teacher, features, frozen copies
    cost      `cost` of config.yaml: the evaluations of one cycle, see `config.Evaluation`
    start     the arm whose students it starts from, or None

flops: of one evaluation of one row, as torch counts them (matrix products and convolutions, a
multiplication and an addition each), as {"forward", "inputs", "weights", "both", "penalty"}: the
forward pass, and what a gradient in the inputs, in the weights, in both, in the weights with R1 on
the inputs adds to it. blocks: the same after 1, 2, ... blocks of a velocity network. None where it
is not known.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from distillbench import config, features
from distillbench.cells import isolated
from distillbench.data import kinds
from distillbench.errors import UserError
from distillbench.meter import Meter
from distillbench.method import Needs, Task, Teacher
from distillbench.networks.mlp import VelocityMLP
from distillbench.registry import folders

LONGEST_ERROR = 200  # characters
# Kind of the networks of the benchmark's architecture; of others it is the name of their class.
VELOCITY = "velocity"
VELOCITY_ATTRIBUTES = ("gap", "guidance", "blocks", "classes")
# What is measured: a forward pass alone, and with gradients.
GRADIENTS = ("forward", "inputs", "weights", "both", "penalty")
IN_INPUTS = ("inputs", "both", "penalty")
IN_WEIGHTS = ("weights", "both", "penalty")

Flops = dict[str, int]  # by GRADIENTS
Shape = tuple[int, ...]
Evaluate = Callable[[Tensor], Any]  # a network at an input: a tensor, or several


@dataclass(frozen=True)
class Network:
    """Size and cost of a network."""

    kind: str
    params: int
    blocks: list[Flops] | None
    flops: Flops | None


# Networks of one structure in data of one shape, of whatever method, are measured once.
_measured: dict[tuple[str, Shape], Network] = {}


class RandomTask(Task):
    """A task whose networks are all random: weights play no part in an anatomy."""

    def network(self, init: Any, *args: Any, **kwargs: Any) -> nn.Module:
        """A network with random weights, whatever `init` asks for."""
        return super().network("random", *args, **kwargs)


def anatomy(benchmark: str, arm_name: str) -> dict[str, Any]:
    """The answer described above, as JSON; raises whatever the method does."""
    b = config.benchmark(benchmark)
    arm = folders.arm(arm_name)
    method = folders.load(arm.folder)
    settings = folders.configuration(arm, b, method)
    needs = method.needs(settings)
    data = kinds.load(b.data)
    architecture = partial(VelocityMLP, data.shape, data.classes, **b.network.model_dump())
    teacher = architecture()
    frozen = None if needs.features is None else features.untrained(data.shape)
    task = RandomTask(
        data.shape,
        data.classes,
        architecture,
        Teacher(teacher, data.classes) if needs.teacher else None,
        None,
        0,
        torch.device("cpu"),
        Meter(),
        frozen,
    )
    method(task, settings)
    networks = networks_of(task, needs, teacher)
    players = {}
    for name, player in task.players.items():
        roles = [task._roles[network] for network in player.networks]
        players[name] = [{"role": role, **networks[role]} for role in roles]
    cost = arm.attribute("cost")
    return {
        "benchmark": benchmark,
        "arm": arm_name,
        "needs": asdict(needs),
        "players": players,
        "networks": networks,
        "cost": None if cost is None else [evaluation.model_dump() for evaluation in cost],
        "start": None if arm.start is None else arm.start.name,
    }


def networks_of(task: Task, needs: Needs, teacher: nn.Module) -> dict[str, dict[str, Any]]:
    """The fields of `Network` of everything that a method evaluates, by role."""
    networks = {role: measure(network, task.shape) for network, role in task._roles.items()}
    if needs.teacher:
        networks["teacher"] = measure(teacher, task.shape)
    frozen = task.features
    if frozen is not None:

        def total(x: Tensor) -> Tensor:
            """Sum over every layer's tokens."""
            return sum(tokens.sum() for tokens in frozen(x))

        flops = flops_of(frozen, torch.zeros(1, *task.shape), total)
        networks["features"] = replace(measure(frozen, task.shape), flops=flops)
    return {role: asdict(network) for role, network in networks.items()}


def measure(network: nn.Module, shape: Shape) -> Network:
    """Size and cost of a network in data of this shape."""
    key = repr(network), shape
    if key not in _measured:
        velocity = all(hasattr(network, name) for name in VELOCITY_ATTRIBUTES)
        _measured[key] = _of_velocity(network, shape) if velocity else _of_head(network, shape)
    return _measured[key]


def _of_velocity(network: Any, shape: Shape) -> Network:
    time = torch.zeros(1)
    labels = time.long() if network.classes else None
    given = {
        "s": time if network.gap is not None else None,
        "guidance": time if network.guidance is not None else None,
    }

    def flops_after(blocks: int) -> Flops:
        """FLOPs up to so many blocks; 0: of the whole network."""

        def evaluate(x: Tensor) -> Any:
            return network(x, time, labels, features=blocks, **given)

        return flops_of(network, torch.zeros(1, *shape), evaluate)

    blocks = [flops_after(count + 1) for count in range(len(network.blocks))]
    return Network(VELOCITY, _params(network), blocks, flops_after(0))


def _of_head(network: nn.Module, shape: Shape) -> Network:
    kind = type(network).__name__
    return Network(kind, _params(network), None, _head_flops(network, shape))


def _params(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def _head_flops(network: nn.Module, shape: Shape) -> Flops | None:
    """FLOPs of a head on a vector or on a single token of features.

    None where it takes something else, or several tokens of an image.
    """
    layers = [layer for layer in network.modules() if isinstance(layer, nn.Linear | nn.Conv1d)]
    on_tokens = any(isinstance(layer, nn.Conv1d) for layer in layers)
    if not layers or (len(shape) == 3 and on_tokens):
        return None
    first = layers[0]
    if isinstance(first, nn.Linear):
        x = torch.zeros(1, first.in_features)
    else:
        x = torch.zeros(1, 1, first.in_channels)
    labels = torch.zeros(1, dtype=torch.int64)

    def evaluate(x: Tensor) -> Any:
        return network(x, labels)

    try:
        return flops_of(network, x, evaluate)
    except Exception:  # of a kind not known here
        return None


def flops_of(network: nn.Module, x: Tensor, evaluate: Evaluate) -> Flops:
    """FLOPs of one row `x` [1, ...]: forward, and on top of it what each kind of gradient costs."""
    before = [p.requires_grad for p in network.parameters()]
    flops = {}
    for gradient in GRADIENTS:
        network.requires_grad_(gradient in IN_WEIGHTS)
        flops[gradient] = _metered(network, x, evaluate, gradient)
        if gradient != "forward":
            flops[gradient] -= flops["forward"]
    for p, needed in zip(network.parameters(), before):
        p.requires_grad_(needed)
    return flops


def _metered(network: nn.Module, x: Tensor, evaluate: Evaluate, gradient: str) -> int:
    """FLOPs of a forward pass and one kind of gradient."""
    meter = Meter()
    given = x.clone().requires_grad_(gradient in IN_INPUTS)
    with meter.measured():
        result = evaluate(given)
        out = (result if isinstance(result, Tensor) else result[-1]).sum()
        if gradient == "penalty":
            (slope,) = torch.autograd.grad(out, given, create_graph=True)
            out = out + slope.square().sum()
        if gradient == "inputs":
            torch.autograd.grad(out, given)
        elif gradient != "forward":
            inputs = [given] if gradient == "both" else []
            torch.autograd.grad(out, [*network.parameters(), *inputs], allow_unused=True)
    return meter.flops


def reply(benchmark: str, arm: str) -> dict[str, Any]:
    """`anatomy`, or {"error": why} where the method raises; UserError on a mistake in a file."""
    try:
        return anatomy(benchmark, arm)
    except UserError:
        raise
    except Exception as e:
        words = f"{type(e).__name__}: {' '.join(str(e).split())}"
        return {"error": words[:LONGEST_ERROR]}


if __name__ == "__main__":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    isolated.answer(sys.argv[1:], reply)
