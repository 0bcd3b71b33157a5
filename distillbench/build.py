"""A cell built and ready to train, or restored and ready to sample: its data, teacher, task and method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distillbench import data as data_sets
from distillbench import features, registry
from distillbench.cell import Cell
from distillbench.checkpoint import read_tensors
from distillbench.meter import Meter
from distillbench.method import Method, Needs, Task
from distillbench.networks import VelocityNetwork
from distillbench.seeds import derive
from distillbench.teachers import MixtureVelocity, Teacher, TeacherConfig, TeacherTraining


@dataclass
class Run:
    """A cell built and ready: what the loop and the sampler work on."""

    cell: Cell
    data: data_sets.Images | data_sets.Mixture
    method: Method
    needs: Needs
    task: Task
    meter: Meter
    device: torch.device
    pairs: dict[str, Tensor] | None = None


def weights_file(cell: Cell) -> str:
    return "teacher.safetensors" if cell.arm is None else "student.safetensors"


def build(cell: Cell, meter: Meter | None = None) -> Run:
    """Data, teacher, task and method of a cell, freshly initialised."""
    meter = meter or Meter()
    b = cell.benchmark
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = data_sets.load(b.data)
    if cell.arm is None:
        cls: type[Method] = TeacherTraining
        config: Any = TeacherConfig(**b.teacher.model_dump(), guidance=b.guidance)
    else:
        cls = registry.load(cell.arm.folder)
        config = registry.configuration(cell.arm, b, cls)
    needs = cls.needs(config)
    if needs.teacher and cell.arm is not None and cell.arm.attribute("group") == "from_scratch":
        raise ValueError("group: from_scratch has the teacher's budget on top and so no teacher: needs(teacher=False)")
    if cell.start is not None and cell.start.arm is not None and cell.arm is not None:
        own, other = cell.arm.attribute("group"), cell.start.arm.attribute("group")
        if own != other:
            raise ValueError(f"group: {own} with a start of group {other}, which has another budget")
    exact = MixtureVelocity(data).to(device) if isinstance(data, data_sets.Mixture) else None
    weights: VelocityNetwork | None = None
    teacher: Teacher | None = None
    if needs.teacher:
        weights = VelocityNetwork(data.shape, data.classes, **b.network.model_dump()).to(device)
        weights.load_state_dict(read_tensors(cell.teacher.folder / "teacher.safetensors", device)[0])
    # Withheld unless needed; the teacher's own training is told the exact velocity where there is one.
    network = (exact or weights) if needs.teacher or cell.arm is None else None
    if network is not None:
        teacher = Teacher(network, data.classes)
        # A closed form costs nothing, but stands for a network: it is charged as one.
        stands_for = VelocityNetwork(data.shape, data.classes, **b.network.model_dump())
        meter.watch(network, lambda: "teacher", row_flops(stands_for) if exact is not None else 0)
    frozen: torch.nn.Module | None = None
    if needs.features is not None:
        torch.manual_seed(derive(cell.seed, "features"))
        frozen = features.untrained(data.shape).requires_grad_(False).to(device)
        meter.watch(frozen, lambda: "features")
    start = None if cell.start is None else read_tensors(cell.start.folder / weights_file(cell.start), device)[0]
    task = Task(data.shape, data.classes, b.network.model_dump(), teacher, weights, cell.seed, device, meter, frozen, start)
    torch.manual_seed(derive(cell.seed, "build"))
    method = cls(task, config)
    return Run(cell, data, method, needs, task, meter, device)


def row_flops(network: VelocityNetwork) -> int:
    """FLOPs of one evaluation of one row."""
    meter, one = Meter(), torch.zeros(1)
    with meter.measured(), torch.no_grad():
        network(torch.zeros(1, *network.shape), one, one.long() if network.classes else None)
    return meter.flops


def saved_player(run: Run) -> Any:
    """The player whose average is the result."""
    return run.task.players["teacher" if run.cell.arm is None else "student"]


def restore(cell: Cell) -> Run:
    """A finished cell with its saved weights, ready to sample."""
    run = build(cell)
    state, _ = read_tensors(cell.folder / weights_file(cell), run.device)
    saved_player(run).averaged().load_state_dict(state)
    return run
