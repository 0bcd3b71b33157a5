"""Table 1: counts against the meter's, the minimum by hand, shares of the budget.

The page follows from its records alone.
"""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from distillbench.conformance.anatomies import anatomies
from distillbench.conformance.anatomy import anatomy
from eval.report import costs, gpu
from eval.report.records import Record
from tests import commands
from tests.conftest import Checkout

ROOT = Path(__file__).parents[1]
F = {"forward": 100, "inputs": 60, "weights": 190, "both": 200, "penalty": 400}
HALF = {"forward": 50, "inputs": 30, "weights": 95, "both": 100, "penalty": 200}
HEAD = {"forward": 10, "inputs": 10, "weights": 10, "both": 20, "penalty": 40}


def network(role: str, flops: dict[str, int] = F, kind: str = "velocity", params: int = 7) -> dict:
    return {
        "role": role,
        "kind": kind,
        "params": params,
        "flops": flops,
        "blocks": [HALF, F] if kind == "velocity" else None,
    }


def built(cost: list[dict] | None, **needs: object) -> dict:
    """What `anatomy` says of a method with a critic, which has a head."""
    nets = [network("student"), network("critic"), network("critic.1", HEAD, "VectorHead", 2)]
    default = {"rows": 1, "calls": 1, "gradient": "none", "blocks": None}
    noise = {
        "batch": 8,
        "nfe": [1],
        "headline_nfe": 1,
        "data": False,
        "teacher": True,
        "pairs": None,
        "features": None,
        "cycle": 2,
    }
    return {
        "needs": noise | needs,
        "players": {"student": nets[:1], "critic": nets[1:]},
        "networks": {n["role"]: n for n in [*nets, network("teacher")]},
        "cost": cost and [default | e for e in cost],
        "start": None,
    }


COST = [  # a cycle: one update of the student, two of the critic
    {"role": "student", "gradient": "weights"},
    {"role": "student"},
    {"role": "teacher"},
    {"role": "critic", "gradient": "inputs", "blocks": 1},
    {"role": "critic", "calls": 2, "rows": 2, "gradient": "weights"},
    {"role": "critic.1", "gradient": "inputs"},
    {"role": "critic.1", "calls": 2, "rows": 4, "gradient": "both"},
]
# 8 rows of each: 290 + 100 + 100 + (50 + 30) + 2 (100 + 190) + 20 + 4 (10 + 20)
MINIMUM = 8 * (290 + 100 + 100 + 80 + 580 + 20 + 120)


def record(
    cycles: int = 5,
    setup_rows: int = 0,
    setup_flops: int = 0,
    flops: float = MINIMUM,
    **more: object,
) -> Record:
    """A run of `cycles` cycles of COST, with batches of 8."""
    rows = {"student": 16, "teacher": 8, "critic": 24, "critic.1": 40}
    calls = {
        "student": 2,
        "student.backward": 1,
        "teacher": 1,
        "critic": 3,
        "critic.1": 3,
        "critic.backward": 2,
    }
    cost = {
        "steps": 2 * cycles,
        "images": 16 * cycles,
        "limit_flops": 1e6,
        "flops": flops * cycles + setup_flops,
        "setup_flops": setup_flops,
        "calls_per_cycle": calls,
        "rows": {r: n * cycles + (setup_rows if r == "teacher" else 0) for r, n in rows.items()},
        "updates": {"student": cycles, "critic": 2 * cycles},
        "seconds": 10.0,
        "peak_memory_mb": 100,
    }
    result = {
        "benchmark": "b",
        "method": "a",
        "variant": None,
        "seed": 0,
        "status": "done",
        "reason": None,
        "group": "distillation",
        "title": "A",
        "fidelity": "paper text",
        "adaptation": False,
        "params": 7,
        "nfe": [1],
        "headline_nfe": 1,
        "cost": cost,
        "provenance": {"hardware": "machine", "threads": 1},
    }
    return Record(result | more, {"rows": [{"nfe": 1, "fid": 0.5}]})


def test_the_minimum_by_hand():
    assert costs.minimum(record(), built(COST)) == MINIMUM
    (row,) = costs.cost_rows([record()], {("b", "a"): built(COST)})
    assert (
        row["ratio"] == pytest.approx(1)
        and row["disagreements"] == []
        and row["params_trained"] == 7 + 7 + 2
    )
    assert (
        row["calls"]["critic"] == 3 and row["rows"]["critic"] == 24 and row["seconds_update"] == 2.0
    )
    (more,) = costs.cost_rows([record(flops=1.25 * MINIMUM)], {("b", "a"): built(COST)})
    assert more["ratio"] == pytest.approx(1.25)  # what an implementation computes twice shows


def test_set_up_is_no_part_of_an_update():
    pairs = {"count": 50, "heun_steps": 8, "batch": 8}
    given, method = record(setup_rows=800, setup_flops=10**6), built(COST, pairs=pairs)
    assert costs.disagreements(given, method) == [] and costs.minimum(given, method) == MINIMUM
    # Planted
    assert costs.disagreements(given, built(COST)) == [
        "teacher: declared 1 calls of 1 batches in a cycle, metered 1 of 21"
    ]


@pytest.mark.parametrize("i", range(len(COST)))
@pytest.mark.parametrize("key", ["calls", "rows"])
def test_a_wrong_count_is_noticed(i: int, key: str):
    wrong = copy.deepcopy(built(COST))
    wrong["cost"][i][key] += 1
    (found,) = costs.disagreements(record(), wrong)
    assert found.startswith(f"{COST[i]['role']}: declared ")
    rows = costs.cost_rows([record()], {("b", "a"): wrong})
    assert f"**Counts that differ from the declared ones:** A: {found}" in costs.markdown(
        "T", rows, [], ("s", "s")
    )


def test_an_evaluation_that_nobody_declared_is_noticed():
    method = built([e for e in COST if e["role"] != "teacher"])
    assert costs.disagreements(record(), method) == [
        "teacher: declared 0 calls of 0 batches in a cycle, metered 1 of 1"
    ]


def test_further_networks_of_a_player_follow_its_first():
    method = built([{"role": "critic"}])
    assert [e["role"] for e in costs.declared(method, ["critic.1", "critic.2"])["critic.2"]] == [
        "critic"
    ]
    assert "student.tangent" not in costs.declared(method, ["student.tangent"])


def test_rows_left_open_are_the_metered_ones():
    cost = [{"role": "student", "calls": 2, "rows": None}, *COST[2:]]
    assert costs.disagreements(record(), built(cost)) == []
    assert costs.minimum(record(), built(cost)) == MINIMUM - 8 * 190


def test_no_declared_cost_and_no_known_flops_are_said():
    unknown = built(COST)
    unknown["networks"]["critic.1"]["flops"] = None
    for method in (built(None), unknown):
        rows = costs.cost_rows([record()], {("b", "a"): method})
        page = costs.markdown("T", rows, [], ("s", "s"))
        assert rows[0]["flops_minimum"] is None and "not known in closed form: A." in page


def test_failed_arms_and_methods_that_cannot_be_built_keep_their_rows():
    failed = record(status="failed", reason="KeyError: 'x'", method="f", title="F", cost={})
    rows = costs.cost_rows(
        [record(), failed], {("b", "a"): {"error": "ImportError: y"}, ("b", "f"): built(COST)}
    )
    page = costs.markdown("T", rows, [], ("s", "s"))
    assert "KeyError: 'x'" in page and "ImportError: y" in page and "1,2" not in page


def test_shares_of_the_budget_stand_beside_each_other():
    parts = [
        record(variant="x0.25", budget_share=0.25),
        record(variant="scratch@x4", budget_share=4.0),
        record(),
        record(seed=1),
        record(variant="scratch"),
    ]
    parts[3].metrics["rows"][0]["fid"] = 0.7
    found = {(r["arm"], r["share"]): r for r in costs.quality_rows(parts)}
    assert set(found) == {("a", 0.25), ("a", 1.0), ("a@scratch", 4.0), ("a@scratch", 1.0)}
    assert found["a", 1.0]["mean"] == pytest.approx(0.6) and found["a", 1.0]["seeds"] == 2
    table = costs._quality_table(list(found.values()))
    lines = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
        for line in table.splitlines()
    }
    assert lines["A"] == ["0.500 (10 s, n=1)", "0.600 ± 0.141 (10 s, n=2)", "—"]
    assert lines["A (scratch)"] == ["—", "0.500 (10 s, n=1)", "0.500 (10 s, n=1)"]


def test_declared_counts_are_those_of_the_published_records():
    """Of every method of the suite that declares its cost, on every benchmark of Table 2."""
    found = json.loads((ROOT / "results/table1.json").read_text())["rows"]
    assert {r["method"] for r in found} >= {"dmd", "dmd2", "sid", "add", "freeflow", "meanflow"}
    for row in found:
        assert row.get("disagreements", []) == [], row["method"]
        if row.get("ratio"):
            assert row["ratio"] == pytest.approx(1, abs=0.05), row["method"]


def test_an_anatomy_by_hand(checkout: Checkout):
    found = anatomy("tiny-ring", "dmd")  # width 32, depth 1, two coordinates, no classes
    # embedding, enter, block, modulation, leave
    linear = 2 * 16 * 32 + 32 * 32 + 2 * 32 + 32 * 96 + 2 * 32 * 64 + 32 * 64 + 32 * 2
    flops = found["networks"]["student"]["flops"]
    assert flops["forward"] == 2 * linear
    # not through modulations, which see time alone
    assert flops["inputs"] == 2 * (2 * 32 + 2 * 32 * 64 + 32 * 2)
    no_inputs = 2 * 16 * 32 + 2 * 32  # first layers, into which no gradient in the inputs is needed
    assert flops["weights"] == 2 * (2 * linear - no_inputs)
    assert (
        set(found["players"]) == {"student", "critic"}
        and found["needs"]["pairs"]["heun_steps"] == 8
        and found["start"] is None
    )
    assert (
        found["networks"]["teacher"]["flops"] == flops and found["cost"][0]["gradient"] == "weights"
    )


def test_a_method_that_dies_costs_its_own_anatomy(checkout: Checkout):
    for name, line in (("dies", "import os; os._exit(3)"), ("raises", "raise KeyError('x')")):
        shutil.copytree(checkout.folder / "methods/dmd", checkout.folder / f"methods/{name}")
        (checkout.folder / f"methods/{name}/method.py").write_text(line + "\n")
    found = anatomies([("tiny-ring", name) for name in ("dies", "raises", "dmd")])
    assert found["tiny-ring", "dies"] == {"error": "its process ended with code 3"}
    assert (
        found["tiny-ring", "raises"] == {"error": "KeyError: 'x'"}
        and "error" not in found["tiny-ring", "dmd"]
    )


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return commands.run(("distillbench", *words), folder, commands.environment())


def test_the_published_table_is_what_its_records_say_and_an_edit_is_noticed(tmp_path: Path):
    for name in ("results", "workflows", "methods"):
        shutil.copytree(
            ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("runs", "__pycache__")
        )
    (tmp_path / "perf").mkdir()
    for name in ("distillbench.yaml", "perf/gpu.json"):
        shutil.copyfile(ROOT / name, tmp_path / name)
    done = run(tmp_path, "table", "table1", "--check")
    assert done.returncode == 0, done.stdout + done.stderr
    file = tmp_path / "results/records/table2/digits/dmd/seed0/result.json"
    file.write_text(file.read_text().replace('"teacher": 1', '"teacher": 2'))
    done = run(tmp_path, "table", "table1", "--check")
    assert done.returncode == 1 and all(
        f"table1.{suffix}" in done.stdout for suffix in ("md", "json", "csv")
    )
    assert run(tmp_path, "table", "table1").returncode == 0  # planted: a wrong count
    assert (
        "Counts that differ from the declared ones:** DMD: teacher: declared 1"
        in (tmp_path / "results/table1.md").read_text()
    )
    shutil.rmtree(tmp_path / "results/records/table2")
    assert "no published records" in run(tmp_path, "table", "table1").stderr


def test_what_was_measured_on_a_gpu_is_a_section(tmp_path: Path):
    path = tmp_path / "gpu.json"
    assert gpu.section(path) == []
    flow = {
        "method": "flow matching",
        "status": "measured",
        "cycle": 1,
        "tflop_per_cycle": 4.0,
        "ms_per_step": 40.0,
        "ms_per_student_update": 40.0,
        "peak_gib": 8.0,
    }
    dmd = flow | {
        "method": "dmd",
        "cycle": 2,
        "tflop_per_cycle": 20.0,
        "ms_per_step": 100.0,
        "ms_per_student_update": 200.0,
    }
    rows = [
        flow | {"precision": "tf32"},
        dmd | {"precision": "tf32"},
        {"method": "dmd", "precision": "bf16", "status": "fp32 only"},
    ]
    scale = {
        "shape": [4, 32, 32],
        "classes": 1000,
        "batch": 32,
        "network": {"width": 768, "depth": 12, "heads": 12, "patch": 2},
    }
    found = {"environment": {"device": "a GPU", "torch": "2.11"}, "scale": scale, "rows": rows}

    def cells() -> list[str]:
        path.write_text(json.dumps(found))
        line = next(
            line for line in "\n".join(gpu.section(path)).splitlines() if line.startswith("| dmd")
        )
        return [cell.strip() for cell in line.strip("|").split("|")]

    assert cells() == ["dmd", "20.0", "200", "5.00", "8.0", "fp32 only", "–", "–"]
    rows[0]["ms_per_student_update"] = 50.0  # planted: another unit
    assert cells()[3] == "4.00"
