"""A cell built and ready to train, or restored and ready to sample: data, teacher, task, method."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from distillbench import features
from distillbench.cells.cell import Cell
from distillbench.cells.checkpoint import read_tensors
from distillbench.data import kinds
from distillbench.data.images import Images
from distillbench.data.mixture import Mixture
from distillbench.meter import Meter
from distillbench.method import Method, Needs, Task, Teacher
from distillbench.networks.mlp import VelocityMLP
from distillbench.players import Player
from distillbench.registry import folders
from distillbench.seeds import derive
from distillbench.teachers.exact import MixtureVelocity
from distillbench.teachers.trained import TeacherConfig, TeacherTraining


@dataclass
class Run:
    """A cell built and ready: what the loop and the sampler work on."""

    cell: Cell
    data: Images | Mixture
    method: Method
    needs: Needs
    task: Task
    meter: Meter
    device: torch.device
    pairs: dict[str, Tensor] | None = None


def repeat_bytes() -> None:
    """One thread, and denormal numbers flushed: only so does a CPU repeat its bytes."""
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
        torch.set_flush_denormal(True)


def weights_file(cell: Cell) -> str:
    """Name of the file in a finished cell's folder that holds its network."""
    return "teacher.safetensors" if cell.arm is None else "student.safetensors"


def build(cell: Cell, meter: Meter | None = None) -> Run:
    """Data, teacher, task and method of a cell, freshly initialised.

    Raises ValueError where the method's group forbids what it needs or starts from, UserError on a
    mistake in its settings, and whatever the method raises.
    """
    meter = meter or Meter()
    b = cell.benchmark
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = kinds.load(b.data)
    method_class, config = method_of(cell)
    needs = method_class.needs(config)
    check_group(cell, needs)
    architecture = partial(VelocityMLP, data.shape, data.classes, **b.network.model_dump())

    teacher_weights: dict[str, Tensor] | None = None
    if needs.teacher:
        teacher_weights, _ = read_tensors(cell.teacher.folder / "teacher.safetensors", device)
    field: nn.Module | None = None  # the velocity field that the method is handed
    charged = 0  # FLOPs of a row on top of those that are counted
    # Withheld unless needed; the teacher's own training is told the exact velocity if there is one.
    if isinstance(data, Mixture) and (needs.teacher or cell.arm is None):
        field = MixtureVelocity(data).to(device)
        # A closed form costs nothing, but stands for a network: it is charged as one.
        charged = row_flops(architecture())
    elif teacher_weights is not None:
        field = architecture().to(device)
        field.load_state_dict(teacher_weights)
    teacher: Teacher | None = None
    if field is not None:
        teacher = Teacher(field, data.classes)
        meter.watch(field, lambda: "teacher", charged)

    frozen: nn.Module | None = None
    if needs.features is not None:
        torch.manual_seed(derive(cell.seed, "features"))
        frozen = features.untrained(data.shape).requires_grad_(False).to(device)
        meter.watch(frozen, lambda: "features")
    start: dict[str, Tensor] | None = None
    if cell.start is not None:
        start, _ = read_tensors(cell.start.folder / weights_file(cell.start), device)
    task = Task(
        data.shape,
        data.classes,
        architecture,
        teacher,
        teacher_weights,
        cell.seed,
        device,
        meter,
        frozen,
        start,
    )
    torch.manual_seed(derive(cell.seed, "build"))
    return Run(cell, data, method_class(task, config), needs, task, meter, device)


def method_of(cell: Cell) -> tuple[type[Method], Any]:
    """The method's class and its validated settings; of a teacher's cell those of its training."""
    b = cell.benchmark
    if cell.arm is None:
        return TeacherTraining, TeacherConfig(**b.teacher.model_dump(), guidance=b.guidance)
    method_class = folders.load(cell.arm.folder)
    return method_class, folders.configuration(cell.arm, b, method_class)


def check_group(cell: Cell, needs: Needs) -> None:
    """ValueError where a cell would spend more than its group may."""
    if cell.arm is None:
        return
    group = cell.arm.attribute("group")
    if needs.teacher and group == "from_scratch":
        raise ValueError(
            "group: from_scratch has the teacher's budget on top and so no teacher: "
            "needs(teacher=False)"
        )
    if cell.start is not None and cell.start.arm is not None:
        other = cell.start.arm.attribute("group")
        if group != other:
            raise ValueError(
                f"group: {group} with a start of group {other}, which has another budget"
            )


def row_flops(network: VelocityMLP) -> int:
    """FLOPs of one row of a forward pass, as torch counts them."""
    meter = Meter()
    labels = torch.zeros(1, dtype=torch.int64) if network.classes else None
    with meter.measured(), torch.no_grad():
        network(torch.zeros(1, *network.shape), torch.zeros(1), labels)
    return meter.flops


def saved_player(run: Run) -> Player:
    """The player whose network is saved and sampled; ValueError where there is none."""
    name = "teacher" if run.cell.arm is None else "student"
    if name not in run.task.players:
        found = sorted(run.task.players)
        raise ValueError(f"a player named '{name}' is what is saved and sampled; found {found}")
    return run.task.players[name]


def saved_network(run: Run) -> nn.Module:
    """The network that is saved and sampled: the moving average, where there is one."""
    return saved_player(run).averaged()


def restore(cell: Cell) -> Run:
    """A finished cell with its saved weights, ready to sample."""
    run = build(cell)
    state, _ = read_tensors(cell.folder / weights_file(cell), run.device)
    saved_network(run).load_state_dict(state)
    return run
