"""results/<table>.md, .csv and .json as a pure function of published records: the same records give the same bytes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tabulate import tabulate

from eval.effects import effects, section
from eval.records import Record

IMAGES = (
    "fid", "fid_cross", "fid_teacher", "kid", "is", "precision", "recall", "density", "coverage", "memorisation", "gap_closed",
    "class_accuracy", "label_tv", "diversity", "c2st", "noise_distance",
)  # fmt: skip
MIXTURES = ("sliced_w2", "sliced_w2_floor", "modes", "modes_total", "weight_tv", "outside", "outside_exact")
# column heading, scale of the printed value, digits
SHOWN: dict[str, tuple[str, float, int]] = {
    "fid": ("FID ↓", 1, 3), "fid_cross": ("FID, 2nd extractor ↓", 1, 3), "fid_teacher": ("FID to teacher ↓", 1, 3),
    "kid": ("KID×10³ ↓", 1e3, 2), "is": ("IS ↑", 1, 2),
    "precision": ("prec. ↑", 1, 3), "recall": ("recall ↑", 1, 3), "density": ("density ↑", 1, 2),
    "coverage": ("coverage ↑", 1, 3), "memorisation": ("memor.", 1, 3), "gap_closed": ("gap closed ↑", 1, 3),
    "sliced_w2": ("sliced W2 ↓", 1, 3), "sliced_w2_floor": ("floor of W2", 1, 3), "modes": ("modes ↑", 1, 1),
    "modes_total": ("of", 1, 0), "weight_tv": ("weight TV ↓", 1, 3), "outside": ("outside 3σ ↓", 1, 3),
    "outside_exact": ("outside, exact", 1, 3),
}  # fmt: skip
# the second, smaller table of an image benchmark
DIAGNOSTICS: dict[str, tuple[str, float, int]] = {
    "class_accuracy": ("class acc. ↑", 1, 3), "label_tv": ("label TV ↓", 1, 3), "diversity": ("diversity → 1", 1, 3),
    "c2st": ("C2ST → 0.5", 1, 3), "noise_distance": ("same noise", 1, 3),
}  # fmt: skip
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


def summarise(values: Iterable[float | None]) -> tuple[float | None, float | None]:
    """Mean and sample standard deviation; (None, None) without values, sd None for one."""
    known = [v for v in values if v is not None]
    if not known:
        return None, None
    digits = lambda v: float(f"{v:.6g}")
    return digits(np.mean(known)), digits(np.std(known, ddof=1)) if len(known) > 1 else None


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
        rows += [_external(e, differs(e, shared), shared["samples"]) for e in external if e["benchmark"] == benchmark]
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
        values = [_gap_closed(row.get("fid"), anchor) if name == "gap_closed" else row.get(name) for row, anchor in found]
        out[f"{name}_mean"], out[f"{name}_sd"] = summarise(values)
    return out


def _fixed(benchmark: str, teachers: list[Record], anchors: dict[int, Any]) -> list[Row]:
    """Floor and trivial generators, which the teacher cell of every seed carries."""
    out = []
    for name in dict.fromkeys(row["name"] for r in teachers for row in r.fixed):
        found = [(row, anchors[r.result["seed"]]) for r in teachers for row in r.fixed if row["name"] == name]
        out.append(
            {"benchmark": benchmark, "group": "reference", "method": name, "variant": None, "title": name.replace("_", " "),
             "nfe": None, "headline": False, "seeds": len(found), "status": "done", "division": None, "fidelity": None,
             "budget": None, "params": None, "trajectory": False, "reported": None} | _metrics(found)
        )  # fmt: skip
    return out


def _arm_rows(records: list[Record], anchors: dict[int, Any]) -> list[Row]:
    """The rows of one arm, one per NFE; a single row that says why where no seed finished."""
    first, done = records[0].result, [r for r in records if r.metrics is not None]
    base = {
        "benchmark": first["benchmark"], "group": first["group"], "method": first["method"], "variant": first["variant"],
        "title": first["title"] + (f" ({first['variant']})" if first["variant"] else ""),
        "status": _status(records), "division": first["division"], "trajectory": first.get("trajectory", False),
        "fidelity": ", ".join(filter(None, [first["fidelity"], "adaptation" if first["adaptation"] else None])) or None,
        "budget": summarise(r.result["cost"].get("flops") for r in records)[0], "reported": None,
    }  # fmt: skip
    if not done:
        return [base | {"nfe": None, "headline": True, "seeds": 0, "params": None} | _metrics([({}, None)])]
    out = []
    for nfe in done[0].result["nfe"]:
        found = [(row, anchors.get(r.result["seed"])) for r in done for row in r.rows if row["nfe"] == nfe]
        own = {"nfe": nfe, "headline": nfe == done[0].result["headline_nfe"], "seeds": len(found), "params": done[0].result["params"]}
        own["reported"] = next((p for p in first["reported"] if p["nfe"] == nfe), None)
        if first["group"] == "teacher" and "sliced_w2" in found[0][0]:  # the closed form is sampled, not the network
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


def _external(record: Row, why_not: str | None, count: int) -> Row:
    """The row of an external record beside rows of `count` samples; without numbers where it says why not."""
    status = "done" if record["count"] == count else f"{record['count']} samples, not {count}: not comparable"
    return {
        "benchmark": record["benchmark"], "group": "external", "method": record["name"], "variant": None, "title": record["name"],
        "nfe": None, "headline": False, "seeds": int(why_not is None), "status": why_not or status, "division": None,
        "fidelity": None, "budget": None, "params": None, "trajectory": False, "reported": None,
        **{key: record[key] for key in ("who", "where", "samples_sha256", "count")},
    } | _metrics([({} if why_not else record["row"], None)])  # fmt: skip


def beside(records: list[Record], record: Row, count: int) -> tuple[list[str], list[list[str]]]:
    """Head and lines, one per metric, that place an external record among fixed rows and teachers of published records."""
    rows = build_rows(records)
    many = max((r["nfe"] for r in rows if r["group"] == "teacher" and r["nfe"]), default=None)
    shown = [_external(record, None, count) | {"title": "samples"}]  # a name may be as wide as a terminal
    shown += [r for r in rows if r["group"] == "reference" or (r["group"] == "teacher" and r["nfe"] == many)]
    means = [{key: value for key, value in r.items() if not key.endswith("_sd")} for r in shown]
    names = {m: heading for m, (heading, *_) in (SHOWN | DIAGNOSTICS).items() if shown[0].get(f"{m}_mean") is not None}
    lines = [[heading, *(_cell(r, m) for r in means)] for m, heading in names.items()]
    return ["", *(r["title"] if r["group"] != "teacher" else f"teacher, {many} NFE" for r in shown)], lines


def _status(records: list[Record]) -> str:
    """'done', or how many seeds ended how, with the first reason."""
    counts = Counter(r.result["status"] for r in records)
    if set(counts) == {"done"}:
        return "done"
    failed = next(r.result for r in records if r.result["status"] != "done")
    share = "" if counts[failed["status"]] == len(records) else f"{counts[failed['status']]} of {len(records)} "
    return f"{share}{failed['status'].upper().replace('_', ' ')}: {failed['reason']}"


def markdown(
    title: str, rows: list[Row], records: list[Record], reported: dict[str, Any] | None, picture: str, differences: Iterable[Row] = ()
) -> str:
    """The whole page: one section per benchmark, its protocol, differences between arms, the picture, the papers' own rows."""
    out = [f"# {title}", ""]
    for benchmark in dict.fromkeys(r["benchmark"] for r in rows):
        own = [r for r in rows if r["benchmark"] == benchmark]
        out += [f"## {benchmark}: measured here", "", _section(own), "", *_diagnostics(own), *_notes(own, records, benchmark), ""]
    if differences:
        out += section(differences)
    out += [f"![Samples of teacher and students on the same noise]({picture})", ""]
    if reported:
        out += _reported_section(reported)
    return "\n".join(out).rstrip() + "\n"


def _section(rows: list[Row]) -> str:
    metrics = [m for m in SHOWN if any(r.get(f"{m}_mean") is not None for r in rows)]
    body: list[list[str]] = []
    for group, heading in GROUPS.items():
        members = [r for r in rows if r["group"] == group]
        if members:
            body.append([f"**{heading}**"])
        for r in members:
            name = f"**{r['title']}**" if r["headline"] and group != "teacher" else r["title"]
            values = [_cell(r, m) for m in metrics]
            tail = [r["status"].replace("|", "\\|"), r["fidelity"] or "", r["division"] or "", _paper(r["reported"])]
            body.append([name, _text(r["nfe"]), _millions(r["params"]), _tera(r["budget"]), *values, _count(r), *tail])
    head = ["method", "NFE", "params", "TFLOP", *(SHOWN[m][0] for m in metrics), "n", "status", "fidelity", "division", "paper"]
    width = len(head)
    return tabulate([line + [""] * (width - len(line)) for line in body], head, "github", disable_numparse=True)


def _diagnostics(rows: list[Row]) -> list[str]:
    """What tells how a row fails, not which is better: of rows with samples, where the benchmark has such scores at all."""
    metrics = [m for m in DIAGNOSTICS if any(r.get(f"{m}_mean") is not None for r in rows)]
    if not metrics:
        return []
    body: list[list[str]] = []
    for group, heading in GROUPS.items():
        members = [r for r in rows if r["group"] == group and r["seeds"]]
        if members:
            body.append([f"**{heading}**", *[""] * (len(metrics) + 2)])
        for r in members:
            name = f"**{r['title']}**" if r["headline"] and group != "teacher" else r["title"]
            shown = [m if m != "noise_distance" or r["trajectory"] else "" for m in metrics]
            body.append([name, _text(r["nfe"]), *(_cell(r, m) for m in shown), _count(r)])
    head = ["method", "NFE", *(DIAGNOSTICS[m][0] for m in metrics), "n"]
    return ["### Diagnostics", "", tabulate(body, head, "github", disable_numparse=True), ""]


def _count(row: Row) -> str:
    """Seeds behind a row; none where nothing in it is random: one measurement."""
    return "" if row["group"] == "reference" and not row["fid_sd"] else _text(row["seeds"])


def _cell(row: Row, metric: str) -> str:
    mean, sd = row.get(f"{metric}_mean"), row.get(f"{metric}_sd")
    _, scale, digits = (SHOWN | DIAGNOSTICS).get(metric, ("", 1, 0))
    if mean is None:
        return "–"
    return f"{mean * scale:.{digits}f}" + (f" ± {sd * scale:.{digits}f}" if sd else "")


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def _millions(value: float | None) -> str:
    return "" if value is None else f"{value / 1e6:.2f}M"


def _tera(value: float | None) -> str:
    return "" if value is None else f"{value / 1e12:.2f}"


def _paper(reported: dict[str, Any] | None) -> str:
    return "" if reported is None else f"{reported['metric'].upper()} {reported['value']:.2f}"


def _notes(rows: list[Row], records: list[Record], benchmark: str) -> list[str]:
    """The protocol footnote."""
    own = protocol(records)[benchmark]
    budget = "–" if own["budget_flops"] is None else f"{own['budget_flops'] / 1e12:.2f} TFLOP"
    lines = [
        f"Mean ± sample sd over seeds {', '.join(map(str, own['seeds']))} (n of them finished); seed k of a method starts "
        f"from teacher k and is compared with it. Budget {budget} per seed for every method in the closed division, metered: "
        "teacher calls, critics and regression pairs included; what the teacher itself cost stands in its own rows. Headline NFE in "
        "bold, declared before training.",
    ]
    papers = [
        f"{r['title']}, {r['nfe']} NFE: {_paper(r['reported'])} on {r['reported']['setting']} ({r['reported']['where']})"
        for r in rows if r["reported"]
    ]  # fmt: skip
    if papers:
        lines += ["", f"Column ‘paper’, in the paper's own setting and not comparable: {'; '.join(papers)}."]
    if any(r.get("fid_mean") is not None for r in rows):
        lines += [
            "",
            f"FID, KID, IS, precision and recall (k = 3), density and coverage (k = 5) in the features of {own['extractor']} "
            f"({own['extractor_sha256'][:12]}{unpublished(own)}): {own['samples']} samples (the floor: the training half as it is) against "
            f"{own['reference']} held-out images; precision to coverage on pieces of {own['reference']} samples, averaged. Numbers compare "
            "only under one extractor. ‘FID to teacher’ is to as many samples of its teacher at many steps from other noise: the "
            f"teacher’s own row shows what a perfect student scores. {_second(own)}‘memor.’ is the share "
            "of samples nearer to a training image than that image is to any other training image; the floor row shows it for real "
            "held-out images. Gap closed = (FID of class means − FID) / (FID of class means − FID of the teacher at many steps): a "
            "convenience, not the ranking.",
        ]
        if any(r.get("c2st_mean") is not None for r in rows):
            lines += [
                "",
                "Diagnostics tell how a row fails; they rank nothing. Class acc.: share of samples that the extractor’s classifier puts "
                "into the class asked for; label TV: total variation between its classes and those asked for; diversity: mean distance "
                "in features of two samples of a class, over that of held-out images; C2ST: how often the nearest other one of a sample "
                "or held-out image is of its own kind (0.5 = not told apart, 1 = always told apart, below 0.5 = copies of the held-out "
                "images); same noise, for methods that follow the teacher’s trajectories: RMS pixel distance to the teacher’s many-step "
                "sample of the same noise, over that of other pairs of the class (0 = the teacher’s sample, 1 = unrelated). What "
                "catches what: [protocol](../docs/protocol.md).",
            ]
    elif any(r.get("sliced_w2_mean") is not None for r in rows):
        lines += [
            "",
            f"{own['samples']} samples against exact ones. Sliced W2 beside what a second exact draw scores; modes: components with at "
            "least a tenth of their share; weight TV: total variation of the modes’ weights, about 0.01 for exact samples; outside: share "
            "of samples farther from every mode than 3σ holds in two dimensions. The teacher is the closed form; its calls are charged as "
            "those of the network that initialises students.",
        ]
    words = [
        f"{r['title']}: {r['who'] or 'maker not stated'}, {r['where'] or 'source not stated'} "
        f"({r['count']} samples, sha256 {r['samples_sha256'][:12]})"
        for r in rows
        if r["group"] == "external"
    ]
    if words:
        lines += ["", f"External samples, scored as they are: {'; '.join(words)}."]
    lines += ["", f"Protocol: evaluation {own['evaluation']}, data {own['data']}, code {own['ground']}, commit {own['commit']}."]
    return lines


def unpublished(about: dict[str, Any]) -> str:
    """What follows an extractor's hash where others' scores are made with another weight file."""
    return "" if about.get("published_weights", True) else ", not the published weight file: its scores compare with nobody else's"


def _second(own: dict[str, Any]) -> str:
    """A sentence on the second extractor, where there is one."""
    if not own["cross_extractor"]:
        return ""
    named = f"{own['cross_extractor']} ({own['cross_extractor_sha256'][:12]})"
    return f"‘FID, 2nd extractor’ is FID in the features of {named}, of other architecture and objective: a cross-check. "


def protocol(records: list[Record]) -> dict[str, Any]:
    """Per benchmark what every row shares, and the hashes to find it again."""
    out: dict[str, Any] = {}
    for benchmark in sorted({r.result["benchmark"] for r in records}):
        own = [r for r in records if r.result["benchmark"] == benchmark]
        evaluations = [r.metrics["evaluation"] for r in own if r.metrics is not None]
        first = evaluations[0] if evaluations else {}
        limits = [r.result["cost"].get("limit_flops") for r in own if r.result["group"] == "distillation"]
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
        }  # fmt: skip
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
                {"benchmark": part["benchmark"], "group": r["group"], "method": r["method"], "variant": None,
                 "title": r["method"], "nfe": r["nfe"], "headline": False, "seeds": 0, "status": "reported, not run",
                 "division": None, "fidelity": None, "budget": None, "params": None, "trajectory": False, "reported": r}
                | {f"{m}_{k}": None for m in IMAGES for k in ("mean", "sd")}
            )  # fmt: skip
    return out


def _reported_section(reported: dict[str, Any]) -> list[str]:
    out = ["## Reported by the papers, not run here", "", reported["note"], ""]
    for part in reported["sections"]:
        body: list[list[str]] = []
        for group, heading in reported["groups"].items():
            members = [r for r in part["rows"] if r["group"] == group]
            teacher = None
            if members:
                body.append([f"**{heading}**"])
            for r in members:
                if r.get("teacher") and r["teacher"] != teacher:
                    teacher = r["teacher"]
                    body.append([f"*teacher: {teacher} (FID {r['teacher_fid']:.2f})*"])
                mark = "*" * bool(r.get("autoguidance"))
                epochs = "–" if r["epochs"] is None else f"{r['epochs']}{'†' * bool(r.get('init_from_pretrained'))}"
                body.append(
                    [r["method"].replace("*", "\\*") + mark.replace("*", "\\*"), epochs, f"{r['params_M']}M", r["nfe"], f"{r['fid']:.2f}"]
                )
        head = ["method", "epochs", "params", "NFE", "FID ↓ (reported)"]
        lines = [line + [""] * (5 - len(line)) for line in body]
        out += [f"### {part['title']}", "", tabulate(lines, head, "github", disable_numparse=True), ""]
    return out


def write(
    name: str,
    title: str,
    records: list[Record],
    external: list[Row],
    reported: dict[str, Any] | None,
    compare: list[tuple[str, str]],
    folder: Path,
    write_bytes: Callable[[Path, bytes], None],
) -> None:
    """The three twins of a table into `folder`; `compare`: pairs of arms, see `eval/effects.py`."""
    rows, differences = build_rows(records, external), effects(records, compare)
    every = rows + reported_rows(reported)
    content = {"protocol": protocol(records), "rows": every} | ({"differences": differences} if differences else {})
    twins = {
        "md": markdown(title, rows, records, reported, f"{name}.png", differences).encode(),
        "json": (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode(),
        "csv": pd.DataFrame([r | {"reported": r["reported"] and json.dumps(r["reported"])} for r in every]).to_csv(index=False).encode(),
    }
    for suffix, data in twins.items():
        write_bytes(folder / f"{name}.{suffix}", data)
