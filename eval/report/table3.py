"""results/table3.md: the papers' ablation tables beside our arms of the same kind, clearly another scale. A pure function of files."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tabulate import tabulate

from eval import catalogue
from eval.report.records import Record
from eval.report.rows import Row, summarise

MISSING = "–"
SHARE = re.compile(r"x\d+\.?\d*")  # the part of an arm's name that is its share of the budget


def rows(papers: list[tuple[str, str, Row]], records: list[Record]) -> list[Row]:
    """Per reported number with an arm here: the number, and mean and sd of that arm on every benchmark and share of the budget."""
    own: dict[tuple[str, str, float], list[Record]] = {}
    for r in records:
        name = "@".join(part for part in r.arm.split("@") if not SHARE.fullmatch(part))
        if r.rows:
            own.setdefault(
                (name, r.result["benchmark"], r.result.get("budget_share", 1.0)), []
            ).append(r)
    out = []
    for method, title, claims in papers:
        for reported in claims["reported"]:
            if reported["arm"] is not None:
                mine = [
                    (b, share, _values(found, reported["nfe"]))
                    for (arm, b, share), found in sorted(own.items())
                    if arm == reported["arm"]
                ]
                here = [
                    {"benchmark": b, "share": share, "metric": metric, "n": len(v)}
                    | dict(zip(("mean", "sd"), summarise(v)))
                    for b, share, (metric, v) in mine
                    if v
                ]
                out.append({"method": method, "title": title} | reported | {"here": here})
    return out


def _values(records: list[Record], nfe: int | None) -> tuple[str, list[float]]:
    """The main metric of an arm's records at an NFE, at its headline NFE where a paper's number names none."""
    rows = [
        row for r in records for row in r.rows if row["nfe"] == (nfe or r.result["headline_nfe"])
    ]
    metric = catalogue.main_metric(catalogue.family_of(rows[0] if rows else {})).name
    return metric, [row[metric] for row in rows]


def markdown(found: list[Row], source: str) -> str:
    """The page: a table for each table of a paper of which at least one arm was run."""
    out = [
        "# Table 3: the papers' ablations, run again at our budget",
        "",
        "Left what a paper reports, in its own setting; right what the arm of the same kind reaches here, mean ± sample sd over n seeds, "
        "at the same NFE. **Another scale**: other data, networks, budgets and evaluators. Read down a column, never across: whether "
        "the order is the same (some of the papers' metrics are better when higher) is judged in the [audit](audit.md), from whose records "
        f"([{source}](records/{source})) this page is made.",
        "",
    ]
    tables = dict.fromkeys(
        (r["title"], r["where"])
        for r in found
        if any(x["here"] for x in found if (x["title"], x["where"]) == (r["title"], r["where"]))
    )
    for title, where in tables:
        own = [r for r in found if (r["title"], r["where"]) == (title, where)]
        grounds = sorted(
            {(h["benchmark"], h["share"], h["metric"]) for r in own for h in r["here"]}
        )
        body = []
        for r in own:
            reported = [
                r["setting"],
                r["metric"].upper().replace("_", " "),
                f"{r['value']}",
                f"`{r['arm']}`",
            ]
            body.append(reported + [_here(r, ground) for ground in grounds])
        head = ["the paper's setting", "metric", "reported", "arm here"]
        head += [
            f"{b} at {share:g} of the budget, {catalogue.metric(metric).column}"
            for b, share, metric in grounds
        ]
        out += [
            f"## {title}, {where}",
            "",
            tabulate(body, head, "github", disable_numparse=True),
            "",
        ]
        notes = [
            f"{key}: {words}"
            for key in ("budget", "protocol")
            for words in dict.fromkeys(r[key] for r in own if r[key])
        ]
        out += [f"The paper's {'; '.join(notes)}.", ""] if notes else []
    return "\n".join(out).rstrip() + "\n"


def _here(row: Row, ground: tuple[str, float, str]) -> str:
    for h in row["here"]:
        if (h["benchmark"], h["share"], h["metric"]) == ground:
            metric = catalogue.metric(h["metric"])
            return f"{metric.printed(h['mean'], h['sd'])} (n {h['n']})"
    return MISSING


def write(
    name: str,
    source: str,
    papers: list[tuple[str, str, Row]],
    records: list[Record],
    folder: Path,
    write_bytes: Callable[[Path, bytes], None],
) -> None:
    """results/<name>.md and .json."""
    found: list[dict[str, Any]] = rows(papers, records)
    write_bytes(folder / f"{name}.md", markdown(found, source).encode())
    write_bytes(
        folder / f"{name}.json", (json.dumps(found, indent=1, ensure_ascii=False) + "\n").encode()
    )
