"""docs/methods/<name>.md and index.md: what a method is, what it needs, costs and reaches here. A
pure function of the method's folder and of published records; the prose is the README's own, cut
into sections and put into one order.

A README has a title, the paper, a paragraph or more on the idea, a table of equations, and
sections: `Algorithm` (a box in the paper's order), `Cost`, `Deviations ...`, `Where it ...`
(fails), and others. What is missing is said.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

from eval import catalogue
from eval.catalogue import MISSING
from eval.report import costs, text
from eval.report.curves import Curves, picture
from eval.report.records import arm_name, grouped
from eval.report.rows import Row, fidelity_words

TABLES = ("table2", "gaussians")  # whose rows and curves a page shows
BENCHMARK = "digits"  # of the costs and of the index
INDEXED = ("fid", "fid_teacher", "recall")  # metrics of the index
# relative to the method's folder, and not to the checkout's root
LINK = re.compile(r"\]\((?!https?://|#|/|\.\./\.\./)([^)\s]+)\)")
PLACED = ("Algorithm", "Cost", "Where it", "Deviations")  # sections with a place of their own
NO_RECORD = "No record of this method is published."
READERS = "For whoever chooses a method, or compares one of their own."  # of the index


@dataclass(frozen=True)
class Source:
    """What a method's folder says.

    about: its config.yaml; claims: its claims.yaml; tests: names of its test files; anatomy: what
    distillbench/conformance/anatomy.py says of its default arm.
    """

    name: str
    about: dict[str, Any]
    readme: str
    claims: dict[str, Any]
    tests: list[str]
    anatomy: Row


@dataclass(frozen=True)
class Section:
    """A section of a README, from its heading to the next."""

    title: str
    text: str


@dataclass(frozen=True)
class Readme:
    """A README in parts.

    paper: the first paragraph; idea: paragraphs up to the first table; equations: from there to the
    first section; sections: in order.
    """

    paper: str
    idea: str
    equations: str
    sections: list[Section]

    def under(self, start: str) -> list[Section]:
        """Sections whose title begins with `start`, in any case."""
        return [s for s in self.sections if s.title.lower().startswith(start.lower())]


def parse(name: str, readme: str) -> Readme:
    """The README of method `name`, links rewritten so that they hold in docs/methods."""
    readme = LINK.sub(rf"](../../methods/{name}/\1)", readme)
    head: list[str] = []
    sections: list[tuple[str, list[str]]] = []
    lines = head
    fenced = False
    for line in readme.splitlines():
        fenced ^= line.startswith("```")
        if line.startswith("## ") and not fenced:
            lines = []
            sections.append((line[3:].strip(), lines))
        else:
            lines.append(line)
    without_title = "\n".join(line for line in head if not line.startswith("# ")).strip()
    before, bar, equations = without_title.partition("\n|")
    paper, _, idea = before.strip().partition("\n\n")
    cut = [Section(title, "\n".join(lines).strip()) for title, lines in sections]
    return Readme(paper, idea.strip(), (bar + equations).strip(), cut)


def page(source: Source, rows: list[Row], known: list[Row], drawn: list[str]) -> str:
    """The page of one method.

    rows: of the tables (with their name as `table`), of all methods; known: rows of
    eval/report/costs.py, of all methods; drawn: lines that show its pictures, none where no curve
    is published.
    """
    name = source.name
    readme = parse(name, source.readme)
    own = [row for row in rows if row["method"] == name]
    cost = [row for row in known if row["method"] == name]
    out = [f"# {source.about['title']}", "", made_from(name), ""]
    out += [readme.paper or _lacks("paper"), "", readme.idea or _lacks("idea"), ""]
    out += ["## Algorithm", "", _algorithm(readme), ""]
    out += [
        f"In code: `train_step` of [`methods/{name}/method.py`](../../methods/{name}/method.py), "
        "in our convention ([convention](../convention.md)).",
        "",
    ]
    out += ["## Needs and cost", "", _needs(source.anatomy), "", *_cost(cost), ""]
    out += _texts(readme.under("Cost"))
    out += ["## Results here", "", *_results(own), ""]
    out += _texts(readme.under("Where it"), "### ")
    out += ["## Training", "", *(drawn or ["No training curve is published with the records."]), ""]
    out += ["## Reported by the paper", "", *_reported(source.claims), ""]
    out += ["## What was checked against what", "", _checked(source), ""]
    out += [readme.equations or _lacks("table of equations"), ""]
    deviations = readme.under("Deviations")
    if not deviations:
        out += ["## Deviations", "", _lacks("section ‘Deviations’"), ""]
    out += _texts(deviations, "## ")
    placed = [section for start in PLACED for section in readme.under(start)]
    out += _texts([section for section in readme.sections if section not in placed], "## ")
    return "\n".join(out).rstrip() + "\n"


def made_from(name: str) -> str:
    """The first line of a page: where to edit."""
    made = f"Made by `distillbench pages` from methods/{name} and results/records"
    return f"<!-- {made}: edit those. -->"


def _lacks(what: str) -> str:
    return f"*The README has no {what}.*"


def _algorithm(readme: Readme) -> str:
    boxes = readme.under("Algorithm")
    if boxes:
        return boxes[0].text
    return _lacks("section ‘Algorithm’: the order of updates is known from the code alone")


def _texts(sections: list[Section], heading: str | None = None) -> list[str]:
    """Lines of sections, under their titles where the marks of a heading are given."""
    out = []
    for section in sections:
        if heading:
            out += [f"{heading}{section.title}", ""]
        out += [section.text, ""]
    return out


def _needs(anatomy: Row) -> str:
    if "error" in anatomy:
        return f"*It cannot be built here: {anatomy['error']}.*"
    needs = anatomy["needs"]
    nfe = text.nfe_words(needs["nfe"], needs["headline_nfe"])
    words = f"Needs: {costs.needs_words(anatomy)}. Trains: {costs.trained_words(anatomy)}."
    return f"{words} NFE: {nfe} (headline in bold)."


def _cost(known: list[Row]) -> list[str]:
    """The metered cost of one update, an arm a line; Table 1 explains the columns."""
    if not known:
        return [NO_RECORD]
    body = []
    out = []
    for row in known:
        arm = f"`{_arm(row)}`"
        if "calls" not in row:
            out.append(f"{arm} on {row['benchmark']}: {row['status']}.")
            continue
        calls = []
        for role in row["calls"]:
            if not role.endswith(".backward"):
                words = costs.evaluations(row, [role])
                calls.append(f"{role.replace('.tangent', ' tangent')} {words}")
        flops = text.fixed(row["flops_update"] / 1e6, 0)
        if row.get("ratio"):
            flops += f" ({row['ratio']:.3f} of the minimum)"
        updates = f"{row['updates']['student']:,}"
        seconds = text.fixed(row["seconds_update"], 3)
        body.append([row["benchmark"], arm, ", ".join(calls), flops, updates, seconds])
    if body:
        calls_head = "one update of the student: calls (rows)"
        head = ["benchmark", "arm", calls_head, "MFLOP", "updates bought", "s / update"]
        out = [text.table(head, body), "", *out]
    what = "What the columns mean, beside other methods"
    return [*out, f"{what}: [Table 1](../../results/table1.md)."]


def _arm(row: Row) -> str:
    return arm_name(row["method"], row["variant"])


def _results(rows: list[Row]) -> list[str]:
    """A table of results for each of TABLES that has rows of this method."""
    if not rows:
        return [NO_RECORD]
    of_pages = [metric for metric in catalogue.METRICS if metric.page]
    out: list[str] = []
    for name, part in grouped(rows, itemgetter("table")).items():
        metrics = catalogue.with_values(of_pages, part)
        body = []
        for row in part:
            line = [row["benchmark"], f"`{_arm(row)}`", _nfe(row)]
            line += [metric.cell(row) for metric in metrics]
            body.append([*line, str(row["seeds"]), text.escaped(row["status"])])
        columns = [metric.column for metric in metrics]
        head = ["benchmark", "arm", "NFE", *columns, "n", "status"]
        source = f"From [{name}](../../results/{name}.md), mean ± sample sd over n seeds"
        out += [f"{source}, headline NFE in bold:", "", text.table(head, body), ""]
    return out[:-1]


def _nfe(row: Row) -> str:
    if row["nfe"] is None:
        return MISSING
    return f"**{row['nfe']}**" if row["headline"] else str(row["nfe"])


def _reported(claims: dict[str, Any]) -> list[str]:
    """claims.yaml: numbers in the papers' own settings, and what arms of this suite can test."""
    out = ["claims.yaml has no reported number."]
    if claims["reported"]:
        head = ["metric", "value", "NFE", "setting", "where", "arm of the same kind here"]
        body = [_reported_line(reported) for reported in claims["reported"]]
        words = "Other data, models and budgets than ours: not comparable."
        out = [text.table(head, body), "", words]
    if claims["claims"]:
        head = ["claim", "in words", "where", "kind", "tested by"]
        body = []
        for claim in claims["claims"]:
            link = f"[{claim['id']}](../../results/audit.md)"
            body.append([link, claim["claim"], claim["where"], claim["kind"], _test(claim)])
        out += ["", text.table(head, body), ""]
        came_out = "What came out: [audit](../../results/audit.md)."
        out.append(f"{came_out} How a verdict is drawn: [audit.md](../audit.md).")
    return out


def _reported_line(reported: dict[str, Any]) -> list[Any]:
    metric = reported["metric"].upper().replace("_", " ")
    nfe = MISSING if reported["nfe"] is None else reported["nfe"]
    arm = f"`{reported['arm']}`" if reported["arm"] else MISSING
    return [metric, f"{reported['value']:g}", nfe, reported["setting"], reported["where"], arm]


def _test(claim: dict[str, Any]) -> str:
    """Arms, metric and benchmarks of a claim, or why it has none."""
    if claim["untestable"]:
        return f"not here: {claim['untestable']}"
    arms = ", ".join(f"`{arm}`" for arm in claim["arms"])
    out = []
    for benchmark, trial in claim["trials"].items():
        metric = trial["metric"] or claim["experiment"]
        out.append(f"{arms}: {metric}, {claim['direction']} is better, on {benchmark}")
    return "; ".join(out)


def _checked(source: Source) -> str:
    words = f"Fidelity: *{source.about['fidelity']}*."
    if source.about["adaptation"]:
        words += " It is used outside its paper's setting: *adaptation*."
    tests = ", ".join(f"[`tests/{name}`](../../tests/{name})" for name in source.tests)
    contract = f"the contract: `distillbench check {source.name}`"
    return f"{words} Tests: {tests or '*none of its own*'}; {contract}."


def index(
    sources: list[Source], rows: list[Row], known: list[Row], benchmark: str = BENCHMARK
) -> str:
    """All methods side by side on one benchmark, in their default arms at their headline NFE."""
    metrics = [catalogue.metric(name) for name in INDEXED]
    headline = [row for row in rows if row["headline"]]
    body = []
    for source in sources:
        row = _default_arm(source, headline, benchmark)
        cost = _default_arm(source, known, benchmark)
        anatomy = source.anatomy
        line = [f"[{source.about['title']}]({source.name}.md)", source.about["paper"]]
        line.append(fidelity_words(source.about))
        if "error" in anatomy:
            line += [MISSING] * 2
        else:
            line += [costs.trained_words(anatomy), costs.needs_words(anatomy)]
        if cost is None or "calls" not in cost:
            line += [MISSING] * 2
        else:
            line.append(text.fixed(cost["flops_update"] / 1e6, 0))
            line.append(f"{cost['updates']['student']:,}")
        if row is None:
            line += [MISSING] * (1 + len(metrics))
        else:
            line.append(str(row["nfe"] or MISSING))
            line += [metric.cell(row) for metric in metrics]
        boxed = parse(source.name, source.readme).under("Algorithm")
        body.append([*line, "yes" if boxed else "no"])
    columns = [metric.column for metric in metrics]
    head = ["method", "paper", "fidelity", "trains", "needs", "MFLOP / update", "updates", "NFE"]
    table = text.table([*head, *columns, "algorithm box"], body)
    words = (
        f"On {benchmark}, default arm, headline NFE, mean ± sample sd over seeds; {MISSING}: no "
        "published record. Costs in full: [Table 1](../../results/table1.md). Reference rows, "
        "beside which a number has to be read: [Table 2](../../results/table2.md)."
    )
    return "\n".join(["# Methods", "", made_from("*"), "", READERS, "", table, "", words, ""])


def _default_arm(source: Source, rows: Iterable[Row], benchmark: str) -> Row | None:
    """The first row of a method's default arm on a benchmark."""
    for row in rows:
        if (row["method"], row["benchmark"]) == (source.name, benchmark) and not row["variant"]:
            return row
    return None


def pictures(name: str, curves: dict[str, Curves]) -> tuple[list[str], dict[str, bytes]]:
    """Markdown lines and files of the training curves of a method's default arm.

    curves: by table; the first benchmark of the first table that has the arm is drawn.
    """
    for table, found in curves.items():
        for (benchmark, arm), curve in found.items():
            if arm == name and curve["scalars"]:
                words = (
                    "Scalars that `train_step` logs, over the share of the "
                    f"{curve['steps']:,} steps; {benchmark}, seed {curve['seed']}, means over "
                    f"pieces of the run, from the records of [{table}](../../results/{table}.md)."
                )
                image = f"![Training curves of {name}]({name}.png)"
                return [image, "", words], {f"{name}.png": picture(curve)}
    return [], {}


def write(
    sources: list[Source],
    rows: list[Row],
    known: list[Row],
    curves: dict[str, Curves],
    folder: Path,
    write_bytes: text.Write,
) -> None:
    """index.md, and for each method its page and, where a curve is published, its picture."""
    for source in sources:
        lines, files = pictures(source.name, curves)
        for file, data in files.items():
            write_bytes(folder / file, data)
        write_bytes(folder / f"{source.name}.md", page(source, rows, known, lines).encode())
    write_bytes(folder / "index.md", index(sources, rows, known).encode())
