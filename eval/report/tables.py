"""results/<table>.md, .csv and .json as a pure function of published records: the same records give
the same bytes."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import pandas as pd

from eval import catalogue
from eval.catalogue import MISSING, Metric
from eval.report import text
from eval.report.effects import effects, section
from eval.report.records import Record, grouped
from eval.report.rows import GROUPS, Row, build_rows, external_row, protocol, reported_rows

Line = list[str]  # cells of a line of a table
NEARBY = ("reference", "teacher")  # groups beside which an external record is placed


@dataclass(frozen=True)
class Appendix:
    """A section of its own at the end of a table's page, and its rows under `key` in the JSON."""

    key: str
    rows: list[dict[str, Any]]
    markdown: str


def beside(records: list[Record], record: Row, count: int) -> tuple[Line, list[Line]]:
    """Head and lines, one per metric, that place an external record among published rows.

    Those are the fixed rows and the teachers at their most steps; means alone.
    """
    rows = [row for row in build_rows(records) if row["group"] in NEARBY]
    many = max((row["nfe"] or 0 for row in rows), default=0)
    own = external_row(record, None, count)
    shown = [own]
    head = ["", "samples"]  # its name may be as wide as a terminal
    for row in rows:
        if row["group"] == "reference":
            shown.append(row)
            head.append(row["title"])
        elif many and row["nfe"] == many:
            shown.append(row)
            head.append(f"teacher, {many} NFE")
    lines = []
    for metric in catalogue.METRICS:
        if metric.mean(own) is not None:
            cells = [metric.printed(metric.mean(row)) for row in shown]
            lines.append([metric.column, *cells])
    return head, lines


def markdown(
    title: str,
    rows: list[Row],
    records: list[Record],
    reported: dict[str, Any] | None,
    picture: str,
    differences: Iterable[Row] = (),
) -> str:
    """The whole page.

    One section per benchmark with its protocol, differences between arms, the picture, the papers'
    own rows.
    """
    out = [f"# {title}", ""]
    shared = protocol(records)
    for benchmark, own in grouped(rows, itemgetter("benchmark")).items():
        out += [f"## {benchmark}: measured here", "", _section(own), ""]
        out += _diagnostics(own)
        out += [*_notes(own, shared[benchmark]), ""]
    if differences:
        out += section(differences)
    out += [f"![Samples of teacher and students on the same noise]({picture})", ""]
    if reported:
        out += _reported_section(reported)
    return "\n".join(out).rstrip() + "\n"


def _section(rows: list[Row]) -> str:
    """The main table of one benchmark."""
    metrics = catalogue.shown(rows)
    groups = grouped(rows, itemgetter("group"))
    body: list[Line] = []
    for group, heading in GROUPS.items():
        members = groups.get(group, [])
        if members:
            body.append([f"**{heading}**"])
        for row in members:
            line = [_name(row), _text(row["nfe"])]
            line += [text.millions(row["params"], ""), text.tera(row["budget"], "")]
            line += [metric.cell(row) for metric in metrics]
            line += [_count(row), text.escaped(row["status"])]
            line += [row["fidelity"] or "", row["division"] or "", _paper(row["reported"])]
            body.append(line)
    columns = [metric.column for metric in metrics]
    head = ["method", "NFE", "params", "TFLOP", *columns]
    return text.table([*head, "n", "status", "fidelity", "division", "paper"], body)


def _diagnostics(rows: list[Row]) -> list[str]:
    """The second table: how a row fails, not which is better.

    Of rows with samples, and none where the benchmark has no such scores at all.
    """
    metrics = catalogue.shown(rows, "diagnostics")
    if not metrics:
        return []
    with_samples = [row for row in rows if row["seeds"]]
    groups = grouped(with_samples, itemgetter("group"))
    body: list[Line] = []
    for group, heading in GROUPS.items():
        members = groups.get(group, [])
        if members:
            body.append([f"**{heading}**"])
        for row in members:
            cells = [_diagnostic(row, metric) for metric in metrics]
            body.append([_name(row), _text(row["nfe"]), *cells, _count(row)])
    columns = [metric.column for metric in metrics]
    return ["### Diagnostics", "", text.table(["method", "NFE", *columns, "n"], body), ""]


def _diagnostic(row: Row, metric: Metric) -> str:
    if metric.trajectory and not row["trajectory"]:
        return MISSING
    return metric.cell(row)


def _name(row: Row) -> str:
    """Title of a row, in bold at the headline NFE of a student."""
    bold = row["headline"] and row["group"] != "teacher"
    return f"**{row['title']}**" if bold else str(row["title"])


def _count(row: Row) -> str:
    """Seeds behind a row; none where nothing in it is random: one measurement."""
    main = catalogue.main_metric(catalogue.family_of(row))
    if row["group"] == "reference" and not row[f"{main.name}_sd"]:
        return ""
    return _text(row["seeds"])


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def _paper(reported: dict[str, Any] | None) -> str:
    return "" if reported is None else f"{reported['metric'].upper()} {reported['value']:.2f}"


def _notes(rows: list[Row], shared: Row) -> list[str]:
    """The footnotes of one benchmark; `shared`: its `protocol`."""
    seeds = ", ".join(map(str, shared["seeds"]))
    budget = MISSING
    if shared["budget_flops"] is not None:
        budget = f"{text.tera(shared['budget_flops'])} TFLOP"
    lines = [
        f"Mean ± sample sd over seeds {seeds} (n of them finished); seed k of a method starts "
        f"from teacher k and is compared with it. Budget {budget} per seed for every method in the "
        "closed division, metered: teacher calls, critics and regression pairs included; what the "
        "teacher itself cost stands in its own rows. Headline NFE in bold, declared before "
        "training.",
        *_paper_notes(rows),
    ]
    if _has("images", rows):
        lines += _image_notes(rows, shared)
    elif _has("mixtures", rows):
        lines += [
            "",
            f"{shared['samples']} samples against exact ones. Sliced W2 beside what a second exact "
            "draw scores; modes: components with at least a tenth of their share; weight TV: total "
            "variation of the modes’ weights, about 0.01 for exact samples; outside: share of "
            "samples farther from every mode than 3σ holds in two dimensions. The teacher is the "
            "closed form; its calls are charged as those of the network that initialises students.",
        ]
    return [*lines, *_external_notes(rows), "", _protocol_note(shared)]


def _has(family: catalogue.Family, rows: list[Row]) -> bool:
    """Whether some row has the main metric of a family."""
    main = catalogue.main_metric(family)
    return bool(catalogue.with_values([main], rows))


def _paper_notes(rows: list[Row]) -> list[str]:
    papers = []
    for row in rows:
        if row["reported"]:
            setting = row["reported"]["setting"]
            said = f"{_paper(row['reported'])} on {setting} ({row['reported']['where']})"
            papers.append(f"{row['title']}, {row['nfe']} NFE: {said}")
    if not papers:
        return []
    listed = "; ".join(papers)
    return ["", f"Column ‘paper’, in the paper's own setting and not comparable: {listed}."]


def _image_notes(rows: list[Row], shared: Row) -> list[str]:
    sha256 = f"{shared['extractor_sha256'][:12]}{unpublished(shared)}"
    lines = [
        "",
        "FID, KID, IS, precision and recall (k = 3), density and coverage (k = 5) in the features "
        f"of {shared['extractor']} ({sha256}): {shared['samples']} samples (the floor: the "
        f"training half as it is) against {shared['reference']} held-out images; precision to "
        f"coverage on pieces of {shared['reference']} samples, averaged. Numbers compare only "
        "under one extractor. ‘FID to teacher’ is to as many samples of its teacher at many steps "
        "from other noise: the teacher’s own row shows what a perfect student scores. "
        f"{_second(shared)}‘memor.’ is the share of samples nearer to a training image than that "
        "image is to any other training image; the floor row shows it for real held-out images. "
        "Gap closed = (FID of class means − FID) / (FID of class means − FID of the teacher at "
        "many steps): a convenience, not the ranking.",
    ]
    if catalogue.with_values([catalogue.metric("c2st")], rows):
        lines += [
            "",
            "Diagnostics tell how a row fails; they rank nothing. Class acc.: share of samples "
            "that the extractor’s classifier puts into the class asked for; label TV: total "
            "variation between its classes and those asked for; diversity: mean distance in "
            "features of two samples of a class, over that of held-out images; C2ST: how often "
            "the nearest other one of a sample or held-out image is of its own kind (0.5 = not "
            "told apart, 1 = always told apart, below 0.5 = copies of the held-out images); same "
            "noise, for methods that follow the teacher’s trajectories: RMS pixel distance to the "
            "teacher’s many-step sample of the same noise, over that of other pairs of the class "
            "(0 = the teacher’s sample, 1 = unrelated). What catches what: "
            "[protocol](../docs/protocol.md).",
        ]
    return lines


def _external_notes(rows: list[Row]) -> list[str]:
    words = []
    for row in rows:
        if row["group"] == "external":
            who = row["who"] or "maker not stated"
            where = row["where"] or "source not stated"
            samples = f"{row['count']} samples, sha256 {row['samples_sha256'][:12]}"
            words.append(f"{row['title']}: {who}, {where} ({samples})")
    if not words:
        return []
    return ["", f"External samples, scored as they are: {'; '.join(words)}."]


def _protocol_note(shared: Row) -> str:
    names = {"evaluation": "evaluation", "data": "data", "ground": "code", "commit": "commit"}
    hashes = ", ".join(f"{word} {shared[key]}" for key, word in names.items())
    return f"Protocol: {hashes}."


def unpublished(about: dict[str, Any]) -> str:
    """What follows an extractor's hash where others' scores are made with another weight file."""
    if about.get("published_weights", True):
        return ""
    return ", not the published weight file: its scores compare with nobody else's"


def _second(shared: Row) -> str:
    """A sentence on the second extractor, where there is one."""
    if not shared["cross_extractor"]:
        return ""
    named = f"{shared['cross_extractor']} ({shared['cross_extractor_sha256'][:12]})"
    return (
        f"‘FID, 2nd extractor’ is FID in the features of {named}, "
        "of other architecture and objective: a cross-check. "
    )


def _reported_section(reported: dict[str, Any]) -> list[str]:
    """The papers' own tables."""
    out = ["## Reported by the papers, not run here", "", reported["note"], ""]
    head = ["method", "epochs", "params", "NFE", "FID ↓ (reported)"]
    for part in reported["sections"]:
        groups = grouped(part["rows"], itemgetter("group"))
        body: list[list[Any]] = []
        for group, heading in reported["groups"].items():
            members = groups.get(group, [])
            teacher = None
            if members:
                body.append([f"**{heading}**"])
            for row in members:
                if row.get("teacher") and row["teacher"] != teacher:
                    teacher = row["teacher"]
                    body.append([f"*teacher: {teacher} (FID {row['teacher_fid']:.2f})*"])
                body.append(_reported_line(row))
        out += [f"### {part['title']}", "", text.table(head, body), ""]
    return out


def _reported_line(row: dict[str, Any]) -> list[Any]:
    method = row["method"] + "*" * bool(row.get("autoguidance"))
    epochs = MISSING
    if row["epochs"] is not None:
        epochs = f"{row['epochs']}{'†' * bool(row.get('init_from_pretrained'))}"
    name = method.replace("*", "\\*")
    return [name, epochs, f"{row['params_M']}M", row["nfe"], f"{row['fid']:.2f}"]


def write(
    name: str,
    title: str,
    records: list[Record],
    external: list[Row],
    reported: dict[str, Any] | None,
    compare: list[tuple[str, str]],
    folder: Path,
    write_bytes: text.Write,
    appendix: Appendix | None = None,
) -> None:
    """The three twins of a table into `folder`; `compare`: pairs of arms, as of `effects`."""
    rows = build_rows(records, external)
    differences = effects(records, compare)
    every = rows + reported_rows(reported)
    content: dict[str, Any] = {"protocol": protocol(records), "rows": every}
    if differences:
        content["differences"] = differences
    page = markdown(title, rows, records, reported, f"{name}.png", differences)
    if appendix is not None:
        page += f"\n{appendix.markdown}"
        content[appendix.key] = appendix.rows
    write_bytes(folder / f"{name}.md", page.encode())
    write_bytes(folder / f"{name}.json", text.json_bytes(content))
    flat = [row | {"reported": row["reported"] and json.dumps(row["reported"])} for row in every]
    write_bytes(folder / f"{name}.csv", pd.DataFrame(flat).to_csv(index=False).encode())
