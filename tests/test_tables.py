"""Tables are a pure function of the published records."""

from __future__ import annotations

import json
import math
import shutil
import statistics
import subprocess
from pathlib import Path

import pytest
import yaml

from distillbench import config
from distillbench.config import SCHEMAS
from distillbench.errors import UserError
from distillbench.tables import contents
from eval import catalogue
from eval.report import tables
from eval.report.records import Record
from eval.report.rows import build_rows, reported_rows, summarise
from tests import commands

ROOT = Path(__file__).parents[1]
LOCAL = "quick"  # its records are the user's own
RECORDS = (ROOT / "results/records").glob("*/")
PUBLISHED = sorted(p.name for p in RECORDS if p.is_dir() and p.name != LOCAL)


def check(table: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    words = ("distillbench", "table", table, "--check")
    return commands.run(words, folder, commands.environment())


def copy_of_the_published(folder: Path) -> None:
    shutil.copytree(ROOT / "results", folder / "results", ignore=shutil.ignore_patterns("runs"))
    shutil.copytree(ROOT / "workflows", folder / "workflows")
    shutil.copyfile(ROOT / "distillbench.yaml", folder / "distillbench.yaml")


def test_every_table_is_published():
    wanted = [
        p.stem
        for p in (ROOT / "workflows/tables").glob("*.yaml")
        if yaml.safe_load(p.read_text()).get("kind") != "costs" and p.stem != LOCAL
    ]
    assert (
        PUBLISHED
        == sorted(wanted)
        == [
            "audit",
            "audit-again",
            "budgets",
            "gaussians",
            "table2",
            "table3",
        ]
    )


@pytest.mark.parametrize("table", PUBLISHED)
def test_published_tables_are_what_their_records_say(table: str):
    done = check(table)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("suffix", ["md", "csv", "json"])
def test_an_edited_digit_is_noticed(tmp_path: Path, suffix: str):
    copy_of_the_published(tmp_path)
    assert check("table2", tmp_path).returncode == 0
    file = tmp_path / f"results/table2.{suffix}"
    text = file.read_text()
    i = text.index("0.", len(text) // 4) + 2
    file.write_text(text[:i] + str((int(text[i]) + 1) % 10) + text[i + 1 :])
    done = check("table2", tmp_path)
    assert done.returncode == 1 and f"table2.{suffix}" in done.stdout


def test_an_edited_picture_is_noticed(tmp_path: Path):
    copy_of_the_published(tmp_path)
    with open(tmp_path / "results/table2.png", "ab") as f:
        f.write(b"x")
    assert "table2.png" in check("table2", tmp_path).stdout


def test_an_edited_record_is_noticed(tmp_path: Path):
    copy_of_the_published(tmp_path)
    file = next((tmp_path / "results/records/table2").rglob("metrics.json"))
    found = json.loads(file.read_text())
    found["rows"][0]["fid"] += 0.5
    file.write_text(json.dumps(found))
    assert check("table2", tmp_path).returncode == 1


def record(
    arm: str, seed: int, group: str, fids: dict[int, float] | None, fixed=None, more=None, **labels
) -> Record:
    result = {
        "benchmark": "b",
        "method": arm,
        "variant": None,
        "seed": seed,
        "key": f"{arm}{seed}",
        "group": group,
        "title": arm,
        "reported": [],
        "fidelity": None,
        "adaptation": False,
        "division": "closed",
        "status": "done" if fids else "failed",
        "reason": None if fids else "KeyError: 'x'",
        "nfe": list(fids or {}),
        "headline_nfe": min(fids or {0: 0}),
        "params": 10,
        "cost": {"flops": 5.0, "limit_flops": 6.0},
        "provenance": {"commit": "c" * 40, "dirty": False, "hashes": {"data": "d", "ground": "g"}},
        **labels,
    }
    if fids is None:
        return Record(result, None)
    rows = [{"nfe": n, "fid": f, "recall": 0.5, **(more or {})} for n, f in fids.items()]
    metrics = {
        "evaluation": {"key": "e", "samples": 9, "extractor": "x", "extractor_sha256": "0" * 64},
        "rows": rows,
    }
    if fixed is not None:
        metrics["fixed"] = [
            {
                "name": "class_means",
                "fid": fixed,
                **{m: None if m == "noise_distance" else v for m, v in (more or {}).items()},
            }
        ]
    return Record(result, metrics)


def test_rows_against_hand_computed_values():
    given = [
        *(record("teacher", s, "teacher", {1: 9.0, 8: 1.0 + s}, fixed=11.0 + s) for s in range(3)),
        *(record("a", s, "distillation", {1: 2.0 + 2 * s}) for s in range(3)),
        record("c", 0, "distillation", {1: 2.0}),
        record("c", 1, "distillation", None),
        record("c", 2, "distillation", None),
        *(record("x", s, "distillation", None) for s in range(3)),
    ]
    found = {(r["method"], r["nfe"]): r for r in build_rows(given)}
    a = found["a", 1]
    assert a["fid_mean"] == 4 and a["fid_sd"] == 2 and a["seeds"] == 3
    gaps = [(11 + s - (2 + 2 * s)) / 10 for s in range(3)]  # seed k against teacher k
    assert a["gap_closed_mean"] == pytest.approx(statistics.mean(gaps)) and a[
        "gap_closed_sd"
    ] == pytest.approx(statistics.stdev(gaps))
    c = found["c", 1]
    assert c["seeds"] == 1 and c["fid_sd"] is None and c["status"] == "2 of 3 FAILED: KeyError: 'x'"
    x = found["x", None]
    assert x["status"] == "FAILED: KeyError: 'x'" and x["fid_mean"] is None and x["seeds"] == 0
    assert [r["method"] for r in build_rows(given)][:3] == ["class_means", "teacher", "teacher"]


MORE = {
    "fid_cross": 0.25,
    "class_accuracy": 0.875,
    "label_tv": 0.125,
    "diversity": 1.5,
    "c2st": 0.625,
    "noise_distance": 0.375,
}


def page(given: list[Record]) -> dict[str, dict[str, dict[str, str]]]:
    """Heading of a table -> method -> column -> text."""
    text = tables.markdown("T", build_rows(given), given, None, "p.png")
    out: dict[str, dict[str, dict[str, str]]] = {}
    head, heading = None, ""
    for line in text.splitlines():
        if line.startswith("#"):
            heading, head = line.strip("# "), None
        elif line.startswith("|"):
            columns = [c.strip().strip("*") for c in line.strip("|").split("|")]
            head = head or columns
            out.setdefault(heading, {})[columns[0]] = dict(zip(head, columns))
    return out


def test_diagnostics_are_a_second_table():
    given = [
        record(
            "teacher",
            0,
            "teacher",
            {8: 1.0},
            fixed=11.0,
            more=MORE | {"noise_distance": None},
            trajectory=False,
        ),
        record("follows", 0, "distillation", {1: 2.0}, more=MORE, trajectory=True),
        record("matches", 0, "distillation", {1: 2.0}, more=MORE, trajectory=False),
        record("dead", 0, "distillation", None, trajectory=True),
    ]
    found = page(given)
    main, second = found["b: measured here"], found["Diagnostics"]
    assert (
        list(main["follows"]).index("FID, 2nd extractor ↓")
        == list(main["follows"]).index("FID ↓") + 1
    )
    assert main["follows"]["FID, 2nd extractor ↓"] == "0.250" and not set(main["follows"]) & {
        m.column for m in catalogue.METRICS if m.table == "diagnostics"
    }
    shown = {
        "class acc. ↑": "0.875",
        "label TV ↓": "0.125",
        "diversity → 1": "1.500",
        "C2ST → 0.5": "0.625",
    }
    for name in ("teacher", "follows", "matches", "class means"):
        assert {h: second[name][h] for h in shown} == shown
    # only a method that follows the teacher's trajectories is shown beside the
    # teacher's sample of its noise
    assert {
        name: second[name]["same noise"]
        for name in ("teacher", "follows", "matches", "class means")
    } == {"teacher": "–", "follows": "0.375", "matches": "–", "class means": "–"}
    assert "dead" in main and "dead" not in second
    twins = {r["method"]: r for r in build_rows(given)}
    # the twins keep every number
    assert all(twins["matches"][f"{m}_mean"] == value for m, value in MORE.items())


def test_records_from_before_a_score_still_render():
    given = [
        record("teacher", 0, "teacher", {8: 1.0}, fixed=11.0, trajectory=False),
        record("old", 0, "distillation", {1: 2.0}),
        record("new", 0, "distillation", {1: 2.0}, more=MORE, trajectory=True),
    ]
    found = page(given)
    assert (
        found["b: measured here"]["old"]["FID, 2nd extractor ↓"]
        == found["Diagnostics"]["old"]["C2ST → 0.5"]
        == "–"
    )
    assert found["Diagnostics"]["new"]["C2ST → 0.5"] == "0.625"
    before = page(given[:2])
    assert (
        "Diagnostics" not in before
        and "FID, 2nd extractor ↓" not in before["b: measured here"]["old"]
    )


def test_the_second_extractor_is_named():
    given = [record("teacher", 0, "teacher", {8: 1.0}, fixed=11.0, more=MORE)]
    given[0].metrics["evaluation"] |= {
        "cross_extractor": "other",
        "cross_extractor_sha256": "abcdef" * 9,
    }
    text = tables.markdown("T", build_rows(given), given, None, "p.png")
    assert (
        "‘FID, 2nd extractor’ is FID in the features of other (abcdefabcdef)" in text
        and "docs/protocol.md" in text
    )
    assert (ROOT / "results" / "../docs/protocol.md").is_file()


def test_other_weights_than_the_published_are_said():
    given = [record("teacher", 0, "teacher", {8: 1.0}, fixed=11.0)]
    said = "x (000000000000, not the published weight file: its scores compare with nobody else's)"
    assert said not in tables.markdown("T", build_rows(given), given, None, "p.png")
    given[0].metrics["evaluation"]["published_weights"] = False
    assert said in tables.markdown("T", build_rows(given), given, None, "p.png")


def test_row_keys_are_those_of_the_format():
    rows = json.loads((ROOT / "results/table2.json").read_text())["rows"]
    base = {
        "benchmark",
        "group",
        "method",
        "variant",
        "nfe",
        "headline",
        "seeds",
        "status",
        "division",
        "fidelity",
        "budget",
        "reported",
    }
    both = {f"{m.name}_{k}" for m in catalogue.measured("images") for k in ("mean", "sd")}
    for row in rows:
        assert base | both <= set(row)
    measured = [r for r in rows if r["status"] == "done"]
    assert measured and all(math.isfinite(r["fid_mean"]) for r in measured)


def test_reported_rows_carry_the_papers_numbers_and_none_of_ours():
    reported = yaml.safe_load((ROOT / "workflows/tables/reported/imagenet.yaml").read_text())
    rows = reported_rows(reported)
    assert len(rows) == 40 and all(r["fid_mean"] is None and r["seeds"] == 0 for r in rows)
    assert [r["reported"]["fid"] for r in rows if r["method"] == "MeanFlow-XL/2"] == [3.43, 2.20]


def test_schemas_for_editors_are_current():
    for path, model in SCHEMAS.items():
        assert json.loads((ROOT / path).read_text()) == model.model_json_schema(), (
            "run `distillbench schema`"
        )


def test_equal_values_have_no_spread():
    assert summarise([0.9017857] * 5) == (0.901786, 0.0) and summarise([0.9017857]) == (
        0.901786,
        None,
    )
    assert summarise([1.0, 2.0, None]) == (1.5, 0.707107) and summarise([None]) == (None, None)


def test_differences_stand_in_the_page_and_its_twin(tmp_path: Path):
    given = [record("teacher", s, "teacher", {8: 1.0}, fixed=11.0) for s in range(3)]
    given += [
        record(arm, s, "distillation", {1: fid + s / 10})
        for arm, fid in (("a", 1.0), ("b", 2.0))
        for s in range(3)
    ]
    tables.write(
        "t",
        "T",
        given,
        [],
        None,
        [("a", "b")],
        tmp_path,
        lambda path, data: path.write_bytes(data) and None,
    )
    found = json.loads((tmp_path / "t.json").read_text())["differences"]
    assert {r["metric"] for r in found} == {"fid", "recall"} and found[0]["ratio"] == pytest.approx(
        1.1 / 2.1, rel=0.01
    )
    text = (tmp_path / "t.md").read_text()
    assert "## Differences between arms" in text and "| a / b  | FID      | 0.52" in text
    tables.write(
        "t", "T", given, [], None, [], tmp_path, lambda path, data: path.write_bytes(data) and None
    )
    assert "Differences" not in (tmp_path / "t.md").read_text() and "differences" not in json.loads(
        (tmp_path / "t.json").read_text()
    )


def test_a_comparison_with_an_arm_of_no_row_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    table = config.table("table3").model_copy(update={"compare": [("sid", "sid@naiv")]})
    with pytest.raises(
        UserError,
        match=r"table3\.yaml: key 'compare': 'sid@naiv' is no arm .*'sid@naive'",
    ):
        contents.arms(table)
