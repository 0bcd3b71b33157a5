"""Arms with a share of the budget, and arms that start from the student of another."""

from __future__ import annotations

import json

import pytest
import torch

from distillbench import config
from distillbench.cells import train
from distillbench.cells.cell import Cell
from distillbench.cells.checkpoint import read_tensors
from distillbench.cells.disk import write_json
from distillbench.cells.progress import reporter
from distillbench.cells.work import train_cells
from distillbench.errors import UserError
from distillbench.registry import folders
from distillbench.tables import contents
from tests.conftest import Checkout


def cell(name: str, seed: int = 0) -> Cell:
    return Cell(config.benchmark("tiny"), folders.arm(name), seed)


def trained(one: Cell) -> dict:
    for other in (*one.needed, one):
        with other.locked():
            if other.result() is None:
                train.run_cell(other, reporter(other.label))
    record = one.result()
    assert record is not None
    return record


def edit(checkout: Checkout, method: str, old: str, new: str) -> None:
    path = checkout.folder / "methods" / method / "config.yaml"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))


def test_names_of_shares(checkout: Checkout):
    arm = folders.arm("meanflow@x0.25")
    assert (arm.name, arm.variant, arm.share) == ("meanflow@x0.25", None, 0.25)
    arm = folders.arm("meanflow@scratch@x4")
    assert (arm.name, arm.variant, arm.share) == ("meanflow@scratch@x4", "scratch", 4.0)
    assert folders.arm("meanflow@x1").name == "meanflow"
    for name, words in (
        ("meanflow@x0", "above 0"),
        ("meanflow@x0.5@scratch", "unknown variant"),
        ("meanflow@x", "unknown variant"),
        ("meanflow@x0.12345678", "decimal places"),
    ):
        with pytest.raises(UserError, match=words):
            folders.arm(name)
    edit(checkout, "meanflow", "  scratch:", "  x2:")
    with pytest.raises(UserError, match=r"variant 'x2'.*reserved"):
        folders.arm("meanflow")


def test_a_share_is_another_cell_with_that_budget(checkout: Checkout):
    whole, half, same = cell("meanflow"), cell("meanflow@x0.5"), cell("meanflow@x1.0")
    assert half.key != whole.key == same.key and half.teacher.key == whole.teacher.key
    records = [trained(one) for one in (whole, half)]
    assert [r["cost"]["limit_flops"] for r in records] == [1.5e9, 0.75e9]
    assert all(
        0.8 * r["cost"]["limit_flops"] < r["cost"]["flops"] <= r["cost"]["limit_flops"]
        for r in records
    )
    assert (
        records[1]["budget_share"] == 0.5
        and "budget_share" not in records[0]
        and records[1]["variant"] == "x0.5"
    )
    assert [r["division"] for r in records] == ["closed", "open"]
    assert whole.folder != half.folder


def test_what_a_start_costs_is_part_of_the_budget(checkout: Checkout):
    one = cell("fsf_dmd")
    start = one.start
    assert (
        start is not None
        and start.arm_name == "meanflow@x0.7"
        and one.needed == [one.teacher, start]
    )
    record, before = trained(one), trained(start)
    assert record["start"] == "meanflow@x0.7" and record["status"] == "done"
    assert (
        record["cost"]["setup_flops"] == before["cost"]["flops"] < record["cost"]["flops"] <= 1.5e9
    )
    alone = cell("fsf_dmd@from-flow-matching")
    assert alone.start is None and "start" not in alone.recipe
    assert trained(alone)["cost"]["steps"] > 2 * record["cost"]["steps"]  # it has the whole budget
    # and so has its start as large a part
    for share, expected in (
        (0.5, 0.35),
        (0.75, 0.525),
        (0.1, 0.07),
        (3, 2.1),
    ):
        part = cell(f"fsf_dmd@x{share:g}").start
        assert part is not None and part.arm_name == f"meanflow@x{expected:g}"
        assert part.key == cell(part.arm_name).key  # in floating point 0.7 x 0.75 is not 0.525
    assert record["cost"]["start"] == {k: before["cost"][k] for k in ("flops", "seconds")}
    assert one.own_budget == pytest.approx(0.3 * one.budget)


def test_it_starts_from_the_averaged_student(checkout: Checkout):
    one = cell("fsf_dmd")
    trained(one)
    assert one.start is not None
    weights, _ = read_tensors(one.start.folder / "student.safetensors")
    net = train.build(one).task.players["student"].networks[0]
    assert all(torch.equal(v, weights[k]) for k, v in net.state_dict().items())
    teacher, _ = read_tensors(one.teacher.folder / "teacher.safetensors")
    # Planted: else the line above could not fail
    assert not torch.equal(weights["enter.weight"], teacher["enter.weight"])


def test_another_start_is_another_cell(checkout: Checkout):
    key = cell("fsf_dmd").key
    edit(checkout, "fsf_dmd", "start: meanflow@x0.7", "start: meanflow@x0.6")
    assert cell("fsf_dmd").key != key
    edit(checkout, "fsf_dmd", "start: meanflow@x0.6", "start: meanflow@x0.7")
    assert cell("fsf_dmd").key == key
    edit(checkout, "meanflow", "time_std: 1.8", "time_std: 1.7")
    assert cell("fsf_dmd").key != key


def test_a_failed_start_refuses(checkout: Checkout):
    one = cell("fsf_dmd")
    trained(one.teacher)
    assert one.start is not None
    one.start.folder.mkdir(parents=True)
    write_json(
        one.start.record, {"status": "diverged", "reason": "loss is nan", "cost": {"flops": 1}}
    )
    record = trained(one)
    assert (
        record["status"] == "refused"
        and record["reason"] == "its start meanflow@x0.7 ended as diverged: loss is nan"
    )


def test_from_scratch_needs_a_start_from_scratch(checkout: Checkout):
    edit(checkout, "fsf_dmd", "  heavy:", "  heavy:\n    group: from_scratch")
    edit(
        checkout,
        "fsf_dmd",
        "config: {matching: 0.3}",
        "config: {matching: 0.3, init: start, velocity: data, real: self}",
    )
    record = trained(cell("fsf_dmd@heavy"))
    assert record["status"] == "failed" and "with a start of group distillation" in record["reason"]


def test_a_budget_that_the_start_has_spent(checkout: Checkout):
    edit(checkout, "fsf_dmd", "start: meanflow@x0.7", "start: meanflow@x1")
    record = trained(cell("fsf_dmd"))
    assert record["status"] == "over_budget" and "set-up and start" in record["reason"]


def test_starts_that_do_not_exist_or_form_a_chain(checkout: Checkout):
    edit(checkout, "fsf_dmd", "start: meanflow@x0.7", "start: meanflw")
    with pytest.raises(UserError, match=r"config.yaml: key 'start': unknown method 'meanflw'"):
        _ = cell("fsf_dmd").key
    for before, after in (("meanflw", "fsf_dmd@unrolled"), ("fsf_dmd@unrolled", "fsf_dmd")):
        edit(checkout, "fsf_dmd", f"start: {before}", f"start: {after}")
        with pytest.raises(
            UserError, match=r"config.yaml: key 'start': fsf_dmd.* starts from another arm itself"
        ):
            _ = cell("fsf_dmd").key


def test_train_trains_the_start_first(checkout: Checkout, capfd: pytest.CaptureFixture):
    train_cells([cell("fsf_dmd", 1)])
    done = [
        line.partition(": done")[0]
        for line in capfd.readouterr().err.splitlines()
        if ": done" in line
    ]
    assert done == ["tiny/teacher seed 1", "tiny/meanflow@x0.7 seed 1", "tiny/fsf_dmd seed 1"]


def test_a_table_shows_what_its_arms_start_from(checkout: Checkout):
    path = checkout.write(
        "workflows/tables/one.yaml",
        "{name: one, title: one, benchmarks: [tiny], methods: [fsf_dmd], seeds: [0]}\n",
    )
    assert [a.name for a in contents.arms(config.table("one"))] == ["fsf_dmd", "meanflow@x0.7"]
    path.write_text(
        "{name: one, title: one, benchmarks: [tiny], methods: [meanflow], "
        "variants: [meanflow@x0.7, fsf_dmd], seeds: [0]}\n"
    )
    assert [a.name for a in contents.arms(config.table("one"))] == [
        "meanflow",
        "meanflow@x0.7",
        "fsf_dmd",
    ]
    done = checkout.snakemake("results/one.md")
    assert done.returncode == 0, done.stderr
    rows = json.loads((checkout.folder / "results/one.json").read_text())["rows"]
    assert {(r["method"], r["variant"]) for r in rows if r["group"] == "distillation"} == {
        ("meanflow", None),
        ("meanflow", "x0.7"),
        ("fsf_dmd", None),
    }
    stamps = [line for line in done.stderr.splitlines() if "train " in line and " on tiny" in line]
    order = [
        next(i for i, line in enumerate(stamps) if f"train {arm} " in line)
        for arm in ("meanflow@x0.7", "fsf_dmd")
    ]
    assert order == sorted(order)
