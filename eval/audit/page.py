"""results/<audit>.md, its twins, forest plots and Table 3: pure functions of findings (`eval/audit.py`)."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tabulate import tabulate

from eval.audit import verdicts
from eval.audit.findings import HASH, SHARES, counts
from eval.audit.verdicts import (
    CONTRADICTED,
    EDITED,
    INCONCLUSIVE,
    JUDGED,
    LEAST,
    NOT_COMPARABLE,
    NOT_RUN,
    REVERSED,
    SUPPORTED,
    TINY,
    VERDICTS,
)
from eval.report.rows import Row

PUBLISHED = (
    "id",
    "method",
    "kind",
    "where",
    "benchmark",
    "verdict",
    "reason",
    "effect",
    "ci_low",
    "ci_high",
    "margin",
    "seeds_a",
    "seeds_b",
    "budget",
    HASH,
)
EVIDENCE = (
    "claim",
    "refuted_if",
    "scale_free",
    "primary",
    "seen_before_freezing",
    "arms",
    "metric",
    "direction",
    "share",
    "nfe",
    "threshold",
    "value",
    "experiment",
    "seeds",
    "values",
    "p",
    "p_adjusted",
    "p_equivalent",
    "control",
    "commits",
    "dirty",
    "cells",
)
COLOURS = {
    SUPPORTED: "tab:green",
    CONTRADICTED: "tab:red",
    REVERSED: "tab:orange",
    INCONCLUSIVE: "tab:gray",
    EDITED: "tab:purple",
    NOT_COMPARABLE: "tab:blue",
}
WIDTH = 48  # characters of a plot of seeds
MISSING = "–"


def key_of(finding: Row) -> str:
    """A finding's name: id and benchmark."""
    return f"{finding['id']}/{finding['benchmark']}" if finding["benchmark"] else finding["id"]


def twin(finding: Row) -> Row:
    """A finding as audit.json has it: `source` is the claim's place in its paper; numbers with 6 digits."""
    head = {("source" if key == "where" else key): rounded(finding.get(key)) for key in PUBLISHED}
    return head | {"evidence": {key: rounded(finding.get(key)) for key in EVIDENCE}}


def rounded(value: Any) -> Any:
    """As JSON keeps it: floats with 6 digits, None for what is not finite, keys as text."""
    if isinstance(value, dict):
        return {str(k): rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def amount(finding: Row, d: float | None) -> str:
    """An effect in words of the reader: per cent of the metric, or of failure rates."""
    if d is None:
        return MISSING
    if not math.isfinite(d):
        return "∞" if d > 0 else "−∞"
    share = d if finding["kind"] == "instability" else math.expm1(d)
    if share >= 10:
        return f"×{1 + share:,.0f}"
    return (
        f"{share:+.0%}".replace("-", "−")
        if abs(share) >= 0.1
        else f"{share:+.1%}".replace("-", "−")
    )


def interval(finding: Row) -> str:
    if finding["effect"] is None:
        return MISSING
    return f"{amount(finding, finding['effect'])} ({amount(finding, finding['ci_low'])} to {amount(finding, finding['ci_high'])})"


def seeds_words(finding: Row) -> str:
    a, b = finding["seeds_a"], finding["seeds_b"]
    return MISSING if not a else str(a) if len(finding["arms"]) == 1 or a == b else f"{a} / {b}"


def budget_words(finding: Row) -> str:
    return MISSING if finding["budget"] is None else f"{finding['budget'] / 1e12:.2g} TFLOP"


def ground(finding: Row) -> str:
    """Where and by what it was tried."""
    if finding["benchmark"] is None:
        return MISSING
    return finding["benchmark"] + (f", {finding['metric']}" if finding.get("metric") else "")


def page(title: str, name: str, found: list[Row], about: Row, examined: dict[str, Row]) -> str:
    """The whole audit.

    about: seeds, cells, measurements, core_hours, command; `before`: name, seeds and findings of an audit on other seeds, or None.
    examined: by `key_of`, what was looked into and by how.
    """
    out = [
        f"# {title}",
        "",
        *_introduction(found, about),
        "",
        *_again(found, about["before"]),
        "## Verdicts by method",
        "",
        _matrix(found),
        "",
    ]
    for method in dict.fromkeys(q["method"] for q in found):
        own = [q for q in found if q["method"] == method]
        out += [
            f"## {own[0]['title']}",
            "",
            f"[What it is](../docs/methods/{method}.md) · [its claims](../methods/{method}/claims.yaml)",
            "",
        ]
        if any(q["effect"] is not None for q in own):
            out += [
                f"![Effects of {method}'s claims with their intervals]({name}/{method}.png)",
                "",
            ]
        tried = [q for q in own if q["verdict"] != NOT_RUN]
        if tried:
            body = [
                [
                    _id(q),
                    _verdict(q, examined),
                    interval(q),
                    seeds_words(q),
                    budget_words(q),
                    ground(q),
                    q["claim"],
                    q["where"],
                ]
                for q in tried
            ]
            head = [
                "claim",
                "verdict",
                "effect in its favour (95 %)",
                "n",
                "budget",
                "benchmark, metric",
                "in words",
                "source",
            ]
            out += [tabulate(body, head, "github", disable_numparse=True), ""]
        rest = [q for q in own if q["verdict"] == NOT_RUN]
        if rest:
            body = [[q["id"], q["where"], q["claim"], q["reason"]] for q in rest]
            out += [
                f"Not run ({len(rest)}):",
                "",
                tabulate(
                    body, ["claim", "source", "in words", "why"], "github", disable_numparse=True
                ),
                "",
            ]
        for q in tried:
            out += [*_evidence(q, examined.get(key_of(q)), about), ""]
    return "\n".join(out).rstrip() + "\n"


def _introduction(found: list[Row], about: Row) -> list[str]:
    total, n = counts(found), len({q["id"] for q in found})
    run = sum(total[v] for v in JUDGED)
    return [
        f"{n} claims about {len({q['method'] for q in found})} methods, made by their papers or by others, with questions of reviews and "
        f"ours (the source says whose); {run} verdicts on seeds {about['seeds']}, which no setting was chosen on. {about['cells']} cells "
        f"and {about['measurements']} measurements, {about['core_hours']:.1f} core-hours. Every verdict holds at the budget and on the "
        "benchmark named beside it, and says nothing beyond them: these are small networks on small data. The rule, with its error "
        "rates: [docs/audit.md](../docs/audit.md).",
        "",
        "An effect is the relative difference of the metric in the direction that favours the claim (geometric means over training "
        "seeds, Welch's interval); of a monotone claim per step along its arms, of an interaction the ratio of two ratios, of an "
        "instability the difference of failure rates. SUPPORTED: the interval, corrected for the other claims, excludes 0 and the "
        "effect is at least the margin. CONTRADICTED: reversed, or equivalent where a gain was claimed. REVERSED_AT_SCALE: reversed here, "
        "where the claim speaks of another scale: a finding about this benchmark, not about the paper, as an equivalence is that was "
        "found for such a claim. EDITED: the claim was not frozen as it stands, with its seeds, before its runs. The intervals and p "
        "printed are uncorrected; verdicts are corrected for all claims of a method that were registered to be tried, run or not. "
        f"All of it again: `{about['command']}`.",
        *(
            ["", f"Withdrawn after their runs: {', '.join(about['withdrawn'])}."]
            if about.get("withdrawn")
            else []
        ),
    ]


def _again(found: list[Row], before: Row | None) -> list[str]:
    """What an audit on other seeds found of the same questions: how often it agrees, and every verdict that changed."""
    if before is None:
        return []
    first = {key_of(q): q for q in before["found"] if q["verdict"] in JUDGED}
    both = [(first[key_of(q)], q) for q in found if q["verdict"] in JUDGED and key_of(q) in first]
    changed = [(old, new) for old, new in both if _stands(old) != _stands(new)]
    opposite = sum(
        SUPPORTED in (old["verdict"], new["verdict"])
        and "reversed" in (old["reason"], new["reason"])
        for old, new in changed
    )
    effects = [
        (old, new)
        for old, new in both
        if old["effect"] is not None
        and new["effect"] is not None
        and old["ci_low"] < old["ci_high"]
    ]
    inside = sum(old["ci_low"] <= new["effect"] <= old["ci_high"] for old, new in effects)
    agree = sum((old["effect"] > 0) == (new["effect"] > 0) for old, new in effects)
    link = f"[{before['name']}]({before['name']}.md)"
    out = [
        f"## Beside {link}, on seeds {before['seeds']}",
        "",
        f"{len(both)} questions have a verdict in both ({len(first) - len(both)} in the first alone); {len(changed)} of them another one, "
        f"{opposite} the opposite one. Effects have the same sign in {agree} of {len(effects)}; in {inside} the one found here lies within "
        "the interval found there (in exact repetitions 85 to 87 % would, and all that have no chance in them).",
        "",
    ]
    if changed:
        body = [
            [_id(new), _verdict(old), _verdict(new), interval(old), interval(new), new["claim"]]
            for old, new in changed
        ]
        head = ["claim", f"in {before['name']}", "here", "effect there", "effect here", "in words"]
        out += [tabulate(body, head, "github", disable_numparse=True), ""]
    return out


def _stands(q: Row) -> tuple[str, str]:
    """A verdict without what changes with every run of an INCONCLUSIVE one."""
    return q["verdict"], "" if q["verdict"] == INCONCLUSIVE else q["reason"]


def _matrix(found: list[Row]) -> str:
    body = []
    for method in dict.fromkeys(q["method"] for q in found):
        own = [q for q in found if q["method"] == method]
        body.append(
            [own[0]["title"], len({q["id"] for q in own}), *(n or "" for n in counts(own).values())]
        )
    body.append(["**all**", len({q["id"] for q in found}), *counts(found).values()])
    heads = [v.replace("_", " ") for v in VERDICTS]
    return tabulate(body, ["method", "claims", *heads], "github", disable_numparse=True)


def _id(q: Row) -> str:
    """With a link to its evidence; primary claims in bold."""
    mark = "**" if q["primary"] else ""
    return f"{mark}[{q['id']}](#{anchor(q)}){mark}"


def anchor(q: Row) -> str:
    return key_of(q).lower().replace("/", "-").replace(".", "-")


def _verdict(q: Row, examined: dict[str, Row] | None = None) -> str:
    """With its reason, and what an examination found in short."""
    short = (examined or {}).get(key_of(q), {}).get("short")
    return (
        f"**{q['verdict'].replace('_', ' ')}**"
        + (f" ({q['reason']})" if q["reason"] else "")
        + (f"; examined: {short}" if short else "")
    )


def _evidence(q: Row, examined: Row | None, about: Row) -> list[str]:
    """The folded block of one finding."""
    out = [
        f'<details id="{anchor(q)}"><summary>{key_of(q)}: {q["verdict"]}. {q["claim"]}</summary>',
        "",
    ]
    kind = q["kind"] + (
        f" ({' > '.join(q['arms'])})"
        if q["kind"] in ("comparative", "mechanism") and len(q["arms"]) > 1
        else ""
    )
    out += [
        f"Source: {q['where']}. Kind: {kind}; {'primary' if q['primary'] else 'secondary'}; "
        f"{'scale-free' if q['scale_free'] else 'made at another scale'}. Refuted if: {q['refuted_if']}",
        "",
    ]
    if q["seen_before_freezing"]:
        out += [
            f"Seen before freezing: {q['seen_before_freezing']}. The seeds below are fresh.",
            "",
        ]
    better, scale = (
        f"{q['direction']} is better",
        "" if q["value"] is None else f", compared with {q['value']:g}",
    )
    share = (
        ""
        if q["experiment"]
        else f", share {q['share']:g} of the budget, {q['nfe'] or 'headline'} NFE"
    )
    out += [
        f"{q['metric'] or q['experiment']} ({better}{scale}) on {q['benchmark']}{share}:",
        "",
        "```",
        *plot(q),
        "```",
        "",
    ]
    bound = q["kind"] == "instability" or (q["kind"] == "mechanism" and q["value"] is not None)
    numbers = [
        f"effect {interval(q)}" + ("" if bound else f", margin {q['margin']:.0%}"),
        f"p {q['p']:.2g}, corrected {q['p_adjusted']:.2g}",
    ]
    if q["p_equivalent"] is not None:
        numbers.append(f"equivalence p {q['p_equivalent']:.2g}")
    if q["control"]:
        c = q["control"]
        numbers.append(
            f"{c['metric']} {amount(q, c['effect'])} ({amount(q, c['ci_low'])} to {amount(q, c['ci_high'])})"
        )
    out += [f"Seeds {', '.join(map(str, q['seeds']))}. Records: {_records(q, about['name'])}.", ""]
    if not any(len(set(values)) > 1 for values in q["values"].values()):
        numbers.append(
            "all seeds agree to the last digit: interval and p are those of the least sd, 1 %"
        )
    runs = ", ".join(c[:12] for c in q["commits"]) + (
        " with uncommitted changes" if q["dirty"] else ""
    )
    out += ["; ".join(numbers) + f". Claim {q[HASH]}, runs of commit {runs}.", ""]
    if examined:
        where = f" in [{examined['of']}]({examined['of']}.md)" if "of" in examined else ""
        out += [
            f"Examined{where}:",
            "",
            *(
                f"- {what}: {examined[what]}"
                for what in ("bug", "scale", "noise")
                if what in examined
            ),
            "",
        ]
    name = "" if about["name"] == "audit" else f" {about['name']}"
    out += [
        f"Again: `distillbench audit{name} --claim {q['id']} --benchmark {q['benchmark']}`",
        "",
        "</details>",
    ]
    return out


def _records(q: Row, name: str) -> str:
    """Links to what was measured."""
    if q["experiment"]:
        e = q["experiment"]
        return f"[{e}](records/{name}/mechanisms/{e}) by [mechanisms/{e}.py](../mechanisms/{e}.py)"
    return ", ".join(f"[{arm}](records/{name}/{q['benchmark']}/{arm})" for arm in q["arms"])


def plot(q: Row) -> list[str]:
    """Values per seed: a line for each arm on one logarithmic axis, digits where several seeds fall together, then the numbers."""
    least = LEAST if q["metric"] in SHARES else TINY
    y = {
        arm: [math.log(max(v, least)) for v in values if v is not None]
        for arm, values in q["values"].items()
    }
    every = [v for values in y.values() for v in values]
    low, high, wide = min(every, default=0.0), max(every, default=0.0), max(map(len, y))
    out = []
    for arm, values in y.items():
        places = [
            round((v - low) / (high - low) * (WIDTH - 1)) if high > low else 0 for v in values
        ]
        marks = "".join(
            (str(min(9, places.count(i))) if places.count(i) > 1 else "o") if i in places else " "
            for i in range(WIDTH)
        )
        known = [v for v in q["values"][arm] if v is not None]
        numbers = " ".join(MISSING if v is None else f"{v:.3g}" for v in q["values"][arm])
        middle = f"{math.exp(sum(values) / len(values)):.3g}" if known else MISSING
        out.append(f"{arm:<{wide}} |{marks}| {middle:>8}: {numbers}")
    return out


def forest(found: list[Row]) -> bytes:
    """PNG: one method's effects with intervals, as per cent of the metric on a logarithmic axis; margins as ticks."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = [q for q in found if q["effect"] is not None and q["kind"] != "instability"]
    fig, ax = plt.subplots(figsize=(8, 0.8 + 0.27 * max(1, len(shown))), layout="constrained")
    edge = 1.6  # log units: a factor of five
    for row, q in enumerate(reversed(shown)):
        colour = COLOURS.get(q["verdict"], "black")
        inside = lambda v: (
            min(edge, max(-edge, v))
            if v is not None and math.isfinite(v)
            else math.copysign(edge, v or 1)
        )
        ax.plot([inside(q["ci_low"]), inside(q["ci_high"])], [row, row], color=colour, lw=2)
        ax.plot(
            inside(q["effect"]),
            row,
            "o" if abs(q["effect"]) <= edge else ">" if q["effect"] > 0 else "<",
            color=colour,
            ms=5,
        )
        m = verdicts.margin(q["margin"])
        ax.plot([m, m], [row - 0.3, row + 0.3], color="black", lw=0.6)
    ax.axvline(0, color="black", lw=0.8)
    ax.set_yticks(
        range(len(shown)),
        [f"{key_of(q)}  {q['verdict'].replace('_', ' ')}" for q in reversed(shown)],
        fontsize=7,
    )
    ticks = [0.25, 0.5, 0.75, 1, 1.25, 1.5, 2, 3, 4]
    ax.set_xticks([math.log(t) for t in ticks], [f"{t - 1:+.0%}" for t in ticks], fontsize=7)
    ax.set_xlim(-edge * 1.05, edge * 1.05)
    ax.set_ylim(-0.7, len(shown) - 0.3)
    ax.set_xlabel(
        "effect in favour of the claim, 95 % interval; tick: margin; arrows: beyond the axis",
        fontsize=8,
    )
    out = io.BytesIO()
    fig.savefig(out, format="png", dpi=100, metadata={"Software": None})
    plt.close(fig)
    return out.getvalue()


def write(
    name: str,
    title: str,
    found: list[Row],
    about: Row,
    examined: dict[str, Row],
    folder: Path,
    write_bytes: Callable[[Path, bytes], None],
) -> None:
    """The page, its twins and a forest plot for each method into `folder`."""
    twins: list[dict[str, Any]] = [twin(q) for q in found]
    table = io.StringIO()
    writer = csv.DictWriter(
        table,
        [key for key in twins[0] if key != "evidence"],
        extrasaction="ignore",
        lineterminator="\n",
    )
    writer.writeheader()
    writer.writerows(twins)
    write_bytes(folder / f"{name}.md", page(title, name, found, about, examined).encode())
    write_bytes(
        folder / f"{name}.json", (json.dumps(twins, indent=1, ensure_ascii=False) + "\n").encode()
    )
    write_bytes(folder / f"{name}.csv", table.getvalue().encode())
    for method in dict.fromkeys(q["method"] for q in found if q["effect"] is not None):
        write_bytes(
            folder / name / f"{method}.png", forest([q for q in found if q["method"] == method])
        )
