"""docs/methods: prose from the README alone, numbers from records alone.

What is missing or stale is said.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from distillbench.cli import publish
from distillbench.cli.render import render_pages
from distillbench.conformance import anatomies
from eval.report import curves, method_pages
from eval.report.curves import POINTS
from eval.report.method_pages import Source, parse
from tests.conftest import light_children
from tests.test_costs import COST, built, record

ROOT = Path(__file__).parents[1]
METHODS = sorted(p.parent.name for p in (ROOT / "methods").glob("*/method.py"))
README = """# A

Author, *Title*, arXiv 1.

The idea in
two lines.

A second paragraph with [a file](method.py) and [a table](../../results/table2.md).

| equation | function |
|---|---|
| Eq. 1 | `methods/a/method.py:f` |

Signs differ.

## Algorithm

```
## no heading
step theta
```

## Two arms

- `a`.

## Deviations from the paper

| ours | paper | why |
|---|---|---|
| 1 | 2 | 3 |

## Where it fails here

On x.

## Cost

One call.
"""
ABOUT = {"title": "A", "paper": "arXiv 1", "fidelity": "paper text", "adaptation": False}
TRIAL = {"metric": "fid", "share": 0.25, "seeds": 5, "margin": None, "nfe": None, "threshold": None}
CLAIMS = {
    "reported": [
        {
            "metric": "fid",
            "value": 1.5,
            "nfe": 1,
            "setting": "CIFAR",
            "where": "Table 1",
            "arm": "a",
        }
    ],
    "claims": [
        {
            "id": "A-1",
            "claim": "it is better",
            "where": "Table 2",
            "kind": "comparative",
            "arms": ["a", "a@b"],
            "direction": "lower",
            "trials": {"b": TRIAL, "b-small": TRIAL | {"metric": "recall"}},
            "experiment": None,
            "untestable": None,
            "primary": True,
        },
        {
            "id": "A-2",
            "claim": "it is stable",
            "where": "Figure 3",
            "kind": "mechanism",
            "arms": ["norm"],
            "direction": "higher",
            "trials": {"b": TRIAL | {"metric": None}},
            "experiment": "norms",
            "untestable": None,
            "primary": False,
        },
        {
            "id": "A-3",
            "claim": "it is large",
            "where": "Table 4",
            "kind": "absolute",
            "arms": [],
            "direction": "lower",
            "trials": {},
            "experiment": None,
            "untestable": "no such data",
            "primary": False,
        },
    ],
}
ROW = {
    "table": "table2",
    "benchmark": "digits",
    "method": "a",
    "variant": None,
    "nfe": 1,
    "headline": True,
    "seeds": 3,
    "status": "done",
    "fid_mean": 0.4321,
    "fid_sd": 0.01,
    "recall_mean": 0.5,
}


def source(readme: str = README, **more: object) -> Source:
    return Source("a", ABOUT | more, readme, CLAIMS, ["test_a.py"], built(COST))


def test_a_readme_comes_apart_at_its_headings():
    found = parse("a", README)
    assert found.paper == "Author, *Title*, arXiv 1." and found.idea.startswith(
        "The idea in\ntwo lines."
    )
    assert (
        "[a file](../../methods/a/method.py)" in found.idea
        and "[a table](../../results/table2.md)" in found.idea
    )
    assert found.equations.startswith("| equation |") and found.equations.endswith("Signs differ.")
    assert [section.title for section in found.sections] == [
        "Algorithm",
        "Two arms",
        "Deviations from the paper",
        "Where it fails here",
        "Cost",
    ]
    assert "## no heading" in found.under("Algorithm")[0].text  # inside a fence it is none


def test_every_line_of_the_readme_is_on_the_page_once_and_every_number_is_from_a_record():
    from eval.report.costs import cost_rows

    known = cost_rows([record()], {("b", "a"): built(COST)})
    page = method_pages.page(
        source(), [ROW, ROW | {"method": "other", "fid_mean": 0.9999}], known, []
    )
    for line in (
        "two lines.",
        "step theta",
        "Signs differ.",
        "- `a`.",
        "| 1 | 2 | 3 |",
        "On x.",
        "One call.",
    ):
        assert page.count(line) == 1, line
    assert "0.432 ± 0.010" in page and "0.9999" not in page and "1.000 of the minimum" in page
    assert (
        "| FID " in page and "1.5" in page and "[`tests/test_a.py`](../../tests/test_a.py)" in page
    )
    claims = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in page.splitlines()
        if line.startswith("| [A-")
    ]
    link = "](../../results/audit.md)"
    assert claims == [
        [
            "[A-1" + link,
            "it is better",
            "Table 2",
            "comparative",
            "`a`, `a@b`: fid, lower is better, on b; "
            "`a`, `a@b`: recall, lower is better, on b-small",
        ],
        [
            "[A-2" + link,
            "it is stable",
            "Figure 3",
            "mechanism",
            "`norm`: norms, higher is better, on b",
        ],
        ["[A-3" + link, "it is large", "Table 4", "absolute", "not here: no such data"],
    ]
    assert "No training curve is published" in page


WITHOUT = {  # planted: what a README lacks -> what the page says
    "no section ‘Algorithm’": README.replace("## Algorithm", "## Another"),
    "no section ‘Deviations’": README.replace("## Deviations", "## Otherwise"),
    "no table of equations": README[: README.index("| equation")]
    + README[README.index("## Algorithm") :],
}


@pytest.mark.parametrize("words", WITHOUT)
def test_what_is_missing_is_said(words: str):
    assert words not in method_pages.page(source(), [], [], [])
    assert words in method_pages.page(source(WITHOUT[words]), [], [], [])


def test_the_index_says_who_has_no_algorithm_box():
    assert "| no " not in method_pages.index([source()], [ROW], [])
    assert "| no " in method_pages.index([source(WITHOUT["no section ‘Algorithm’"])], [ROW], [])


def test_an_empty_readme_and_a_method_that_cannot_be_built_have_a_page():
    broken = Source(
        "a",
        ABOUT | {"adaptation": True},
        "",
        {"reported": [], "claims": []},
        [],
        {"error": "ImportError: x"},
    )
    page = method_pages.page(broken, [], [], [])
    for words in (
        "no paper",
        "no idea",
        "no table of equations",
        "ImportError: x",
        "No record of this method",
        "none of its own",
        "adaptation",
    ):
        assert words in page, words
    assert "–" in method_pages.index([broken], [], [])


def test_a_curve_is_thinned_and_steps_logged_twice_count_once():
    lines = [{"start": 0, "steps": 400, "time": 1.5}]
    lines += [
        {"step": i, "loss": float(i), **({"late": 2.0} if i >= 200 else {})}
        for i in range(0, 400, 2)
    ]
    # steps 98.. come again
    again = [
        *lines[:100],
        {"checkpoint": 100},
        {"start": 100, "steps": 400, "time": 9.0},
        *lines[50:],
    ]
    found = curves.thinned(again)
    assert found == curves.thinned(lines) and len(found["at"]) == POINTS == 50
    # mean of steps 0, 2, 4, 6
    assert found["scalars"]["loss"][0] == 3.0 and found["at"][0] == pytest.approx(3 / 400)
    assert (
        found["scalars"]["late"][:25] == [None] * 25 and found["scalars"]["late"][25:] == [2.0] * 25
    )
    assert curves.thinned([{"start": 0, "steps": 4}]) is None and curves.thinned([]) is None


def test_the_lowest_seed_is_published_and_drawn_to_the_same_bytes(tmp_path: Path):
    for seed in (1, 0, 2):
        cell = tmp_path / f"cell{seed}"
        cell.mkdir()
        lines = [
            {"start": 0, "steps": 10},
            *({"step": i, "loss": 1.0 + seed + i} for i in range(10)),
        ]
        # unfinished
        (cell / "train.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 1'
        )
        curves.publish_curve(
            tmp_path / "records", cell, {"benchmark": "b", "seed": seed, "key": f"k{seed}"}, "a@v"
        )
    found = curves.read_curves(tmp_path / "records")
    assert (
        list(found) == [("b", "a@v")]
        and found["b", "a@v"]["seed"] == 0
        and found["b", "a@v"]["scalars"]["loss"][0] == 1.0
    )
    png = curves.picture(found["b", "a@v"])
    assert png == curves.picture(found["b", "a@v"]) and png[:4] == b"\x89PNG"
    lines, files = method_pages.pictures("a@v", {"table2": found})
    assert files == {"a@v.png": png} and "seed 0" in lines[2]
    assert method_pages.pictures("a", {"table2": found}) == ([], {})
    (tmp_path / "records/curves/b/a@v.json").write_text("{")
    with pytest.raises(ValueError, match=r"a@v\.json: not valid JSON"):
        curves.read_curves(tmp_path / "records")


@pytest.mark.parametrize("name", [*METHODS, "index"])
def test_links_of_the_published_pages_lead_somewhere(name: str):
    page = ROOT / f"docs/methods/{name}.md"
    found = re.findall(r"\]\((?!https?://|#)([^)\s]+)\)", page.read_text())
    assert (
        found
        and [target for target in found if not (page.parent / target.partition("#")[0]).exists()]
        == []
    )


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with the published records, in which methods are built once."""
    for name in ("results", "workflows", "methods", "docs", "tests"):
        shutil.copytree(
            ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("runs", "__pycache__")
        )
    shutil.copyfile(ROOT / "distillbench.yaml", tmp_path / "distillbench.yaml")
    monkeypatch.chdir(tmp_path)
    light_children(monkeypatch)
    monkeypatch.setattr(anatomies, "anatomies", cache(anatomies.anatomies))
    return tmp_path


def cache(original: Callable) -> Callable:
    """`anatomies`, asked of the methods once."""
    known: dict = {}

    def cached(wanted: list) -> dict:
        known.update(original([pair for pair in wanted if pair not in known]))
        return {pair: known[pair] for pair in wanted}

    return cached


def test_the_published_pages_are_current(copy: Path):
    assert render_pages(check=True) == []


def test_a_stale_page_is_noticed(copy: Path):
    """Of three methods, so that a rendering takes a third of the time."""
    for name in {*METHODS} - {"add", "dmd", "sid"}:
        shutil.rmtree(copy / f"methods/{name}")
        (copy / f"docs/methods/{name}.md").unlink()
    assert "index.md" in render_pages(check=False)
    assert render_pages(check=True) == []
    readme = copy / "methods/dmd/README.md"
    text = readme.read_text()
    readme.write_text(text.replace("moves its samples along", "moves its samples against"))
    assert render_pages(check=True) == ["dmd.md"]
    with pytest.raises(typer.Exit) as ended:
        publish.pages(check=True)
    assert ended.value.exit_code == 1
    assert render_pages(check=False) == ["dmd.md"] and render_pages(check=True) == []
    page = copy / "docs/methods/dmd.md"
    assert "moves its samples against" in page.read_text()
    readme.write_text(readme.read_text().replace("## Algorithm", "## Something"))
    file = copy / "results/records/table2/digits/sid/seed0/metrics.json"
    found = json.loads(file.read_text())
    found["rows"][0]["fid"] += 0.5
    file.write_text(json.dumps(found))
    shutil.rmtree(copy / "methods/add")
    changed = ["dmd.md", "sid.md", "index.md", "add.md (of no method: delete it)"]
    assert render_pages(check=False) == changed
    assert "no section ‘Algorithm’" in page.read_text()
