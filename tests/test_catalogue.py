"""The catalogue of metrics: names unique and complete, and one entry is all that a report needs."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from distillbench.cli.evaluate import known_metrics
from eval import catalogue
from eval.catalogue import METRICS, Metric
from eval.metrics.evaluate import SCORES
from eval.metrics.mixtures import evaluate_mixture
from eval.report import effects, method_pages, tables
from eval.report.records import Record
from eval.report.rows import build_rows

PLANTED = Metric(
    "sharpness", "sharp.", "images", "higher", digits=1, page=True, contrast="sharpness"
)


def names(family: catalogue.Family) -> set[str]:
    return {metric.name for metric in catalogue.measured(family)}


def test_names_and_headings_are_unique_and_each_family_has_one_main_metric():
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    assert len({metric.column for metric in METRICS}) == len(METRICS)
    for family in ("images", "mixtures"):
        (main,) = (metric for metric in METRICS if metric.main and metric.family == family)
        assert main is catalogue.main_metric(family) and main.verdict
    for metric in METRICS:
        assert metric.control is None or catalogue.metric(metric.control).family == metric.family


def test_every_score_has_an_entry_and_every_entry_a_score():
    assert names("images") == {*SCORES, "gap_closed"}  # that from a table's own rows
    means = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
    exact = means.repeat(32, 1)
    scored = evaluate_mixture(exact, exact, exact, means, 0.1, torch.tensor([0.5, 0.5]))
    assert names("mixtures") == set(scored)


def test_families_are_told_apart_by_their_rows():
    assert catalogue.family_of({"nfe": 1, "sliced_w2": 0.5}) == "mixtures"
    assert catalogue.family_of({"nfe": 1, "sliced_w2_mean": None}) == "mixtures"
    assert catalogue.family_of({"nfe": 1, "fid": 0.5}) == "images"
    assert catalogue.family_of({}) == "images"


def test_claims_name_only_what_has_a_logarithm():
    assert {"fid", "class_error"} <= set(known_metrics("digits"))
    assert not {"kid", "gap_closed", "sliced_w2"} & set(known_metrics("digits"))
    assert "sliced_w2" in known_metrics("gaussians-ring")
    assert catalogue.metric("class_error").value({"class_accuracy": 0.75}) == 0.25


@pytest.mark.parametrize(
    "metric, mean, sd, words",
    [
        (catalogue.metric("fid"), 1.23456, 0.5, "1.235 ± 0.500"),
        (catalogue.metric("kid"), 0.00123, 0.0001, "1.23 ± 0.10"),
        (catalogue.metric("modes"), 8.0, 0.0, "8.0"),
        (catalogue.metric("modes"), 8.0, None, "8.0"),
        (catalogue.metric("fid"), None, None, "–"),
    ],
)
def test_values_are_printed_with_the_scale_and_digits_of_their_metric(metric, mean, sd, words):
    assert metric.printed(mean, sd) == words


def record(arm: str, seed: int) -> Record:
    method, _, variant = arm.partition("@")
    result = {
        "benchmark": "digits",
        "method": method,
        "variant": variant or None,
        "title": method,
        "group": "distillation",
        "seed": seed,
        "nfe": [1],
        "headline_nfe": 1,
        "status": "done",
        "reason": None,
        "division": "closed",
        "fidelity": "paper text",
        "adaptation": False,
        "params": 1,
        "reported": [],
        "key": f"{arm}-{seed}",
        "cost": {"flops": 1e12, "limit_flops": 1e12},
        "provenance": {"commit": None, "dirty": False, "hashes": {"data": "d", "ground": "g"}},
    }
    evaluation = {
        "key": "e",
        "samples": 10,
        "reference": 10,
        "reference_sha256": "r",
        "extractor": "x",
        "extractor_sha256": "s",
        "cross_extractor": None,
        "cross_extractor_sha256": None,
    }
    value = 2.0 + seed + bool(variant)
    row = {"nfe": 1, "fid": 1.0, "sharpness": value}
    return Record(result, {"evaluation": evaluation, "rows": [row]})


def test_one_entry_puts_a_new_metric_into_tables_pages_and_claims(monkeypatch):
    records = [record(arm, seed) for arm in ("a", "a@b") for seed in (0, 1)]

    def pages() -> str:
        rows = build_rows(records)
        compared = effects.effects(records, [("a", "a@b")])
        table = tables.markdown("T", rows, records, None, "p.png", compared)
        of_method = method_pages._results([row | {"table": "table2"} for row in rows])
        return "\n".join([table, *of_method])

    assert "sharp" not in pages() and "sharpness" not in known_metrics("digits")
    monkeypatch.setattr(catalogue, "METRICS", (*METRICS, PLANTED))
    text = pages()
    assert (
        text.count("| sharp. ↑ ") == 2 and text.count("2.5 ± 0.7") == text.count("3.5 ± 0.7") == 2
    )
    assert "| a / a@b | sharpness |" in text
    assert "sharpness" in known_metrics("digits")
    assert "sharpness" not in known_metrics("gaussians-ring")


def test_an_entry_says_where_it_is_shown(monkeypatch):
    hidden = dataclasses.replace(PLANTED, table="diagnostics", trajectory=True)
    monkeypatch.setattr(catalogue, "METRICS", (*METRICS, hidden))
    records = [record("a", 0)]
    text = tables.markdown("T", build_rows(records), records, None, "p.png")
    main, _, diagnostics = text.partition("### Diagnostics")
    assert "sharp" not in main
    assert "sharp. ↑" in diagnostics and "2.0" not in diagnostics.partition("Mean ±")[0]
