"""The section of results/table3.md that sets the papers' ablations beside arms of an audit.

A pure function of the methods' claims.yaml, where the papers' numbers are, and of published
records. In the table's JSON the section is the list `papers`, an entry per reported number with
an arm here:
In the table's JSON the section is the list `papers`, an entry per reported number with an arm here:

    method, title   of the method's folder, and the name it is shown by
    where .. protocol   as in claims.yaml
    here            [{benchmark, share of the budget, metric, n seeds, mean, sd}], one per setting
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from tabulate import tabulate

from eval import catalogue
from eval.report.records import Record
from eval.report.rows import summarise
from eval.report.tables import Appendix

MISSING = "–"
SHARE = re.compile(r"x\d+\.?\d*")  # the part of an arm's name that is its share of the budget

Setting = tuple[str, float, str]  # benchmark, share of the budget, metric


@dataclass(frozen=True)
class Paper:
    """What a method's paper reports: the `reported` entries of its claims.yaml."""

    method: str
    title: str
    reported: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Measured:
    """Mean and sample sd over n seeds of an arm's main metric in one setting."""

    benchmark: str
    share: float
    metric: str
    n: int
    mean: float | None
    sd: float | None

    @property
    def setting(self) -> Setting:
        """Benchmark, share of the budget and metric, which name its column of a page."""
        return self.benchmark, self.share, self.metric


@dataclass(frozen=True)
class Reported:
    """A number of a paper that names an arm here, and what this arm reaches in every setting."""

    method: str
    title: str
    where: str
    setting: str
    metric: str
    value: float
    arm: str
    nfe: int | None
    budget: str | None
    protocol: str | None
    here: tuple[Measured, ...]

    @property
    def table(self) -> tuple[str, str]:
        """The paper's table that it stands in: (title of the method, where)."""
        return self.title, self.where


def beside(papers: Iterable[Paper], records: list[Record]) -> list[Reported]:
    """Every reported number that names an arm, with that arm's values at the same NFE."""
    by_arm = grouped(records)
    found = []
    for paper in papers:
        for entry in paper.reported:
            if entry["arm"] is None:
                continue
            own = by_arm.get(entry["arm"], {})
            here = []
            for (benchmark, share), cells in sorted(own.items()):
                metric, values = values_at(cells, entry["nfe"])
                if values:
                    mean, sd = summarise(values)
                    here.append(Measured(benchmark, share, metric, len(values), mean, sd))
            found.append(Reported(paper.method, paper.title, **entry, here=tuple(here)))
    return found


def grouped(records: list[Record]) -> dict[str, dict[tuple[str, float], list[Record]]]:
    """Finished records by arm less its share of the budget, then by (benchmark, share)."""
    found: dict[str, dict[tuple[str, float], list[Record]]] = {}
    for record in records:
        if record.rows:
            parts = [part for part in record.arm.split("@") if not SHARE.fullmatch(part)]
            share = record.result.get("budget_share", 1.0)
            own = found.setdefault("@".join(parts), {})
            own.setdefault((record.result["benchmark"], share), []).append(record)
    return found


def values_at(records: list[Record], nfe: int | None) -> tuple[str, list[float]]:
    """(main metric, its value per record) at an NFE; at the headline NFE where it is None."""
    rows = []
    for record in records:
        wanted = nfe or record.result["headline_nfe"]
        rows += [row for row in record.rows if row["nfe"] == wanted]
    metric = catalogue.main_metric(catalogue.family_of(rows[0] if rows else {})).name
    return metric, [row[metric] for row in rows]


def markdown(found: list[Reported], audit: str) -> str:
    """The section: a table for each table of a paper of which at least one arm was run."""
    out = [
        "## The papers' ablations beside arms here",
        "",
        "Left what a paper reports, in its own setting; right what the arm of the same kind "
        "reaches here, mean ± sample sd over n seeds, at the same NFE. **Another scale**: other "
        "data, networks, budgets and evaluators. Read down a column, never across: whether the "
        "order is the same (some of the papers' metrics are better when higher) is judged in the "
        f"[{audit}]({audit}.md), from whose records ([{audit}](records/{audit})) the right-hand "
        "side is made.",
        "",
    ]
    measured = dict.fromkeys(r.table for r in found if r.here)
    if not measured:
        out += [f"No arm of results/records/{audit} is published.", ""]
    for title, where in measured:
        own = [r for r in found if r.table == (title, where)]
        out += [f"### {title}, {where}", "", paper_table(own), "", *notes(own)]
    return "\n".join(out).rstrip() + "\n"


def paper_table(own: list[Reported]) -> str:
    """The numbers of one table of a paper, and a column for each setting they were tried in."""
    settings = sorted({m.setting for r in own for m in r.here})
    head = ["the paper's setting", "metric", "reported", "arm here"]
    for benchmark, share, metric in settings:
        head.append(f"{benchmark} at {share:g} of the budget, {catalogue.metric(metric).column}")
    body = []
    for r in own:
        metric = r.metric.upper().replace("_", " ")
        values = [value_in(r, setting) for setting in settings]
        body.append([r.setting, metric, f"{r.value}", f"`{r.arm}`", *values])
    return tabulate(body, head, "github", disable_numparse=True)


def value_in(reported: Reported, setting: Setting) -> str:
    """'mean ± sd (n seeds)' of the arm in a setting."""
    for measured in reported.here:
        if measured.setting == setting:
            metric = catalogue.metric(measured.metric)
            return f"{metric.printed(measured.mean, measured.sd)} (n {measured.n})"
    return MISSING


def notes(own: list[Reported]) -> list[str]:
    """A line on budget and protocol of a paper's table, where the paper says."""
    budgets = [f"budget: {r.budget}" for r in own if r.budget]
    protocols = [f"protocol: {r.protocol}" for r in own if r.protocol]
    words = "; ".join(dict.fromkeys(budgets + protocols))
    return [f"The paper's {words}.", ""] if words else []


def appendix(papers: Iterable[Paper], records: list[Record], audit: str) -> Appendix:
    """The section and its JSON, from the records of the audit of that name."""
    found = beside(papers, records)
    rows = list(map(asdict, found))
    return Appendix("papers", rows, markdown(found, audit))
