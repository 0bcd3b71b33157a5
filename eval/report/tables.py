"""results/<table>.md, .csv and .json as a pure function of published records: the same records give the same bytes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from tabulate import tabulate

from eval.report.effects import effects, section
from eval.report.records import Record
from eval.report.rows import GROUPS, Row, build_rows, external_row, protocol, reported_rows

# column heading, scale of the printed value, digits
SHOWN: dict[str, tuple[str, float, int]] = {
    "fid": ("FID ↓", 1, 3),
    "fid_cross": ("FID, 2nd extractor ↓", 1, 3),
    "fid_teacher": ("FID to teacher ↓", 1, 3),
    "kid": ("KID×10³ ↓", 1e3, 2),
    "is": ("IS ↑", 1, 2),
    "precision": ("prec. ↑", 1, 3),
    "recall": ("recall ↑", 1, 3),
    "density": ("density ↑", 1, 2),
    "coverage": ("coverage ↑", 1, 3),
    "memorisation": ("memor.", 1, 3),
    "gap_closed": ("gap closed ↑", 1, 3),
    "sliced_w2": ("sliced W2 ↓", 1, 3),
    "sliced_w2_floor": ("floor of W2", 1, 3),
    "modes": ("modes ↑", 1, 1),
    "modes_total": ("of", 1, 0),
    "weight_tv": ("weight TV ↓", 1, 3),
    "outside": ("outside 3σ ↓", 1, 3),
    "outside_exact": ("outside, exact", 1, 3),
}
# the second, smaller table of an image benchmark
DIAGNOSTICS: dict[str, tuple[str, float, int]] = {
    "class_accuracy": ("class acc. ↑", 1, 3),
    "label_tv": ("label TV ↓", 1, 3),
    "diversity": ("diversity → 1", 1, 3),
    "c2st": ("C2ST → 0.5", 1, 3),
    "noise_distance": ("same noise", 1, 3),
}


@dataclass(frozen=True)
class Appendix:
    """A section of its own at the end of a table's page, and its rows under `key` in the JSON."""

    key: str
    rows: list[dict[str, Any]]
    markdown: str


def beside(records: list[Record], record: Row, count: int) -> tuple[list[str], list[list[str]]]:
    """Head and lines, one per metric, that place an external record among fixed rows and teachers of published records."""
    rows = build_rows(records)
    many = max((r["nfe"] for r in rows if r["group"] == "teacher" and r["nfe"]), default=None)
    shown = [
        external_row(record, None, count) | {"title": "samples"}
    ]  # a name may be as wide as a terminal
    shown += [
        r
        for r in rows
        if r["group"] == "reference" or (r["group"] == "teacher" and r["nfe"] == many)
    ]
    means = [{key: value for key, value in r.items() if not key.endswith("_sd")} for r in shown]
    names = {
        m: heading
        for m, (heading, *_) in (SHOWN | DIAGNOSTICS).items()
        if shown[0].get(f"{m}_mean") is not None
    }
    lines = [[heading, *(_cell(r, m) for r in means)] for m, heading in names.items()]
    return [
        "",
        *(r["title"] if r["group"] != "teacher" else f"teacher, {many} NFE" for r in shown),
    ], lines


def markdown(
    title: str,
    rows: list[Row],
    records: list[Record],
    reported: dict[str, Any] | None,
    picture: str,
    differences: Iterable[Row] = (),
) -> str:
    """The whole page: one section per benchmark, its protocol, differences between arms, the picture, the papers' own rows."""
    out = [f"# {title}", ""]
    for benchmark in dict.fromkeys(r["benchmark"] for r in rows):
        own = [r for r in rows if r["benchmark"] == benchmark]
        out += [
            f"## {benchmark}: measured here",
            "",
            _section(own),
            "",
            *_diagnostics(own),
            *_notes(own, records, benchmark),
            "",
        ]
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
            tail = [
                r["status"].replace("|", "\\|"),
                r["fidelity"] or "",
                r["division"] or "",
                _paper(r["reported"]),
            ]
            body.append(
                [
                    name,
                    _text(r["nfe"]),
                    _millions(r["params"]),
                    _tera(r["budget"]),
                    *values,
                    _count(r),
                    *tail,
                ]
            )
    head = [
        "method",
        "NFE",
        "params",
        "TFLOP",
        *(SHOWN[m][0] for m in metrics),
        "n",
        "status",
        "fidelity",
        "division",
        "paper",
    ]
    width = len(head)
    return tabulate(
        [line + [""] * (width - len(line)) for line in body], head, "github", disable_numparse=True
    )


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
        for r in rows
        if r["reported"]
    ]
    if papers:
        lines += [
            "",
            f"Column ‘paper’, in the paper's own setting and not comparable: {'; '.join(papers)}.",
        ]
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
    lines += [
        "",
        f"Protocol: evaluation {own['evaluation']}, data {own['data']}, code {own['ground']}, commit {own['commit']}.",
    ]
    return lines


def unpublished(about: dict[str, Any]) -> str:
    """What follows an extractor's hash where others' scores are made with another weight file."""
    return (
        ""
        if about.get("published_weights", True)
        else ", not the published weight file: its scores compare with nobody else's"
    )


def _second(own: dict[str, Any]) -> str:
    """A sentence on the second extractor, where there is one."""
    if not own["cross_extractor"]:
        return ""
    named = f"{own['cross_extractor']} ({own['cross_extractor_sha256'][:12]})"
    return f"‘FID, 2nd extractor’ is FID in the features of {named}, of other architecture and objective: a cross-check. "


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
                epochs = (
                    "–"
                    if r["epochs"] is None
                    else f"{r['epochs']}{'†' * bool(r.get('init_from_pretrained'))}"
                )
                body.append(
                    [
                        r["method"].replace("*", "\\*") + mark.replace("*", "\\*"),
                        epochs,
                        f"{r['params_M']}M",
                        r["nfe"],
                        f"{r['fid']:.2f}",
                    ]
                )
        head = ["method", "epochs", "params", "NFE", "FID ↓ (reported)"]
        lines = [line + [""] * (5 - len(line)) for line in body]
        out += [
            f"### {part['title']}",
            "",
            tabulate(lines, head, "github", disable_numparse=True),
            "",
        ]
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
    appendix: Appendix | None = None,
) -> None:
    """The three twins of a table into `folder`; `compare`: pairs of arms, see `eval/effects.py`."""
    rows, differences = build_rows(records, external), effects(records, compare)
    every = rows + reported_rows(reported)
    content = {"protocol": protocol(records), "rows": every} | (
        {"differences": differences} if differences else {}
    )
    page = markdown(title, rows, records, reported, f"{name}.png", differences)
    if appendix is not None:
        page += f"\n{appendix.markdown}"
        content[appendix.key] = appendix.rows
    twins = {
        "md": page.encode(),
        "json": (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode(),
        "csv": pd.DataFrame(
            [r | {"reported": r["reported"] and json.dumps(r["reported"])} for r in every]
        )
        .to_csv(index=False)
        .encode(),
    }
    for suffix, data in twins.items():
        write_bytes(folder / f"{name}.{suffix}", data)
