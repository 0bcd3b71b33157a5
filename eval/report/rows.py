"""Rows of a table from published records: mean and sd over seeds, fixed rows, external records, and what all rows share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np

from eval.report.records import Record

IMAGES = (
    "fid",
    "fid_cross",
    "fid_teacher",
    "kid",
    "is",
    "precision",
    "recall",
    "density",
    "coverage",
    "memorisation",
    "gap_closed",
    "class_accuracy",
    "label_tv",
    "diversity",
    "c2st",
    "noise_distance",
)
MIXTURES = (
    "sliced_w2",
    "sliced_w2_floor",
    "modes",
    "modes_total",
    "weight_tv",
    "outside",
    "outside_exact",
)
DERIVED = {"class_error": lambda row: 1 - row["class_accuracy"]}  # what claims may name besides
GROUPS = {
    "reference": "Reference rows",
    "teacher": "Teacher",
    "from_scratch": "Few-step flows from scratch (budget of teacher plus distillation)",
    "distillation": "Distillation",
    "external": "External samples (made elsewhere; budget, data and teacher unknown)",
}
OTHER_PROTOCOL = "evaluated under another protocol: run evaluate again"
OTHER_DATA = "scored against other data: run evaluate again"
Row = dict[str, Any]


def fidelity_words(about: dict[str, Any]) -> str:
    """What a method is faithful to, and whether it is used outside its paper's setting."""
    return ", ".join(
        filter(None, [about["fidelity"], "adaptation" if about["adaptation"] else None])
    )


def summarise(values: Iterable[float | None]) -> tuple[float | None, float | None]:
    """Mean and sample standard deviation; (None, None) without values, sd None for one."""
    known = [v for v in values if v is not None]
    if not known:
        return None, None
    digits = lambda v: float(f"{v:.6g}")
    spread = (
        0.0 if min(known) == max(known) else np.std(known, ddof=1)
    )  # of equal values numpy may say 1e-17
    return digits(np.mean(known)), digits(spread) if len(known) > 1 else None


def build_rows(records: list[Record], external: Iterable[Row] = ()) -> list[Row]:
    """One row per (benchmark, arm, NFE) over seeds, fixed rows first, and per external record, in the order of GROUPS."""
    rows: list[Row] = []
    for benchmark in sorted({r.result["benchmark"] for r in records}):
        own = [r for r in records if r.result["benchmark"] == benchmark]
        teachers = [r for r in own if r.result["group"] == "teacher"]
        anchors = {r.result["seed"]: _anchor(r) for r in teachers}
        rows += _fixed(benchmark, teachers, anchors)
        for group in list(GROUPS)[1:]:
            arms = sorted({r.arm for r in own if r.result["group"] == group})
            for arm in arms:
                rows += _arm_rows([r for r in own if r.arm == arm], anchors)
        shared = protocol(own)[benchmark]
        rows += [
            external_row(e, differs(e, shared), shared["samples"])
            for e in external
            if e["benchmark"] == benchmark
        ]
    return rows


def _anchor(teacher: Record) -> tuple[float, float] | None:
    """(FID of class means, FID of the teacher at many steps): the ends of `gap closed`, per seed."""
    means = [row["fid"] for row in teacher.fixed if row["name"] == "class_means"]
    return (means[0], max(teacher.rows, key=lambda row: row["nfe"])["fid"]) if means else None


def _gap_closed(fid: float | None, anchor: tuple[float, float] | None) -> float | None:
    return None if fid is None or anchor is None else (anchor[0] - fid) / (anchor[0] - anchor[1])


def _metrics(found: list[tuple[Row, tuple[float, float] | None]]) -> Row:
    """<metric>_mean and <metric>_sd over seeds of (metrics row, anchor)."""
    out: Row = {}
    names = MIXTURES if any("sliced_w2" in row for row, _ in found) else IMAGES
    for name in names:
        values = [
            _gap_closed(row.get("fid"), anchor) if name == "gap_closed" else row.get(name)
            for row, anchor in found
        ]
        out[f"{name}_mean"], out[f"{name}_sd"] = summarise(values)
    return out


def _fixed(benchmark: str, teachers: list[Record], anchors: dict[int, Any]) -> list[Row]:
    """Floor and trivial generators, which the teacher cell of every seed carries."""
    out = []
    for name in dict.fromkeys(row["name"] for r in teachers for row in r.fixed):
        found = [
            (row, anchors[r.result["seed"]])
            for r in teachers
            for row in r.fixed
            if row["name"] == name
        ]
        out.append(
            {
                "benchmark": benchmark,
                "group": "reference",
                "method": name,
                "variant": None,
                "title": name.replace("_", " "),
                "nfe": None,
                "headline": False,
                "seeds": len(found),
                "status": "done",
                "division": None,
                "fidelity": None,
                "budget": None,
                "params": None,
                "trajectory": False,
                "reported": None,
            }
            | _metrics(found)
        )
    return out


def _arm_rows(records: list[Record], anchors: dict[int, Any]) -> list[Row]:
    """The rows of one arm, one per NFE; a single row that says why where no seed finished."""
    first, done = records[0].result, [r for r in records if r.metrics is not None]
    base = {
        "benchmark": first["benchmark"],
        "group": first["group"],
        "method": first["method"],
        "variant": first["variant"],
        "title": first["title"] + (f" ({first['variant']})" if first["variant"] else ""),
        "status": _status(records),
        "division": first["division"],
        "trajectory": first.get("trajectory", False),
        "fidelity": fidelity_words(first) or None,
        "budget": summarise(r.result["cost"].get("flops") for r in records)[0],
        "reported": None,
    }
    if not done:
        return [
            base
            | {"nfe": None, "headline": True, "seeds": 0, "params": None}
            | _metrics([({}, None)])
        ]
    out = []
    for nfe in done[0].result["nfe"]:
        found = [
            (row, anchors.get(r.result["seed"]))
            for r in done
            for row in r.rows
            if row["nfe"] == nfe
        ]
        own = {
            "nfe": nfe,
            "headline": nfe == done[0].result["headline_nfe"],
            "seeds": len(found),
            "params": done[0].result["params"],
        }
        own["reported"] = next((p for p in first["reported"] if p["nfe"] == nfe), None)
        if (
            first["group"] == "teacher" and "sliced_w2" in found[0][0]
        ):  # the closed form is sampled, not the network
            own |= {"params": None, "budget": None}
        out.append(base | own | _metrics(found))
    return out


def differs(record: Row, shared: Row) -> str | None:
    """Why the scores of an external record (eval/external.py) do not compare with rows of this `protocol`; None where they do."""
    about = record["evaluation"]
    if about["key"] != shared["evaluation"]:
        return OTHER_PROTOCOL
    data = "reference_sha256" if "reference_sha256" in about else "data"  # of images, of mixtures
    return None if about[data] == shared[data] else OTHER_DATA


def external_row(record: Row, why_not: str | None, count: int) -> Row:
    """The row of an external record beside rows of `count` samples; without numbers where it says why not."""
    status = (
        "done"
        if record["count"] == count
        else f"{record['count']} samples, not {count}: not comparable"
    )
    return {
        "benchmark": record["benchmark"],
        "group": "external",
        "method": record["name"],
        "variant": None,
        "title": record["name"],
        "nfe": None,
        "headline": False,
        "seeds": int(why_not is None),
        "status": why_not or status,
        "division": None,
        "fidelity": None,
        "budget": None,
        "params": None,
        "trajectory": False,
        "reported": None,
        **{key: record[key] for key in ("who", "where", "samples_sha256", "count")},
    } | _metrics([({} if why_not else record["row"], None)])


def _status(records: list[Record]) -> str:
    """'done', or how many seeds ended how, with the first reason."""
    counts = Counter(r.result["status"] for r in records)
    if set(counts) == {"done"}:
        return "done"
    failed = next(r.result for r in records if r.result["status"] != "done")
    share = (
        ""
        if counts[failed["status"]] == len(records)
        else f"{counts[failed['status']]} of {len(records)} "
    )
    return f"{share}{failed['status'].upper().replace('_', ' ')}: {failed['reason']}"


def protocol(records: list[Record]) -> dict[str, Any]:
    """Per benchmark what every row shares, and the hashes to find it again."""
    out: dict[str, Any] = {}
    for benchmark in sorted({r.result["benchmark"] for r in records}):
        own = [r for r in records if r.result["benchmark"] == benchmark]
        evaluations = [r.metrics["evaluation"] for r in own if r.metrics is not None]
        first = evaluations[0] if evaluations else {}
        limits = [
            r.result["cost"].get("limit_flops")
            for r in own
            if r.result["group"] == "distillation" and "budget_share" not in r.result
        ]
        commits = sorted({_commit(r.result["provenance"]) for r in own})
        out[benchmark] = {
            "seeds": sorted({r.result["seed"] for r in own}),
            "budget_flops": max(filter(None, limits), default=None),
            "samples": first.get("samples"),
            "reference": first.get("reference"),
            "reference_sha256": first.get("reference_sha256"),
            "extractor": first.get("extractor"),
            "extractor_sha256": first.get("extractor_sha256"),
            "cross_extractor": first.get("cross_extractor"),
            "cross_extractor_sha256": first.get("cross_extractor_sha256"),
            "evaluation": ", ".join(sorted({e["key"] for e in evaluations})),
            "data": ", ".join(sorted({r.result["provenance"]["hashes"]["data"] for r in own})),
            "ground": ", ".join(sorted({r.result["provenance"]["hashes"]["ground"] for r in own})),
            "commit": ", ".join(commits),
            **({} if first.get("published_weights", True) else {"published_weights": False}),
            "cells": {f"{r.arm} seed {r.result['seed']}": r.result["key"] for r in own},
        }
    return out


def _commit(provenance: dict[str, Any]) -> str:
    commit = (provenance["commit"] or "none")[:12]
    return f"{commit} with uncommitted changes" if provenance["dirty"] else commit


def reported_rows(reported: dict[str, Any] | None) -> list[Row]:
    """The papers' rows in the shape of ours, without a measured value."""
    out: list[Row] = []
    for part in (reported or {}).get("sections", []):
        for r in part["rows"]:
            out.append(
                {
                    "benchmark": part["benchmark"],
                    "group": r["group"],
                    "method": r["method"],
                    "variant": None,
                    "title": r["method"],
                    "nfe": r["nfe"],
                    "headline": False,
                    "seeds": 0,
                    "status": "reported, not run",
                    "division": None,
                    "fidelity": None,
                    "budget": None,
                    "params": None,
                    "trajectory": False,
                    "reported": r,
                }
                | {f"{m}_{k}": None for m in IMAGES for k in ("mean", "sd")}
            )
    return out
