"""docs/protocol.md says what the data and the published records say."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch

from distillbench import config
from distillbench.data import kinds
from distillbench.data.images import to_bytes
from eval.features.train_digits_extractor import digits_u8
from eval.metrics.evaluate import Against, fixed_rows
from eval.metrics.fixed_rows import class_means
from eval.report import protocol
from eval.report.protocol import (
    CROSS_EXTRACTOR,
    EXTRACTOR,
    KINDS,
    SAMPLES,
    TABLES,
    Digits,
    fill,
    random_half,
)
from tests.test_tables import record

ROOT = protocol.ROOT
PAGE = "".join(f"before {name}\n<!-- {name} -->\nold\n<!-- end -->\n" for name in TABLES)


def cells(name: str) -> dict[str, list[str]]:
    """The first column of a table on the page -> its other columns."""
    text = re.search(
        f"<!-- {name} -->\n(.*?)<!-- end -->", (ROOT / "docs/protocol.md").read_text(), re.S
    ).group(1)
    lines = [
        [c.strip() for c in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    return {first: rest for first, *rest in lines[2:]}


def test_the_split_and_the_extractors_are_those_of_the_benchmark(monkeypatch):
    monkeypatch.chdir(ROOT)
    benchmark, own = config.benchmark("digits"), Digits.split()
    assert (benchmark.extractor, benchmark.sampling.count) == (EXTRACTOR, SAMPLES)
    assert benchmark.cross_extractor in (CROSS_EXTRACTOR, None)
    theirs = kinds.load(benchmark.data)
    for half in ("train", "reference"):
        assert torch.equal(getattr(own, half), to_bytes(getattr(theirs, half)))
        assert torch.equal(getattr(own, f"{half}_labels"), getattr(theirs, f"{half}_labels"))


def test_the_page_shows_what_is_measured():
    """Floor, copy and class means anew, as the page has them; the rest takes minutes."""
    data = Digits.split()
    rows = fixed_rows(
        data, Against.of(data, EXTRACTOR, CROSS_EXTRACTOR), SAMPLES, 0, (class_means,)
    )
    on_page = cells("trivial generators")
    shown = protocol.shown_of(rows)
    for row in rows:
        assert on_page[row["name"].replace("_", " ")] == [protocol._value(row[m], m) for m in shown]
    assert list(on_page)[:3] == ["floor", "copy", "class means"] and len(on_page) == 9
    other = Digits(data.reference, data.reference_labels, data.train, data.train_labels)
    exchanged = fixed_rows(other, Against.of(other, EXTRACTOR, CROSS_EXTRACTOR), SAMPLES, 0, ())
    assert on_page["floor"] != [protocol._value(exchanged[0][m], m) for m in shown]


def test_the_page_is_complete_and_its_links_lead_somewhere():
    text = (ROOT / "docs/protocol.md").read_text()
    for name in TABLES:
        assert len(fill(text, name, "")) < len(text)  # it has a content
    assert all((ROOT / "docs" / link).exists() for link in re.findall(r"\]\(([^)#]+)\)", text))


def test_only_what_stands_between_the_markers_is_replaced():
    assert fill(PAGE, TABLES[1], "new") == PAGE.replace(
        f"<!-- {TABLES[1]} -->\nold", f"<!-- {TABLES[1]} -->\nnew"
    )
    for broken in (
        "",
        PAGE.replace("<!-- end -->", ""),
        PAGE + PAGE,
        PAGE.replace("<!-- end -->\nbefore noise", "before noise"),
    ):
        with pytest.raises(ValueError, match="needs one"):
            for name in TABLES:
                fill(broken, name, "new")


def test_halves_are_halves():
    labels = digits_u8()[1]
    for stratified in (True, False):
        first, again, other = (
            random_half(labels, np.random.default_rng(seed), stratified) for seed in (0, 0, 1)
        )
        assert torch.equal(first, again) and not torch.equal(first, other)
        assert abs(2 * int(first.sum()) - len(labels)) <= 10
        imbalance = (2 * labels[first].bincount() - labels.bincount()).abs().max()
        assert (imbalance <= 1) == stratified


def test_a_page_is_refused_before_it_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(protocol, "scored_generators", lambda: pytest.fail("measured"))
    page = tmp_path / "protocol.md"
    page.write_text("no markers")
    with pytest.raises(ValueError, match="no published records"):
        protocol.update(page, tmp_path / "records")
    with pytest.raises(ValueError, match="needs one '<!-- trivial generators -->'"):
        protocol.update(page, ROOT / "results/records")
    assert page.read_text() == "no markers"


def test_the_same_data_give_the_same_page(tmp_path, monkeypatch):
    generators, halves = protocol.scored_generators, protocol.scored_halves
    monkeypatch.setattr(protocol, "scored_generators", lambda: generators(count=100))
    monkeypatch.setattr(protocol, "scored_halves", lambda: halves(splits=3))
    pages = []
    for name in "ab":
        page = tmp_path / name
        page.write_text(PAGE)
        protocol.update(page, ROOT / "results/records")
        pages.append(page.read_bytes())
        protocol.update(page, ROOT / "results/records")
        assert page.read_bytes() == pages[-1]  # over its own result
    assert (
        pages[0] == pages[1]
        and b"old" not in pages[0]
        and sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]
    )


def test_verdicts_in_units_of_the_floor():
    # mean 1, sd 1; no spread in the others
    column = [{"fid": 1.0 + x, "recall": 0.9, "c2st": 0.5} for x in (-1, 0, 1)]
    halves = [column for _ in KINDS]
    rows = [
        {"name": "good", "fid": 1.4, "recall": 0.9, "c2st": 0.501},
        {"name": "bad", "fid": 8.0, "recall": 0.8, "c2st": 0.51},
        {"name": "too_good", "fid": -6.0, "recall": 0.91, "c2st": 0.2},
    ]
    lines = protocol.verdicts(rows, halves).splitlines()[2:]
    found = [[c.strip() for c in line.strip("|").split("|")] for line in lines]
    assert found == [
        ["good", "0", "0", "1"],
        ["bad", "**7**", "**90**", "**9**"],
        ["too good", "*-7*", "*-9*", "*<-99*"],
    ]


def test_spread_of_training_against_hand_computed_values():
    given = [record("teacher", s, "teacher", {8: 2.0 + s}) for s in range(3)] + [
        record("a", s, "distillation", {1: 4.0}) for s in range(3)
    ]
    given += [record("single", 0, "distillation", {1: 4.0})]
    quarter = [record("a", s, "distillation", {1: 4.0 + s}, variant="x0.25") for s in range(3)]
    other = [record("a", s, "distillation", {1: 4.0 + s}, variant="b") for s in range(3)]
    text = protocol.spread_of_training([quarter + other, given])
    found = {
        line.split("|")[1].strip(): [c.strip() for c in line.strip("|").split("|")[1:]]
        for line in text.splitlines()
        if "|" in line
    }
    assert (
        found["teacher"] == ["", "8", "3", "33", "0"]
        and found["a"] == ["1", "1", "3", "0", "0"]
        and "| a       | 0.25            | 1     | 3       | 20 " in text
        and text.count("| a ") == 2
        and "single" not in found
    )
    assert protocol.spread_of_training([given[-1:]]) == "No arm with several seeds is published."
    assert protocol._percent(-0.1, 0.2) == "–"  # a share of a negative KID says nothing


def test_sampling_error_is_labelled_as_such(tmp_path):
    assert protocol.sampling_error(tmp_path) == "No repeated draws are published."
    file = tmp_path / "digits/dmd/seed1/draws.json"
    file.parent.mkdir(parents=True)
    rows = [{"nfe": 1, "fid": f, "recall": 0.5, "noise_distance": None} for f in (0.9, 1.0, 1.1)]
    file.write_text(json.dumps({"nfe": 1, "draws": 3, "rows": rows}))
    text = protocol.sampling_error(tmp_path)
    assert "sampling error of one checkpoint, not the spread of training" in text.lower()
    assert [c.strip() for c in text.splitlines()[2].strip("|").split("|")] == [
        "dmd",
        "seed1",
        "1",
        "3",
        "10",
        "0",
    ]
