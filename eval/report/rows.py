"""Rows of a table from published records: mean and sd over seeds, fixed rows, external records, and
what all rows of a benchmark share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np

from eval import catalogue
from eval.report.records import Record, by_arm, by_benchmark, by_group
from eval.report.text import significant

GROUPS = {
    "reference": "Reference rows",
    "teacher": "Teacher",
    "from_scratch": "Few-step flows from scratch (budget of teacher plus distillation)",
    "distillation": "Distillation",
    "external": "External samples (made elsewhere; budget, data and teacher unknown)",
}
OTHER_PROTOCOL = "evaluated under another protocol: run evaluate again"
OTHER_DATA = "scored against other data: run evaluate again"
Row = dict[str, Any]  # of a twin of a table: JSON values by column


class Anchor(NamedTuple):
    """FID of class means, and FID of the teacher at many steps: gap closed is 0 and 1 there."""

    class_means: float
    teacher: float


def fidelity_words(about: dict[str, Any]) -> str:
    """What a method is faithful to, and whether it is used outside its paper's setting."""
    words = [about["fidelity"], "adaptation" if about["adaptation"] else None]
    return ", ".join(filter(None, words))


def titled(title: str, variant: str | None) -> str:
    """Title of an arm: of its method, with the variant in brackets."""
    return f"{title} ({variant})" if variant else title


def summarise(values: Iterable[float | None]) -> tuple[float | None, float | None]:
    """Mean and sample standard deviation, with 6 significant digits.

    (None, None) without values, sd None for one; values that are None are left out.
    """
    known = [v for v in values if v is not None]
    if not known:
        return None, None
    mean = significant(float(np.mean(known)))
    if len(known) == 1:
        return mean, None
    if min(known) == max(known):  # numpy may say 1e-17
        return mean, 0.0
    return mean, significant(float(np.std(known, ddof=1)))


def build_rows(records: list[Record], external: Iterable[Row] = ()) -> list[Row]:
    """Rows by benchmark and, within it, in the order of GROUPS.

    One row per (arm, NFE) over seeds, one per fixed row, and one per external record.
    """
    rows: list[Row] = []
    for benchmark, own in by_benchmark(records).items():
        groups = by_group(own)
        teachers = groups.get("teacher", [])
        anchors = {r.seed: _anchor(r) for r in teachers}
        rows += _fixed(benchmark, teachers, anchors)
        for group in GROUPS:
            for members in by_arm(groups.get(group, [])).values():
                rows += _arm_rows(members, anchors)
        shared = _protocol(own)
        for record in external:
            if record["benchmark"] == benchmark:
                why_not = differs(record, shared)
                rows.append(external_row(record, why_not, shared["samples"]))
    return rows


def _without_run(benchmark: str, group: str, name: str, title: str, **known: Any) -> Row:
    """A row of no arm of this suite: every column, those in `known` with a value."""
    row: Row = {
        "benchmark": benchmark,
        "group": group,
        "method": name,
        "variant": None,
        "title": title,
        "nfe": None,
        "headline": False,
        "seeds": 0,
        "status": "done",
        "division": None,
        "fidelity": None,
        "budget": None,
        "params": None,
        "trajectory": False,
        "reported": None,
    }
    return row | known


def _anchor(teacher: Record) -> Anchor | None:
    """Ends of `gap closed` for the seed of a teacher; None without a row of class means."""
    for row in teacher.fixed:
        if row["name"] == "class_means":
            many_steps = max(teacher.rows, key=itemgetter("nfe"))
            return Anchor(row["fid"], many_steps["fid"])
    return None


def _gap_closed(fid: float | None, anchor: Anchor | None) -> float | None:
    if fid is None or anchor is None:
        return None
    return (anchor.class_means - fid) / (anchor.class_means - anchor.teacher)


def _metrics(found: list[tuple[Row, Anchor | None]]) -> Row:
    """<metric>_mean and <metric>_sd over seeds of (row of metrics.json, anchor)."""
    out: Row = {}
    for metric in catalogue.measured(catalogue.family_of(found[0][0])):
        if metric.name == "gap_closed":
            values = [_gap_closed(row.get("fid"), anchor) for row, anchor in found]
        else:
            values = [metric.value(row) for row, _ in found]
        out[f"{metric.name}_mean"], out[f"{metric.name}_sd"] = summarise(values)
    return out


def _fixed(benchmark: str, teachers: list[Record], anchors: dict[int, Anchor | None]) -> list[Row]:
    """Floor and trivial generators, which the teacher cell of every seed carries."""
    by_name: dict[str, list[tuple[Row, Anchor | None]]] = {}
    for teacher in teachers:
        anchor = anchors[teacher.seed]
        for row in teacher.fixed:
            by_name.setdefault(row["name"], []).append((row, anchor))
    out = []
    for name, found in by_name.items():
        title = name.replace("_", " ")
        row = _without_run(benchmark, "reference", name, title, seeds=len(found))
        out.append(row | _metrics(found))
    return out


def _arm_rows(records: list[Record], anchors: dict[int, Anchor | None]) -> list[Row]:
    """Rows of one arm, one per NFE; a single row that says why where no seed finished."""
    first = records[0].result
    done = [r for r in records if r.metrics is not None]
    base: Row = {
        "benchmark": first["benchmark"],
        "group": first["group"],
        "method": first["method"],
        "variant": first["variant"],
        "title": titled(first["title"], first["variant"]),
        "status": _status(records),
        "division": first["division"],
        "trajectory": first.get("trajectory", False),
        "fidelity": fidelity_words(first) or None,
        "budget": summarise(r.result["cost"].get("flops") for r in records)[0],
        "reported": None,
    }
    if not done:
        failed: Row = {"nfe": None, "headline": True, "seeds": 0, "params": None}
        return [base | failed | _metrics([({}, None)])]
    return [_row_at(nfe, base, done, anchors) for nfe in done[0].result["nfe"]]


def _row_at(nfe: int, base: Row, done: list[Record], anchors: dict[int, Anchor | None]) -> Row:
    """One row of an arm: its finished seeds at an NFE."""
    result = done[0].result
    found: list[tuple[Row, Anchor | None]] = []
    for record in done:
        anchor = anchors.get(record.seed)
        found += [(row, anchor) for row in record.rows if row["nfe"] == nfe]
    own: Row = {
        "nfe": nfe,
        "headline": nfe == result["headline_nfe"],
        "seeds": len(found),
        "params": result["params"],
        "reported": next((p for p in result["reported"] if p["nfe"] == nfe), None),
    }
    family = catalogue.family_of(found[0][0])
    if base["group"] == "teacher" and family == "mixtures":
        own |= {"params": None, "budget": None}  # the closed form is sampled, not the network
    return base | own | _metrics(found)


def differs(record: Row, shared: Row) -> str | None:
    """Why the scores of an external record do not compare with rows of this `protocol`, or None."""
    about = record["evaluation"]
    if about["key"] != shared["evaluation"]:
        return OTHER_PROTOCOL
    data = "reference_sha256" if "reference_sha256" in about else "data"  # of images, of mixtures
    return None if about[data] == shared[data] else OTHER_DATA


def external_row(record: Row, why_not: str | None, count: int) -> Row:
    """The row of an external record beside rows of `count` samples.

    why_not: why its numbers do not compare; then it has none.
    """
    status = why_not or "done"
    if why_not is None and record["count"] != count:
        status = f"{record['count']} samples, not {count}: not comparable"
    name = record["name"]
    seeds = int(why_not is None)
    row = _without_run(record["benchmark"], "external", name, name, seeds=seeds, status=status)
    source = {key: record[key] for key in ("who", "where", "samples_sha256", "count")}
    scores = {} if why_not else record["row"]
    return row | source | _metrics([(scores, None)])


def _status(records: list[Record]) -> str:
    """'done', or how many seeds ended how, with the first reason."""
    counts = Counter(r.status for r in records)
    if set(counts) == {"done"}:
        return "done"
    failed = next(r.result for r in records if r.status != "done")
    words = f"{failed['status'].upper().replace('_', ' ')}: {failed['reason']}"
    count = counts[failed["status"]]
    return words if count == len(records) else f"{count} of {len(records)} {words}"


def protocol(records: list[Record]) -> dict[str, Row]:
    """What every row of a benchmark shares and the hashes to find it again, by benchmark."""
    return {benchmark: _protocol(own) for benchmark, own in by_benchmark(records).items()}


def _protocol(own: list[Record]) -> Row:
    """`protocol` of the records of one benchmark."""
    first: dict[str, Any] = {}
    budget = 0.0
    seeds: set[int] = set()
    evaluations: set[str] = set()
    data: set[str] = set()
    ground: set[str] = set()
    commits: set[str] = set()
    for record in own:
        result = record.result
        provenance = result["provenance"]
        seeds.add(record.seed)
        data.add(provenance["hashes"]["data"])
        ground.add(provenance["hashes"]["ground"])
        commits.add(_commit(provenance))
        if record.metrics is not None:
            first = first or record.metrics["evaluation"]
            evaluations.add(record.metrics["evaluation"]["key"])
        if record.group == "distillation" and "budget_share" not in result:
            budget = max(budget, result["cost"].get("limit_flops") or 0)
    out = {
        "seeds": sorted(seeds),
        "budget_flops": budget or None,
        "samples": first.get("samples"),
        "reference": first.get("reference"),
        "reference_sha256": first.get("reference_sha256"),
        "extractor": first.get("extractor"),
        "extractor_sha256": first.get("extractor_sha256"),
        "cross_extractor": first.get("cross_extractor"),
        "cross_extractor_sha256": first.get("cross_extractor_sha256"),
        "evaluation": ", ".join(sorted(evaluations)),
        "data": ", ".join(sorted(data)),
        "ground": ", ".join(sorted(ground)),
        "commit": ", ".join(sorted(commits)),
    }
    if not first.get("published_weights", True):
        out["published_weights"] = False
    out["cells"] = {f"{r.arm} seed {r.seed}": r.result["key"] for r in own}
    return out


def _commit(provenance: dict[str, Any]) -> str:
    commit = (provenance["commit"] or "none")[:12]
    return f"{commit} with uncommitted changes" if provenance["dirty"] else commit


def reported_rows(reported: dict[str, Any] | None) -> list[Row]:
    """The papers' rows in the shape of ours, without a measured value."""
    empty: Row = {}
    for metric in catalogue.measured("images"):
        empty |= {f"{metric.name}_mean": None, f"{metric.name}_sd": None}
    out: list[Row] = []
    for part in (reported or {}).get("sections", []):
        for r in part["rows"]:
            row = _without_run(
                part["benchmark"],
                r["group"],
                r["method"],
                r["method"],
                nfe=r["nfe"],
                status="reported, not run",
                reported=r,
            )
            out.append(row | empty)
    return out
