"""docs/methods/<name>.md and index.md: what a method is, what it needs, costs and reaches here. A pure function of the method's folder
and of published records; the prose is the README's own, cut into sections and put into one order.

A README has a title, the paper, a paragraph or more on the idea, a table of equations, and sections: `Algorithm` (a box in the
paper's order), `Cost`, `Deviations ...`, `Where it ...` (fails), and others. What is missing is said.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from eval.report import costs
from eval.report.curves import picture
from eval.report.rows import Row, fidelity_words
from eval.report.tables import SHOWN

TABLES = ("table2", "gaussians")  # whose rows and curves a page shows
BENCHMARK = "digits"  # of the costs and of the index
METRICS = (
    "fid",
    "fid_cross",
    "fid_teacher",
    "recall",
    "coverage",
    "sliced_w2",
    "sliced_w2_floor",
    "modes",
    "weight_tv",
    "outside",
)
LINK = re.compile(
    r"\]\((?!https?://|#|/|\.\./\.\./)([^)\s]+)\)"
)  # relative to the method's folder, and not to the checkout's root
MISSING = "–"


@dataclass(frozen=True)
class Source:
    """What a method's folder says: `about` is its config.yaml, `claims` its claims.yaml, `tests` the names of its test
    files, `anatomy` what distillbench/anatomy.py says of its default arm."""

    name: str
    about: dict[str, Any]
    readme: str
    claims: dict[str, Any]
    tests: list[str]
    anatomy: Row


@dataclass(frozen=True)
class Readme:
    """paper: the first paragraph; idea: paragraphs up to the first table; equations: from there to the first section."""

    paper: str
    idea: str
    equations: str
    sections: dict[str, str]  # in order

    def under(self, start: str) -> list[tuple[str, str]]:
        """(title, text) of the sections whose title begins so."""
        return [
            (title, text)
            for title, text in self.sections.items()
            if title.lower().startswith(start.lower())
        ]


def parse(name: str, text: str) -> Readme:
    """The README of method `name`, links rewritten so that they hold in docs/methods."""
    text = LINK.sub(lambda m: f"](../../methods/{name}/{m[1]})", text)
    parts: list[list[str]] = [[]]
    fenced = False
    for line in text.splitlines():
        fenced ^= line.startswith("```")
        if line.startswith("## ") and not fenced:
            parts.append([line[3:].strip()])
        else:
            parts[-1].append(line)
    head = "\n".join(line for line in parts[0] if not line.startswith("# ")).strip()
    before, _, equations = head.partition("\n|")
    paper, _, idea = before.strip().partition("\n\n")
    sections = {part[0]: "\n".join(part[1:]).strip() for part in parts[1:]}
    return Readme(paper, idea.strip(), ("|" + equations).strip() if equations else "", sections)


def page(source: Source, rows: list[Row], known: list[Row], drawn: list[str]) -> str:
    """The page of one method: `rows` of the tables (with their name as `table`), `known` of eval/costs.py, both of all methods;
    `drawn`: lines that show its pictures, none where no curve is published."""
    name, readme = source.name, parse(source.name, source.readme)
    own, cost = [r for r in rows if r["method"] == name], [r for r in known if r["method"] == name]
    lacks = lambda what: f"*The README has no {what}.*"
    out = [
        f"# {source.about['title']}",
        "",
        made_from(name),
        "",
        readme.paper or lacks("paper"),
        "",
        readme.idea or lacks("idea"),
        "",
    ]
    out += ["## Algorithm", ""]
    box = readme.under("Algorithm")
    out += [
        box[0][1]
        if box
        else lacks("section ‘Algorithm’: the order of updates is known from the code alone"),
        "",
    ]
    out += [
        f"In code: `train_step` of [`methods/{name}/method.py`](../../methods/{name}/method.py), in our convention "
        "([convention](../convention.md)).",
        "",
    ]
    out += [
        "## Needs and cost",
        "",
        _needs(source.anatomy),
        "",
        *_cost(cost),
        "",
        *_texts(readme.under("Cost")),
    ]
    out += ["## Results here", "", *_results(own), "", *_texts(readme.under("Where it"), "### ")]
    out += ["## Training", "", *(drawn or ["No training curve is published with the records."]), ""]
    out += ["## Reported by the paper", "", *_reported(source.claims), ""]
    out += [
        "## What was checked against what",
        "",
        *_checked(source),
        "",
        readme.equations or lacks("table of equations"),
        "",
    ]
    deviations = readme.under("Deviations")
    out += (
        _texts(deviations, "## ")
        if deviations
        else ["## Deviations", "", lacks("section ‘Deviations’"), ""]
    )
    shown = {
        title
        for start in ("Algorithm", "Cost", "Where it", "Deviations")
        for title, _ in readme.under(start)
    }
    out += _texts(
        [(title, text) for title, text in readme.sections.items() if title not in shown], "## "
    )
    return "\n".join(out).rstrip() + "\n"


def made_from(name: str) -> str:
    """The first lines: where to edit."""
    return f"<!-- Made by `distillbench pages` from methods/{name} and results/records: edit those. -->"


def _texts(sections: list[tuple[str, str]], heading: str | None = None) -> list[str]:
    return [
        line
        for title, text in sections
        for line in ([f"{heading}{title}", ""] if heading else []) + [text, ""]
    ]


def _needs(anatomy: Row) -> str:
    if "error" in anatomy:
        return f"*It cannot be built here: {anatomy['error']}.*"
    needs = anatomy["needs"]
    nfe = ", ".join(f"**{n}**" if n == needs["headline_nfe"] else str(n) for n in needs["nfe"])
    return f"Needs: {costs.needs_words(anatomy)}. Trains: {costs.trained_words(anatomy)}. NFE: {nfe} (headline in bold)."


def _cost(known: list[Row]) -> list[str]:
    """The metered cost of one update, an arm a line; Table 1 explains the columns."""
    if not known:
        return ["No record of this method is published."]
    body, notes = [], []
    for r in known:
        if "calls" not in r:
            notes.append(f"`{_arm(r)}` on {r['benchmark']}: {r['status']}.")
            continue
        calls = ", ".join(
            f"{role.replace('.tangent', ' tangent')} {costs.evaluations(r, lambda other, role=role: other == role)}"  # type: ignore[misc]
            for role in r["calls"]
            if not role.endswith(".backward")
        )
        ratio = f" ({r['ratio']:.3f} of the minimum)" if r.get("ratio") else ""
        body.append(
            [
                r["benchmark"],
                f"`{_arm(r)}`",
                calls,
                f"{r['flops_update'] / 1e6:.0f}{ratio}",
                f"{r['updates']['student']:,}",
                f"{r['seconds_update']:.3f}",
            ]
        )
    head = [
        "benchmark",
        "arm",
        "one update of the student: calls (rows)",
        "MFLOP",
        "updates bought",
        "s / update",
    ]
    table = [tabulate(body, head, "github", disable_numparse=True), ""] if body else []
    return [
        *table,
        *notes,
        "What the columns mean, beside other methods: [Table 1](../../results/table1.md).",
    ]


def _arm(row: Row) -> str:
    return row["method"] + (f"@{row['variant']}" if row["variant"] else "")


def _results(rows: list[Row]) -> list[str]:
    if not rows:
        return ["No record of this method is published."]
    out: list[str] = []
    for table in dict.fromkeys(r["table"] for r in rows):
        part = [r for r in rows if r["table"] == table]
        metrics = [m for m in METRICS if any(r.get(f"{m}_mean") is not None for r in part)]
        body = []
        for r in part:
            nfe = (
                MISSING
                if r["nfe"] is None
                else f"**{r['nfe']}**"
                if r["headline"]
                else str(r["nfe"])
            )
            values = [_value(r, m) for m in metrics]
            body.append(
                [
                    r["benchmark"],
                    f"`{_arm(r)}`",
                    nfe,
                    *values,
                    str(r["seeds"]),
                    r["status"].replace("|", "\\|"),
                ]
            )
        head = ["benchmark", "arm", "NFE", *(SHOWN[m][0] for m in metrics), "n", "status"]
        table_ = tabulate(body, head, "github", disable_numparse=True)
        out += [
            f"From [{table}](../../results/{table}.md), mean ± sample sd over n seeds, headline NFE in bold:",
            "",
            table_,
            "",
        ]
    return out[:-1]


def _value(row: Row, metric: str) -> str:
    mean, sd = row.get(f"{metric}_mean"), row.get(f"{metric}_sd")
    _, scale, digits = SHOWN[metric]
    return (
        MISSING
        if mean is None
        else f"{mean * scale:.{digits}f}" + (f" ± {sd * scale:.{digits}f}" if sd else "")
    )


def _reported(claims: dict[str, Any]) -> list[str]:
    """claims.yaml: numbers in the papers' own settings, and what arms of this suite can test."""
    if not claims["reported"]:
        out = ["claims.yaml has no reported number."]
    else:
        body = [
            [
                r["metric"].upper().replace("_", " "),
                f"{r['value']:g}",
                MISSING if r["nfe"] is None else r["nfe"],
                r["setting"],
                r["where"],
                f"`{r['arm']}`" if r["arm"] else MISSING,
            ]
            for r in claims["reported"]
        ]
        head = ["metric", "value", "NFE", "setting", "where", "arm of the same kind here"]
        out = [
            tabulate(body, head, "github", disable_numparse=True),
            "",
            "Other data, models and budgets than ours: not comparable.",
        ]
    if claims["claims"]:
        body = [
            [f"[{c['id']}](../../results/audit.md)", c["claim"], c["where"], c["kind"], _test(c)]
            for c in claims["claims"]
        ]
        out += [
            "",
            tabulate(
                body,
                ["claim", "in words", "where", "kind", "tested by"],
                "github",
                disable_numparse=True,
            ),
        ]
        out += [
            "",
            "What came out: [audit](../../results/audit.md). How a verdict is drawn: [audit.md](../audit.md).",
        ]
    return out


def _test(claim: dict[str, Any]) -> str:
    """Arms, metric and grounds of a claim, or why it has none."""
    if claim["untestable"]:
        return f"not here: {claim['untestable']}"
    arms = ", ".join(f"`{arm}`" for arm in claim["arms"])
    better = f", {claim['direction']} is better"
    return "; ".join(
        f"{arms}: {t['metric'] or claim['experiment']}{better}, on {b}"
        for b, t in claim["trials"].items()
    )


def _checked(source: Source) -> list[str]:
    about = source.about
    adaptation = (
        " It is used outside its paper's setting: *adaptation*." if about["adaptation"] else ""
    )
    tests = (
        ", ".join(f"[`tests/{t}`](../../tests/{t})" for t in source.tests) or "*none of its own*"
    )
    return [
        f"Fidelity: *{about['fidelity']}*.{adaptation} Tests: {tests}; the contract: `distillbench check {source.name}`."
    ]


def index(
    sources: list[Source], rows: list[Row], known: list[Row], benchmark: str = BENCHMARK
) -> str:
    """All methods side by side on one benchmark, each at its headline NFE and in its default arm."""
    body = []
    for s in sources:
        mine = lambda r, name=s.name: (
            r["method"] == name and not r["variant"] and r["benchmark"] == benchmark
        )  # type: ignore[misc]
        cost, row = (
            next(filter(mine, known), None),
            next((r for r in rows if mine(r) and r["headline"]), None),
        )
        metered, built = (
            cost if cost is not None and "calls" in cost else None,
            "error" not in s.anatomy,
        )
        line = [f"[{s.about['title']}]({s.name}.md)", s.about["paper"], fidelity_words(s.about)]
        line += (
            [costs.trained_words(s.anatomy), costs.needs_words(s.anatomy)]
            if built
            else [MISSING] * 2
        )
        line += (
            [f"{metered['flops_update'] / 1e6:.0f}", f"{metered['updates']['student']:,}"]
            if metered
            else [MISSING] * 2
        )
        line += (
            [
                str(row["nfe"] or MISSING),
                *(_value(row, m) for m in ("fid", "fid_teacher", "recall")),
            ]
            if row
            else [MISSING] * 4
        )
        body.append([*line, "yes" if parse(s.name, s.readme).under("Algorithm") else "no"])
    head = ["method", "paper", "fidelity", "trains", "needs", "MFLOP / update", "updates", "NFE"]
    head += ["FID ↓", "FID to teacher ↓", "recall ↑", "algorithm box"]
    words = (
        f"On {benchmark}, default arm, headline NFE, mean ± sample sd over seeds; {MISSING}: no published record. Costs in full: "
        "[Table 1](../../results/table1.md). Reference rows, beside which a number has to be read: [Table 2](../../results/table2.md)."
    )
    table = tabulate(body, head, "github", disable_numparse=True)
    return "\n".join(["# Methods", "", made_from("*"), "", table, "", words, ""])


def pictures(
    name: str, curves: dict[str, dict[tuple[str, str], dict[str, Any]]]
) -> tuple[list[str], dict[str, bytes]]:
    """Markdown lines and files of a method's training curves: its default arm, on the first benchmark of the first table that has it."""
    for table, found in curves.items():
        for (benchmark, arm), curve in found.items():
            if arm == name and curve["scalars"]:
                words = (
                    f"Scalars that `train_step` logs, over the share of the {curve['steps']:,} steps; {benchmark}, seed {curve['seed']}, "
                    f"means over pieces of the run, from the records of [{table}](../../results/{table}.md)."
                )
                return [f"![Training curves of {name}]({name}.png)", "", words], {
                    f"{name}.png": picture(curve)
                }
    return [], {}


def write(
    sources: list[Source],
    rows: list[Row],
    known: list[Row],
    curves: dict[str, dict[tuple[str, str], dict[str, Any]]],
    folder: Path,
    write_bytes: Callable[[Path, bytes], None],
) -> None:
    """index.md, and for each method its page and, where a curve is published, its picture, into `folder`."""
    for source in sources:
        lines, files = pictures(source.name, curves)
        for file, data in files.items():
            write_bytes(folder / file, data)
        write_bytes(folder / f"{source.name}.md", page(source, rows, known, lines).encode())
    write_bytes(folder / "index.md", index(sources, rows, known).encode())
