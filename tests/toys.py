"""What tests of methods share: a task whose teacher has random weights, and who moves when."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from distillbench.meter import Meter
from distillbench.method import Batch, Method, Step, Task, Teacher
from distillbench.networks.mlp import VelocityMLP

CLASSES = 3


def random_task(
    shape: tuple[int, ...],
    depth: int = 2,
    features: nn.Module | None = None,
    device: torch.device | str = "cpu",
    start: dict[str, Tensor] | None = None,
) -> Task:
    """A task of three classes whose teacher has random weights, the same on every device.

    Random are all of them: the last layer of a new network is zero.
    """
    torch.manual_seed(1)
    teacher, meter = VelocityMLP(shape, CLASSES, 16, depth), Meter()
    for p in teacher.parameters():
        nn.init.normal_(p, std=0.2)
    meter.watch(teacher.to(device), lambda: "teacher")
    if features is not None:
        meter.watch(features.to(device), lambda: "features")
    architecture = partial(VelocityMLP, shape, CLASSES, width=16, depth=depth)
    return Task(
        shape,
        CLASSES,
        architecture,
        Teacher(teacher, CLASSES),
        teacher.state_dict(),
        0,
        torch.device(device),
        meter,
        features,
        start,
    )


def shake(*networks: nn.Module) -> None:
    """Move networks off the teacher, where they start, so that velocities differ."""
    for p in [p for network in networks for p in network.parameters()]:
        p.data.add_(0.1 * torch.randn_like(p))


def weights(*modules: nn.Module) -> Tensor:
    """All of them, flat."""
    return torch.cat([p.detach().flatten().clone() for m in modules for p in m.parameters()])


def watch_updates(m: Method) -> list[str]:
    """Names of the players of student `m.net` and critic `m.fake`, in the order they move.

    An update that moves the other's weights is an AssertionError.
    """
    order: list[str] = []

    def watched(player, own: nn.Module, other: nn.Module) -> None:
        original = player.update

        def update(loss: Tensor) -> None:
            before = weights(own), weights(other)
            original(loss)
            assert not torch.equal(weights(own), before[0]) and torch.equal(
                weights(other), before[1]
            )
            order.append(player.name)

        player.update = update

    watched(m.student, m.net, m.fake)
    watched(m.critic, m.fake, m.net)
    return order


def calls_of_cycle(m: Method, task: Task, cycle: int, number: int, batch: Batch) -> dict[str, int]:
    """Network evaluations by role in the train steps of the `number`-th cycle."""
    with task.meter.counting():
        for i in range(number * cycle, (number + 1) * cycle):
            m.train_step(batch, Step(i, 40, 0, torch.device("cpu")))
    return dict(task.meter.calls)
