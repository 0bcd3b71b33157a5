"""What a method consists of on a benchmark: its networks, their size and the cost of an evaluation, its needs. Trains nothing.

`anatomy` constructs the method with random weights, on the CPU. `anatomies` does that in a process of its own, as
`plan.validate` does, since a foreign module may do anything to the process that imports it.

    needs     the fields of `method.Needs`
    players   name -> networks that one optimiser steps: role (of the meter), kind, params, flops, blocks
    networks  role -> (params, flops, blocks) of everything that is evaluated: players, teacher, features, frozen copies
    cost      `cost` of config.yaml: the evaluations of one cycle, see `config.Evaluation`
    start     the arm whose students it starts from, or None

flops: of one evaluation of one row, as torch counts them (matrix products and convolutions, a multiplication and an addition each),
as {"forward", "inputs", "weights", "both", "penalty"}: the forward pass, and what a gradient in the inputs, in the weights, in both,
in the weights with R1 on the inputs adds to it. blocks: the same after 1, 2, ... blocks of a velocity network. None where it is not known.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from distillbench import config
from distillbench.errors import UserError
from distillbench.registry import folders

if TYPE_CHECKING:
    from torch import Tensor, nn

IMPORT_SECONDS = 60
_known: dict[
    tuple[str, tuple[int, ...]], dict[str, Any]
] = {}  # networks of one structure, of whatever method, are described once
VELOCITY = "velocity"  # kind of the networks of the benchmark's architecture; of others the name of their class


def anatomy(benchmark: str, arm_name: str) -> dict[str, Any]:
    """The answer described above; raises whatever the method does."""
    import torch

    from distillbench import features
    from distillbench.data import kinds
    from distillbench.meter import Meter
    from distillbench.method import Task, Teacher
    from distillbench.networks.mlp import VelocityMLP

    class Blank(Task):
        """Weights play no part: every network is random."""

        def network(self, init: Any, *args: Any, **kwargs: Any) -> nn.Module:
            return super().network("random", *args, **kwargs)

    b, arm = config.benchmark(benchmark), folders.arm(arm_name)
    cls = folders.load(arm.folder)
    settings = folders.configuration(arm, b, cls)
    needs, found = cls.needs(settings), kinds.load(b.data)
    architecture = partial(VelocityMLP, found.shape, found.classes, **b.network.model_dump())
    teacher = architecture()
    frozen = None if needs.features is None else features.untrained(found.shape)
    task = Blank(
        found.shape,
        found.classes,
        architecture,
        Teacher(teacher, found.classes) if needs.teacher else None,
        None,
        0,
        torch.device("cpu"),
        Meter(),
        frozen,
    )
    cls(task, settings)
    roles: dict[str, nn.Module] = {role: net for net, role in task._roles.items()}
    networks = {role: _describe(net, found.shape) for role, net in roles.items()}
    if needs.teacher:
        networks["teacher"] = _describe(teacher, found.shape)
    if frozen is not None:
        total = lambda x: sum(tokens.sum() for tokens in frozen(x))  # of every layer's tokens
        networks["features"] = _describe(frozen, found.shape) | {
            "flops": _flops(frozen, torch.zeros(1, *found.shape), total)
        }
    players = {}
    for name, player in task.players.items():
        players[name] = [
            {"role": task._roles[net], **networks[task._roles[net]]} for net in player.networks
        ]
    cost = arm.attribute("cost")
    return {
        "benchmark": benchmark,
        "arm": arm_name,
        "needs": dataclasses.asdict(needs),
        "players": players,
        "networks": networks,
        "cost": None if cost is None else [e.model_dump() for e in cost],
        "start": None if arm.start is None else arm.start.name,
    }


def _describe(net: Any, shape: tuple[int, ...]) -> dict[str, Any]:
    """kind, params, flops and blocks of a network in a benchmark of this shape."""
    key = repr(net), shape
    if key not in _known:
        _known[key] = _described(net, shape)
    return dict(_known[key])


def _described(net: Any, shape: tuple[int, ...]) -> dict[str, Any]:
    import torch

    velocity = all(hasattr(net, name) for name in ("gap", "guidance", "blocks", "classes"))
    kind = VELOCITY if velocity else type(net).__name__
    out: dict[str, Any] = {
        "kind": kind,
        "params": sum(p.numel() for p in net.parameters()),
        "blocks": None,
    }
    one = torch.zeros(1)
    if velocity:
        given = {
            "s": one if net.gap is not None else None,
            "guidance": one if net.guidance is not None else None,
        }
        labels = one.long() if net.classes else None
        of = lambda k: _flops(
            net, torch.zeros(1, *shape), lambda x: net(x, one, labels, features=k, **given)
        )
        return out | {"flops": of(0), "blocks": [of(k + 1) for k in range(len(net.blocks))]}
    return out | {"flops": _head_flops(net, shape)}


def _head_flops(net: nn.Module, shape: tuple[int, ...]) -> dict[str, int] | None:
    """Of a head on a vector or on a single token of features; None where it takes something else, or several tokens of an image."""
    import torch
    from torch import nn

    layers = [layer for layer in net.modules() if isinstance(layer, nn.Linear | nn.Conv1d)]
    if not layers or (len(shape) == 3 and any(isinstance(layer, nn.Conv1d) for layer in layers)):
        return None
    first = layers[0]
    x = (
        torch.zeros(1, first.in_features)
        if isinstance(first, nn.Linear)
        else torch.zeros(1, 1, first.in_channels)
    )
    try:
        return _flops(net, x, lambda x: net(x, torch.zeros(1, dtype=torch.int64)))
    except Exception:  # of a kind not known here
        return None


def _flops(net: nn.Module, x: Tensor, run: Callable[[Tensor], Any]) -> dict[str, int]:
    """FLOPs of one row: forward, and on top of it what each kind of gradient costs."""
    import torch
    from torch import Tensor

    from distillbench.meter import Meter

    def cost(gradient: str) -> int:
        meter = Meter()
        given = x.clone().requires_grad_(gradient in ("inputs", "both", "penalty"))
        with meter.measured():
            found = run(given)
            out = (found if isinstance(found, Tensor) else found[-1]).sum()
            if gradient == "penalty":
                (g,) = torch.autograd.grad(out, given, create_graph=True)
                out = out + g.square().sum()
            if gradient == "inputs":
                torch.autograd.grad(out, given)
            elif gradient != "forward":
                torch.autograd.grad(
                    out,
                    [*net.parameters(), *([given] if gradient == "both" else [])],
                    allow_unused=True,
                )
        return meter.flops

    before = [p.requires_grad for p in net.parameters()]
    found = {}
    for gradient in ("forward", "inputs", "weights", "both", "penalty"):
        net.requires_grad_(gradient in ("weights", "both", "penalty"))
        found[gradient] = cost(gradient)
    for p, needed in zip(net.parameters(), before):
        p.requires_grad_(needed)
    return {
        gradient: n - (found["forward"] if gradient != "forward" else 0)
        for gradient, n in found.items()
    }


def anatomies(wanted: list[tuple[str, str]]) -> dict[tuple[str, str], dict[str, Any]]:
    """`anatomy` of every (benchmark, arm), in another process; {"error": why} for an arm that cannot be built.

    UserError on a mistake in a benchmark's or a method's file.
    """
    out: dict[tuple[str, str], dict[str, Any]] = {}
    todo = list(wanted)
    while todo:
        command = [
            sys.executable,
            "-m",
            "distillbench.conformance.anatomy",
            *(word for pair in todo for word in pair),
        ]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        answers = [json.loads(line) for line in done.stdout.splitlines()]
        for answer in answers:
            if "user_error" in answer:
                raise UserError(answer["user_error"])
        out |= dict(zip(todo, answers))
        if len(answers) < len(todo):
            out[todo[len(answers)]] = {"error": f"its process ended with code {done.returncode}"}
        todo = todo[len(answers) + 1 :]
    return out


def main(words: list[str]) -> None:
    """`python -m distillbench.anatomy <benchmark> <arm> ...`: one line of JSON for each pair, the end of `anatomies`."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a module prints is no answer
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    for benchmark, arm in zip(words[::2], words[1::2]):
        faulthandler.dump_traceback_later(IMPORT_SECONDS, exit=True)
        try:
            line = anatomy(benchmark, arm)
        except UserError as e:
            line = {"user_error": str(e)}
        except Exception as e:
            line = {"error": f"{type(e).__name__}: {' '.join(str(e).split())}"[:200]}
        print(json.dumps(line), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
