"""What comes before a cell's first step: what its method asks for, and the steps it can pay."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distillbench import features
from distillbench.cells.build import Run, build
from distillbench.cells.cell import Cell
from distillbench.cells.progress import Report
from distillbench.cells.pulse import SETUP, Pulse
from distillbench.cells.steps import one_step
from distillbench.data.images import Images
from distillbench.errors import OverBudget
from distillbench.meter import Meter
from distillbench.method import Pairs
from distillbench.seeds import Rng, derive, ranks
from distillbench.teachers.pairs import make_pairs

FEATURES_SHARE = 0.05  # of the budget, for training a discriminator's features without labels

# What set-up makes and is charged for: regression `pairs`, weights of the `features`.
Prepared = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class Plan:
    """What a cell's budget buys, as its record's `cost` says it.

    flops are of everything, its set-up and all that its start has cost included; rows are of
    network evaluations by role over the whole run, updates by player.
    """

    steps: int
    limit_flops: float | None
    flops: int
    setup_flops: float
    start: dict[str, float] | None
    calls_per_cycle: dict[str, int]
    rows: dict[str, int]
    updates: dict[str, int]
    images: int

    def as_cost(self) -> dict[str, Any]:
        """The fields as JSON; without `start` where the cell has none."""
        fields = asdict(self)
        if self.start is None:
            del fields["start"]
        return fields


def prepare(run: Run, report: Report, pulse: Pulse) -> Prepared:
    """Regression pairs and trained features, as the needs say; metered, since a method pays for
    what it asks for."""
    made = Prepared()
    if run.needs.pairs is not None:
        report("regression pairs", 0, run.needs.pairs.count)
        with run.meter.measured(), pulse.patience():
            made["pairs"] = regression_pairs(run, run.needs.pairs)
    # Of data that are no images the features stay random.
    if run.needs.features == "self_supervised" and isinstance(run.data, Images):
        report("features", 0, 1)
        with pulse.patience():
            made["features"] = trained_features(run, run.data)
    return made


def regression_pairs(run: Run, wanted: Pairs) -> dict[str, Tensor]:
    """The pairs of `make_pairs` that a method's needs name."""
    rng = Rng(run.cell.seed, "pairs", device=run.device)
    guidance = run.cell.benchmark.guidance
    data = run.data
    return make_pairs(run.task.teacher, wanted, data.shape, data.classes, guidance, rng)


def trained_features(run: Run, data: Images) -> dict[str, Tensor]:
    """Weights of the task's features after as many updates as their share of the budget buys."""
    cell = run.cell
    network = run.task.features
    assert network is not None

    def pretrain(network: nn.Module, updates: int) -> None:
        torch.manual_seed(derive(cell.seed, "pretrain"))
        rng = Rng(cell.seed, "pretrain", device=run.device)
        features.pretrain(network, data.draw, data.shape, rng, run.device, updates)

    one_update = Meter()
    with one_update.measured():
        pretrain(copy.deepcopy(network), 1)
    with run.meter.measured():
        pretrain(network, int(FEATURES_SHARE * cell.budget // one_update.flops))
    return network.state_dict()


def attach(run: Run, made: Prepared) -> Run:
    """Attach to a built run what `prepare` made; returns the run."""
    run.pairs = made.get("pairs")
    if "features" in made:
        assert run.task.features is not None
        run.task.features.load_state_dict(made["features"])
    return run


def price(cell: Cell, report: Report, pulse: Pulse | None = None) -> tuple[Plan, Prepared]:
    """Meter set-up and one cycle on a throw-away copy; the plan, and what set-up made.

    Raises OverBudget where the budget does not buy one cycle, ValueError where a cycle computes
    nothing, and whatever the method raises.
    """
    pulse = pulse or Pulse()
    meter = Meter()
    with meter.measured():  # whatever a method computes in its constructor counts
        run = build(cell, meter)
    made = prepare(run, report, pulse)
    attach(run, made)
    metered = run.meter.flops
    setup_rows = dict(run.meter.rows)
    start = None if cell.start is None else cell.start.result()
    spent = None if start is None else {key: start["cost"][key] for key in ("flops", "seconds")}
    setup_flops = metered + (0 if spent is None else spent["flops"])

    cycle = run.needs.cycle
    run.meter.calls.clear()
    run.meter.rows.clear()
    with run.meter.measured():
        for i in range(cycle):
            one_step(run, i, cycle)
            pulse.beat(SETUP, i + 1)
    world = ranks()[1]  # each trains its share of a batch; set-up, which each repeats, counts once
    cycle_flops = (run.meter.flops - metered) * world
    if cycle_flops == 0:
        raise ValueError("train_step computed nothing that the meter counts")

    limit = None if cell.arm is None else flops_limit(cell)
    if limit is None:
        steps = cell.benchmark.teacher.updates
    else:
        steps = cycle * cycles_bought(limit, setup_flops, cycle_flops)
    cycles = steps / cycle  # a teacher's updates need not be whole cycles
    rows = {}
    for role in sorted({*setup_rows, *run.meter.rows}):
        if not role.endswith(".backward"):
            in_training = cycles * world * run.meter.rows.get(role, 0)
            rows[role] = int(setup_rows.get(role, 0) + in_training)
    plan = Plan(
        steps=steps,
        limit_flops=limit,
        flops=int(setup_flops + cycles * cycle_flops),
        setup_flops=setup_flops,
        start=spent,
        calls_per_cycle=dict(sorted(run.meter.calls.items())),
        rows=rows,
        updates={name: int(p.updates * cycles) for name, p in run.task.players.items()},
        images=int(steps * run.needs.batch),
    )
    return plan, made


def flops_limit(cell: Cell) -> float:
    """FLOPs that a student's cell may spend; from scratch those of teacher plus distillation."""
    assert cell.arm is not None
    limit = cell.budget
    if cell.arm.attribute("group") == "from_scratch":
        teacher = cell.teacher.result()
        assert teacher is not None
        limit += teacher["cost"]["flops"]
    return limit


def cycles_bought(limit: float, setup_flops: float, cycle_flops: int) -> int:
    """Whole cycles that are left of `limit` after set-up; OverBudget where there is none."""
    cycles = int((limit - setup_flops) // cycle_flops)
    if cycles < 1:
        raise OverBudget(
            f"one cycle costs {cycle_flops:.3g} FLOPs after {setup_flops:.3g} of set-up and start, "
            f"budget {limit:.3g}"
        )
    return cycles
