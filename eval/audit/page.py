"""results/<audit>.md, its twins and forest plots: pure functions of `findings.Finding`."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any

import pandas as pd

from eval.audit import verdicts
from eval.audit.findings import Finding, counts
from eval.audit.verdicts import (
    CONTRADICTED,
    EDITED,
    INCONCLUSIVE,
    JUDGED,
    NOT_COMPARABLE,
    NOT_RUN,
    REVERSED,
    SUPPORTED,
    VERDICTS,
)
from eval.catalogue import MISSING
from eval.report import text
from eval.report.records import grouped

COLOURS = {
    SUPPORTED: "tab:green",
    CONTRADICTED: "tab:red",
    REVERSED: "tab:orange",
    INCONCLUSIVE: "tab:gray",
    EDITED: "tab:purple",
    NOT_COMPARABLE: "tab:blue",
}
WIDTH = 48  # characters of a plot of seeds
EDGE = 1.6  # of a forest plot, in log units: a factor of five
Examined = dict[str, dict[str, Any]]  # what was looked into and by how, by `Finding.key`
Pair = tuple[Finding, Finding]  # of the first audit and of its repetition


@dataclass(frozen=True)
class Earlier:
    """An audit on other seeds, which this one repeats."""

    name: str
    seeds: str
    found: list[Finding]


@dataclass(frozen=True)
class Audit:
    """What a page says of an audit besides its findings.

    seeds: in words; cells, measurements: how many were run; command: makes it again; withdrawn: ids
    of claims that stand no more.
    """

    name: str
    seeds: str
    cells: int
    measurements: int
    core_hours: float
    command: str
    withdrawn: list[str] = field(default_factory=list)
    before: Earlier | None = None


def amount(finding: Finding, d: float | None) -> str:
    """An effect in words of the reader: per cent of the metric, or of failure rates."""
    if d is None:
        return MISSING
    if not math.isfinite(d):
        return "∞" if d > 0 else "−∞"
    share = d if finding.kind == "instability" else math.expm1(d)
    if share >= 10:
        return f"×{1 + share:,.0f}"
    words = f"{share:+.0%}" if abs(share) >= 0.1 else f"{share:+.1%}"
    return words.replace("-", "−")


def interval(finding: Finding) -> str:
    """Effect with its 95 % interval, as `amount`."""
    if finding.effect is None:
        return MISSING
    low = amount(finding, finding.ci_low)
    high = amount(finding, finding.ci_high)
    return f"{amount(finding, finding.effect)} ({low} to {high})"


def seeds_words(finding: Finding) -> str:
    """Seeds with a value, of the first arm and of the others where those are fewer or more."""
    if not finding.seeds_a:
        return MISSING
    if len(finding.arms) == 1 or finding.seeds_a == finding.seeds_b:
        return str(finding.seeds_a)
    return f"{finding.seeds_a} / {finding.seeds_b}"


def budget_words(finding: Finding) -> str:
    """The largest budget of its cells."""
    return MISSING if finding.budget is None else f"{finding.budget / 1e12:.2g} TFLOP"


def ground(finding: Finding) -> str:
    """Benchmark and metric by which it was tried."""
    if finding.benchmark is None:
        return MISSING
    return f"{finding.benchmark}, {finding.metric}" if finding.metric else finding.benchmark


def page(title: str, found: list[Finding], about: Audit, examined: Examined) -> str:
    """The whole audit."""
    out = [f"# {title}", "", *_introduction(found, about), ""]
    if about.before is not None:
        out += _repetition(found, about.before)
    out += ["## Verdicts by method", "", _matrix(found), ""]
    for method, own in grouped(found, attrgetter("method")).items():
        out += _method(method, own, about, examined)
    return "\n".join(out).rstrip() + "\n"


def _method(method: str, own: list[Finding], about: Audit, examined: Examined) -> list[str]:
    """The section of one method: verdicts, claims that were not run, evidence."""
    what = f"[What it is](../docs/methods/{method}.md)"
    claims = f"[its claims](../methods/{method}/claims.yaml)"
    out = [f"## {own[0].title}", "", f"{what} · {claims}", ""]
    if any(finding.effect is not None for finding in own):
        image = f"{about.name}/{method}.png"
        out += [f"![Effects of {method}'s claims with their intervals]({image})", ""]
    tried = [finding for finding in own if finding.verdict != NOT_RUN]
    rest = [finding for finding in own if finding.verdict == NOT_RUN]
    if tried:
        out += [_verdict_table(tried, examined), ""]
    if rest:
        body = [[finding.id, finding.where, finding.claim, finding.reason] for finding in rest]
        table = text.table(["claim", "source", "in words", "why"], body)
        out += [f"Not run ({len(rest)}):", "", table, ""]
    for finding in tried:
        out += [*_evidence(finding, examined.get(finding.key), about), ""]
    return out


def _verdict_table(tried: list[Finding], examined: Examined) -> str:
    body = []
    for finding in tried:
        line = [_linked(finding), _verdict(finding, examined), interval(finding)]
        line += [seeds_words(finding), budget_words(finding), ground(finding)]
        body.append([*line, finding.claim, finding.where])
    head = ["claim", "verdict", "effect in its favour (95 %)", "n", "budget", "benchmark, metric"]
    return text.table([*head, "in words", "source"], body)


def _introduction(found: list[Finding], about: Audit) -> list[str]:
    total = counts(found)
    judged = sum(total[verdict] for verdict in JUDGED)
    claims = len(grouped(found, attrgetter("id")))
    methods = len(grouped(found, attrgetter("method")))
    out = [
        f"{claims} claims about {methods} methods, made by their papers or by others, with "
        f"questions of reviews and ours (the source says whose); {judged} verdicts on seeds "
        f"{about.seeds}, which no setting was chosen on. {about.cells} cells and "
        f"{about.measurements} measurements, {about.core_hours:.1f} core-hours. Every verdict "
        "holds at the budget and on the benchmark named beside it, and says nothing beyond them: "
        "these are small networks on small data. The rule, with its error rates: "
        "[docs/audit.md](../docs/audit.md).",
        "",
        "An effect is the relative difference of the metric in the direction that favours the "
        "claim (geometric means over training seeds, Welch's interval); of a monotone claim per "
        "step along its arms, of an interaction the ratio of two ratios, of an instability the "
        "difference of failure rates. SUPPORTED: the interval, corrected for the other claims, "
        "excludes 0 and the effect is at least the margin. CONTRADICTED: reversed, or equivalent "
        "where a gain was claimed. REVERSED_AT_SCALE: reversed here, where the claim speaks of "
        "another scale: a finding about this benchmark, not about the paper, as an equivalence is "
        "that was found for such a claim. EDITED: the claim was not frozen as it stands, with its "
        "seeds, before its runs. The intervals and p printed are uncorrected; verdicts are "
        "corrected for all claims of a method that were registered to be tried, run or not. All "
        f"of it again: `{about.command}`.",
    ]
    if about.withdrawn:
        out += ["", f"Withdrawn after their runs: {', '.join(about.withdrawn)}."]
    return out


def _repetition(found: list[Finding], before: Earlier) -> list[str]:
    """How often an audit agrees with one on other seeds, and every verdict that changed."""
    first = {one.key: one for one in before.found if one.verdict in JUDGED}
    both: list[Pair] = []
    for finding in found:
        if finding.verdict in JUDGED and finding.key in first:
            both.append((first[finding.key], finding))
    changed = [(old, new) for old, new in both if _standing(old) != _standing(new)]
    opposite = sum(map(_is_opposite, changed))
    effects = agree = inside = 0
    for old, new in both:
        if old.effect is None or old.ci_low is None or old.ci_high is None or new.effect is None:
            continue
        if old.ci_low < old.ci_high:
            effects += 1
            agree += (old.effect > 0) == (new.effect > 0)
            inside += old.ci_low <= new.effect <= old.ci_high
    link = f"[{before.name}]({before.name}.md)"
    out = [
        f"## Beside {link}, on seeds {before.seeds}",
        "",
        f"{len(both)} questions have a verdict in both ({len(first) - len(both)} in the first "
        f"alone); {len(changed)} of them another one, {opposite} the opposite one. Effects have "
        f"the same sign in {agree} of {effects}; in {inside} the one found here lies within the "
        "interval found there (in exact repetitions 85 to 87 % would, and all that have no chance "
        "in them).",
        "",
    ]
    if changed:
        body = []
        for old, new in changed:
            line = [_linked(new), _verdict(old), _verdict(new), interval(old), interval(new)]
            body.append([*line, new.claim])
        head = ["claim", f"in {before.name}", "here", "effect there", "effect here", "in words"]
        out += [text.table(head, body), ""]
    return out


def _standing(finding: Finding) -> tuple[str, str]:
    """A verdict without what changes with every run of an INCONCLUSIVE one."""
    reason = "" if finding.verdict == INCONCLUSIVE else finding.reason
    return finding.verdict, reason


def _is_opposite(pair: Pair) -> bool:
    """Whether one of two findings supports the claim and the other is reversed."""
    old, new = pair
    return SUPPORTED in (old.verdict, new.verdict) and "reversed" in (old.reason, new.reason)


def _matrix(found: list[Finding]) -> str:
    """Verdicts by method."""
    body = []
    for own in grouped(found, attrgetter("method")).values():
        claims = len(grouped(own, attrgetter("id")))
        body.append([own[0].title, claims, *(n or "" for n in counts(own).values())])
    claims = len(grouped(found, attrgetter("id")))
    body.append(["**all**", claims, *counts(found).values()])
    heads = [verdict.replace("_", " ") for verdict in VERDICTS]
    return text.table(["method", "claims", *heads], body)


def _linked(finding: Finding) -> str:
    """Id with a link to its evidence; primary claims in bold."""
    mark = "**" if finding.primary else ""
    return f"{mark}[{finding.id}](#{anchor(finding)}){mark}"


def anchor(finding: Finding) -> str:
    """Id of the block of its evidence on the page."""
    return finding.key.lower().replace("/", "-").replace(".", "-")


def _verdict(finding: Finding, examined: Examined | None = None) -> str:
    """Verdict with its reason, and what an examination found in short."""
    words = f"**{finding.verdict.replace('_', ' ')}**"
    if finding.reason:
        words += f" ({finding.reason})"
    short = (examined or {}).get(finding.key, {}).get("short")
    return f"{words}; examined: {short}" if short else words


def _evidence(q: Finding, examined: dict[str, Any] | None, about: Audit) -> list[str]:
    """The folded block of one finding."""
    summary = f"{q.key}: {q.verdict}. {q.claim}"
    out = [f'<details id="{anchor(q)}"><summary>{summary}</summary>', ""]
    kind = q.kind
    if q.kind in ("comparative", "mechanism") and len(q.arms) > 1:
        kind += f" ({' > '.join(q.arms)})"
    rank = "primary" if q.primary else "secondary"
    scale = "scale-free" if q.scale_free else "made at another scale"
    source = f"Source: {q.where}. Kind: {kind}; {rank}; {scale}."
    out += [f"{source} Refuted if: {q.refuted_if}", ""]
    if q.seen_before_freezing:
        seen = f"Seen before freezing: {q.seen_before_freezing}."
        out += [f"{seen} The seeds below are fresh.", ""]
    out += [f"{_trial(q)}:", "", "```", *plot(q), "```", ""]
    seeds = ", ".join(map(str, q.seeds))
    out += [f"Seeds {seeds}. Records: {_records(q, about.name)}.", ""]
    runs = ", ".join(commit[:12] for commit in q.commits)
    if q.dirty:
        runs += " with uncommitted changes"
    out += [f"{_numbers(q)}. Claim {q.claim_hash}, runs of commit {runs}.", ""]
    if examined:
        out += _examination(examined)
    name = "" if about.name == "audit" else f" {about.name}"
    command = f"distillbench audit{name} --claim {q.id} --benchmark {q.benchmark}"
    return [*out, f"Again: `{command}`", "", "</details>"]


def _trial(q: Finding) -> str:
    """What was measured, where, and at which share of the budget."""
    better = f"{q.direction} is better"
    if q.value is not None:
        better += f", compared with {q.value:g}"
    words = f"{q.metric or q.experiment} ({better}) on {q.benchmark}"
    if q.experiment:
        return words
    return f"{words}, share {q.share:g} of the budget, {q.nfe or 'headline'} NFE"


def _numbers(q: Finding) -> str:
    """Effect, p-values and the second metric of a finding."""
    effect = f"effect {interval(q)}"
    if q.kind != "instability" and not q.is_bound:
        effect += f", margin {q.margin:.0%}"
    numbers = [effect, f"p {q.p:.2g}, corrected {q.p_adjusted:.2g}"]
    if q.p_equivalent is not None:
        numbers.append(f"equivalence p {q.p_equivalent:.2g}")
    if q.control is not None:
        low = amount(q, q.control.ci_low)
        high = amount(q, q.control.ci_high)
        numbers.append(f"{q.control.metric} {amount(q, q.control.effect)} ({low} to {high})")
    if all(len(set(values)) <= 1 for values in q.values.values()):
        agree = "all seeds agree to the last digit"
        numbers.append(f"{agree}: interval and p are those of the least sd, 1 %")
    return "; ".join(numbers)


def _examination(examined: dict[str, Any]) -> list[str]:
    where = f" in [{examined['of']}]({examined['of']}.md)" if "of" in examined else ""
    out = [f"Examined{where}:", ""]
    for what in ("bug", "scale", "noise"):
        if what in examined:
            out.append(f"- {what}: {examined[what]}")
    return [*out, ""]


def _records(q: Finding, name: str) -> str:
    """Links to what was measured."""
    if q.experiment:
        e = q.experiment
        return f"[{e}](records/{name}/mechanisms/{e}) by [mechanisms/{e}.py](../mechanisms/{e}.py)"
    return ", ".join(f"[{arm}](records/{name}/{q.benchmark}/{arm})" for arm in q.arms)


def plot(q: Finding) -> list[str]:
    """Values per seed: a line for each arm on one logarithmic axis, then the numbers.

    Where several seeds fall together a digit says how many.
    """
    ys = {}
    for arm, values in q.values.items():
        ys[arm] = [math.log(max(v, q.least)) for v in values if v is not None]
    every = [y for own in ys.values() for y in own]
    low = min(every, default=0.0)
    high = max(every, default=0.0)
    wide = max(map(len, ys))
    out = []
    for arm, own in ys.items():
        marks = _marks(own, low, high)
        middle = f"{math.exp(sum(own) / len(own)):.3g}" if own else MISSING
        numbers = " ".join(MISSING if v is None else f"{v:.3g}" for v in q.values[arm])
        out.append(f"{arm:<{wide}} |{marks}| {middle:>8}: {numbers}")
    return out


def _marks(ys: list[float], low: float, high: float) -> str:
    """One line of a plot of seeds between low and high."""
    places = [0] * WIDTH
    for y in ys:
        at = round((y - low) / (high - low) * (WIDTH - 1)) if high > low else 0
        places[at] += 1
    symbols = " o23456789"
    return "".join(symbols[min(9, count)] for count in places)


def _inside(value: float | None) -> float:
    """A place on the axis of a forest plot; at its edge what lies beyond."""
    if value is None or not math.isfinite(value):
        return math.copysign(EDGE, value or 1)
    return min(EDGE, max(-EDGE, value))


def _marker(effect: float) -> str:
    """A point, or an arrow beyond the edge of a forest plot."""
    if abs(effect) <= EDGE:
        return "o"
    return ">" if effect > 0 else "<"


def forest(found: Sequence[Finding]) -> bytes:
    """PNG: one method's effects with intervals, instabilities left out.

    As per cent of the metric on a logarithmic axis; margins as ticks.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = [q for q in found if q.effect is not None and q.kind != "instability"]
    shown.reverse()  # the first at the top
    height = 0.8 + 0.27 * max(1, len(shown))
    fig, ax = plt.subplots(figsize=(8, height), layout="constrained")
    names = []
    for row, q in enumerate(shown):
        effect = q.effect or 0.0
        colour = COLOURS.get(q.verdict, "black")
        ax.plot([_inside(q.ci_low), _inside(q.ci_high)], [row, row], color=colour, lw=2)
        ax.plot(_inside(effect), row, _marker(effect), color=colour, ms=5)
        margin = verdicts.margin(q.margin or 0.0)
        ax.plot([margin, margin], [row - 0.3, row + 0.3], color="black", lw=0.6)
        names.append(f"{q.key}  {q.verdict.replace('_', ' ')}")
    ax.axvline(0, color="black", lw=0.8)
    ax.set_yticks(range(len(shown)), names, fontsize=7)
    ticks = [0.25, 0.5, 0.75, 1, 1.25, 1.5, 2, 3, 4]
    ax.set_xticks([math.log(t) for t in ticks], [f"{t - 1:+.0%}" for t in ticks], fontsize=7)
    ax.set_xlim(-EDGE * 1.05, EDGE * 1.05)
    ax.set_ylim(-0.7, len(shown) - 0.3)
    axis = "effect in favour of the claim, 95 % interval; tick: margin; arrows: beyond the axis"
    ax.set_xlabel(axis, fontsize=8)
    out = io.BytesIO()
    fig.savefig(out, format="png", dpi=100, metadata={"Software": None})
    plt.close(fig)
    return out.getvalue()


def write(
    title: str,
    found: list[Finding],
    about: Audit,
    examined: Examined,
    folder: Path,
    write_bytes: text.Write,
) -> None:
    """The page, its twins and a forest plot for each method into `folder`."""
    name = about.name
    twins = [finding.twin() for finding in found]
    frame = pd.DataFrame(twins, dtype=object).drop(columns="evidence")
    write_bytes(folder / f"{name}.md", page(title, found, about, examined).encode())
    write_bytes(folder / f"{name}.json", text.json_bytes(twins))
    write_bytes(folder / f"{name}.csv", frame.to_csv(index=False).encode())
    for method, own in grouped(found, attrgetter("method")).items():
        if any(finding.effect is not None for finding in own):
            write_bytes(folder / name / f"{method}.png", forest(own))
