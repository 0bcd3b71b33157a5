"""What a method spends and what it is given: design.md 'The interface' and 'Benchmarks'.

Costs of derivatives are in specs/meanflow_cost_and_jvp.md.
"""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from distillbench import config
from distillbench.cells.build import build, row_flops
from distillbench.cells.cell import Cell
from distillbench.cells.checkpoint import write_tensors
from distillbench.cells.loop import train
from distillbench.cells.sampling import sample
from distillbench.cells.setup import attach, price
from distillbench.cells.steps import batch_of, one_step
from distillbench.data import kinds
from distillbench.errors import OverBudget
from distillbench.meter import Meter
from distillbench.method import Condition, Step
from distillbench.networks.mlp import VelocityMLP
from distillbench.registry import folders
from distillbench.registry.folders import Arm
from distillbench.seeds import Rng
from distillbench.teachers.pairs import make_pairs


def quiet(what: str, done: int, total: int) -> None:
    pass


def cell(arm: str | None, benchmark: str = "tiny", **changes) -> Cell:
    """A cell whose teacher has random weights everywhere (a new network's last layer is zero)."""
    b = config.benchmark(benchmark).model_copy(update=changes)
    made = Cell(b, folders.arm(arm) if arm else None, 0)
    if arm:
        data = kinds.load(b.data)
        network = VelocityMLP(data.shape, data.classes, **b.network.model_dump())
        for p in network.parameters():
            nn.init.normal_(p, std=0.1)
        made.teacher.folder.mkdir(parents=True, exist_ok=True)
        made.teacher.record.write_text('{"status": "done", "cost": {"flops": 1000000000}}')
        made.folder.mkdir(parents=True)
        write_tensors(made.teacher.folder / "teacher.safetensors", network.state_dict())
    return made


def test_the_meter_counts_only_while_it_is_open():
    meter, net = Meter(), nn.Linear(3, 5)
    meter.watch(net, lambda: "net")
    net(torch.randn(4, 3))
    with meter.counting():
        net(torch.randn(4, 3))
    with meter.measured():
        net(torch.randn(7, 3))
    net(torch.randn(4, 3))
    assert meter.calls == {"net": 2} and meter.rows == {"net": 11} and meter.flops == 2 * 7 * 3 * 5


def test_gradients_in_a_leaf_that_a_module_was_given_are_metered():
    """As R1 on images and spectral norms need; torch's counter alone fails there."""
    meter, net = Meter(), nn.utils.parametrizations.spectral_norm(nn.Linear(3, 5))

    def penalty() -> None:
        x = torch.randn(4, 3, requires_grad=True)
        (g,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        torch.autograd.grad(g.square().sum(), list(net.parameters()), allow_unused=True)
        with torch.no_grad():
            net(x * 1)

    with meter.measured():
        penalty()
    assert meter.flops > 3 * 2 * 4 * 3 * 5
    # Planted: its tracker of modules
    with (
        pytest.raises(RuntimeError, match="leaf node"),
        FlopCounterMode(display=False),
    ):
        penalty()


CYCLES = {
    "meanflow": {"student": 1, "student.tangent": 1, "student.backward": 1, "teacher": 1},
    "meanflow@scratch": {"student": 1, "student.tangent": 1, "student.backward": 1},
    "dmd": {"student": 1, "student.backward": 1, "teacher": 1, "critic": 2, "critic.backward": 1},
    "dmd@no-regression": {
        "student": 1,
        "student.backward": 1,
        "teacher": 1,
        "critic": 2,
        "critic.backward": 1,
    },
}


@pytest.mark.parametrize("name", CYCLES)
def test_calls_of_a_cycle(checkout, name):
    run = build(cell(name))
    if run.needs.pairs:
        run.pairs = make_pairs(
            run.task.teacher,
            run.needs.pairs,
            run.data.shape,
            run.data.classes,
            1.0,
            Rng(0, "pairs"),
        )
    assert not run.meter.calls  # nothing is charged outside
    with run.meter.measured():
        for i in range(run.needs.cycle):
            one_step(run, i, run.needs.cycle)
    assert run.meter.calls == CYCLES[name]
    n = run.needs.batch
    if name.startswith("meanflow"):
        assert run.meter.rows["student"] == n == 128
        # the rows with s < t only: 75 % and 25 % (cost file, test 10)
        off = {
            "meanflow": 96,
            "meanflow@scratch": 32,
        }
        assert run.meter.rows["student.tangent"] == off[name]
    else:
        assert run.meter.rows["student"] == n + (run.needs.pairs.batch if run.needs.pairs else 0)
        assert run.meter.rows["critic"] == 2 * n and run.meter.rows["teacher"] == n


def test_guidance_is_charged(checkout):
    run = build(cell("meanflow", guidance=2.0))
    with run.meter.counting():
        one_step(run, 0, 1)
    assert run.meter.calls["teacher"] == 2


# design.md: everything a method asks for is charged
@pytest.mark.parametrize("name", ["meanflow", "dmd"])
def test_the_plan_is_what_the_whole_run_costs(checkout, name):
    made = cell(name)
    plan, prepared = price(made, quiet)
    run = attach(build(made), prepared)
    with FlopCounterMode(display=False) as counter, run.meter.counting():
        if run.needs.pairs:
            again = make_pairs(
                run.task.teacher,
                run.needs.pairs,
                run.data.shape,
                run.data.classes,
                1.0,
                Rng(made.seed, "pairs"),
            )
            assert all(torch.equal(again[k], prepared["pairs"][k]) for k in again)
        train(run, plan, quiet)
    assert plan.flops == pytest.approx(counter.get_total_flops(), rel=0.01)
    # Planted: without set-up
    assert (
        abs(plan.flops - plan.setup_flops - counter.get_total_flops()) > 0.01 * plan.flops
        or not run.needs.pairs
    )
    assert plan.rows == {role: run.meter.rows[role] for role in plan.rows}
    assert plan.updates == {player: run.task.players[player].updates for player in plan.updates}
    cycle = (plan.flops - plan.setup_flops) / plan.steps
    # as many cycles as the budget buys
    assert 0 <= made.benchmark.budget.flops - plan.flops < cycle * run.needs.cycle


def test_a_from_scratch_method_has_the_budget_of_teacher_and_distillation(checkout):
    made = cell("meanflow@scratch")
    plan, _ = price(made, quiet)
    assert (
        plan.limit_flops == made.benchmark.budget.flops + 1e9
        and plan.flops > made.benchmark.budget.flops
    )


def test_a_from_scratch_arm_has_no_teacher(checkout, monkeypatch):
    made = cell("meanflow")
    monkeypatch.setattr(Arm, "attribute", lambda self, name: "from_scratch")
    with pytest.raises(ValueError, match=r"^group: from_scratch"):
        price(made, quiet)


def test_a_budget_below_one_cycle_is_refused(checkout):
    b = config.benchmark("tiny")
    made = cell("dmd", budget=b.budget.model_copy(update={"flops": 1e6}))
    with pytest.raises(OverBudget):
        price(made, quiet)


@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_a_sampler_uses_exactly_its_evaluations(checkout, extra):
    run = build(cell("meanflow"))
    original = run.method.sample
    run.method.sample = lambda noise, cond, nfe, rng: original(noise, cond, nfe + extra, rng)
    if extra:
        with pytest.raises(ValueError, match=f"made {2 + extra} network evaluations at nfe=2"):
            sample(run, 2, 10, quiet)
    else:
        assert sample(run, 2, 10, quiet).shape == (10, 1, 8, 8)


def test_evaluations_of_the_moving_average_count_too(checkout):
    run = build(cell("meanflow"))
    assert run.task.players["student"].averaged() is not run.method.net
    assert sample(run, 4, 10, quiet).dtype == torch.uint8
    run.method.sample = lambda noise, cond, nfe, rng: noise
    with pytest.raises(ValueError, match="made 0 network evaluations"):
        sample(run, 1, 10, quiet)


# design.md: NFE counts every network evaluation, guidance included
def test_a_doubled_batch_is_two_evaluations(
    checkout,
):
    run = build(cell("meanflow"))

    def both(noise, cond, nfe, rng):
        """Guidance with the conditional and the unconditional rows in one call, as is common."""
        two, labels = (
            torch.cat([noise, noise]),
            torch.cat([cond.labels, torch.full_like(cond.labels, 10)]),
        )
        ones = two.new_ones(len(two))
        u, null = run.task.players["student"].averaged()(two, ones, labels, s=0 * ones).chunk(2)
        return noise - (null + 2 * (u - null))

    run.method.sample = both
    with pytest.raises(ValueError, match="network evaluations at nfe=1"):
        sample(run, 1, 10, quiet)


# design.md: data, pairs and labels are withheld unless declared
def test_what_is_not_declared_is_withheld(
    checkout,
):
    def batch(name: str):
        run = build(cell(name))
        if run.needs.pairs:
            run.pairs = make_pairs(
                run.task.teacher,
                run.needs.pairs,
                run.data.shape,
                run.data.classes,
                1.0,
                Rng(0, "pairs"),
            )
        return batch_of(run, Step(0, 1, 0, torch.device("cpu"))), run

    declared, run = batch("meanflow")
    assert declared.x.shape == (128, 1, 8, 8) and declared.pairs is None and run.task.has_teacher
    withheld, _ = batch("dmd")
    assert (
        withheld.x is None
        and withheld.pairs[0].shape == (64, 1, 8, 8)
        and withheld.pairs[2].labels.shape == (64,)
    )
    withheld, _ = batch("dmd@no-regression")
    assert withheld.x is None and withheld.pairs is None
    _, run = batch("meanflow@scratch")
    assert not run.task.has_teacher
    with pytest.raises(ValueError, match=r"task\.teacher without"):
        _ = run.task.teacher
    with pytest.raises(ValueError, match="teacher"):
        run.task.network("teacher")


# Task: "None when the method does not need one"
def test_the_teacher_of_a_mixture_is_withheld_too(
    checkout,
):
    assert not build(cell("meanflow@scratch", "tiny-ring")).task.has_teacher


# design.md: NFE counts guidance
def test_the_teacher_of_a_guided_benchmark_can_be_sampled(
    checkout,
):
    run = build(cell(None, guidance=2.0))
    assert sample(run, run.needs.headline_nfe, 10, quiet).shape == (10, 1, 8, 8)


def test_a_closed_form_teacher_is_charged_as_the_network_it_stands_for(checkout):
    run = build(cell("dmd", "tiny-ring"))
    with run.meter.measured():
        run.task.teacher.velocity(torch.randn(5, 2), torch.rand(5), Condition(None))
    network = row_flops(run.task.players["student"].networks[0])
    # the closed form's own products are next to nothing
    assert 5 * network <= run.meter.flops < 5 * network * 1.05
