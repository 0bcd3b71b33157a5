"""The findings of an audit: every question, that is a claim on a benchmark, with its values per seed, its effect and its verdict.

A pure function of the questions (`distillbench/audits.py`), of published records and measurements, and of what was frozen when.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from eval.audit import verdicts
from eval.audit.verdicts import EDITED, FEW, LEAST, NOT_RUN, TINY, VERDICTS, Effect
from eval.report.records import Record
from eval.report.rows import DERIVED, Row

# A second metric whose own interval may contradict the first: FID under an extractor of another architecture and objective.
CONTROL = {"fid": "fid_cross"}
SHARES = (
    "precision",
    "recall",
    "coverage",
    "outside",
    "weight_tv",
    "class_error",
    "label_tv",
    "memorisation",
)  # of samples
OTHERS = (
    "refused",
    "over_budget",
)  # statuses of a cell that say nothing about the method's quality
HASH = "claim_hash"
Values = list[float | None]  # per seed, None where the method itself failed
Measured = dict[str, list[dict[str, Any]]]
Frozen = dict[
    str, dict[str, Any]
]  # commit -> {"claims": {id: hash}, "seeds": [...]}, as they stood there


def findings(
    asked: list[Row], records: list[Record], measured: Measured, frozen: Frozen
) -> list[Row]:
    """One finding per question, in their order. See `Finding` keys in docs/audit.md.

    Effects and margins are on the scale of the logarithm, or are rates for an instability.
    """
    found = [_values(q, records, measured) for q in asked]
    _correct(found)
    for one in found:
        _judge(one, frozen)
    return [{key: value for key, value in one.items() if not key.startswith("_")} for one in found]


def _values(question: Row, records: list[Record], measured: Measured) -> Row:
    """The question with its values per arm and seed, the commits behind them, and its effect."""
    nothing = (
        "budget",
        "effect",
        "ci_low",
        "ci_high",
        "p",
        "p_adjusted",
        "p_equivalent",
        "control",
    )
    q = (
        question
        | dict.fromkeys(nothing)
        | {
            "values": {},
            "commits": [],
            "dirty": False,
            "cells": {},
            "seeds_a": 0,
            "seeds_b": 0,
            "_registered": question["why_not"] is None,
        }
    )
    if q["why_not"] is not None:
        return q
    kept: dict[str, dict[int, float | None]] = {}
    control: list[list[float]] = []
    excuses = _failures(q, measured) if q["experiment"] else []
    for arm in q["arms"]:
        own = (
            _quantities(q, arm, measured)
            if q["experiment"]
            else _cells(q, arm, records, q["metric"])
        )
        excuses += [
            why for _, value, about in own if (why := _excuse(q, arm, value, about)) is not None
        ]
        kept[arm] = {seed: value for seed, value, _ in own}
        q["commits"] += [about["provenance"]["commit"] for *_, about in own]
        q["dirty"] |= any(about["provenance"].get("dirty", False) for *_, about in own)
        q["cells"][arm] = {seed: about["key"] for seed, _, about in own}
        if not q["experiment"]:
            q["budget"] = (
                max(
                    [
                        q["budget"] or 0,
                        *(about["cost"].get("limit_flops") or 0 for *_, about in own),
                    ]
                )
                or None
            )
            if q["metric"] in CONTROL:
                control.append(
                    [
                        v
                        for _, v, _ in _cells(q, arm, records, CONTROL[q["metric"]])
                        if v is not None
                    ]
                )
    q["commits"] = sorted({commit or "none" for commit in q["commits"]})
    q["values"] = {
        arm: [kept[arm].get(seed) for seed in q["seeds"] if seed in kept[arm]] for arm in q["arms"]
    }
    if excuses:
        q["why_not"] = excuses[0]
        return q
    missing = {
        arm: len(q["seeds"]) - len(values)
        for arm, values in q["values"].items()
        if len(values) < len(q["seeds"])
    }
    if missing:
        arm, count = next(iter(missing.items()))
        q["why_not"] = f"compute: {count} of {len(q['seeds'])} seeds of {arm} are not there"
        return q
    counts = [sum(v is not None for v in values) for values in q["values"].values()]
    if 0 in counts and q["kind"] != "instability":
        arm = q["arms"][counts.index(0)]
        ended = next(about for *_, about in _cells(q, arm, records, q["metric"]))
        q["why_not"] = (
            f"no seed of {arm} came to an end; seed {ended['seed']} ended as {ended['status']}: {ended['reason']}"
        )
        return q
    q["seeds_a"], q["seeds_b"] = counts[0], min(counts[1:], default=0)
    _effect(q, control)
    return q


def _cells(
    q: Row, arm: str, records: list[Record], metric: str
) -> list[tuple[int, float | None, Row]]:
    """(seed, metric, result) of an arm's records; at the question's NFE, or at the headline NFE of the arm."""
    out = []
    for r in records:
        if (
            r.result["benchmark"] == q["benchmark"]
            and r.arm == arm
            and r.result["seed"] in q["seeds"]
        ):
            nfe = q["nfe"] or r.result["headline_nfe"]
            row = next((row for row in r.rows if row["nfe"] == nfe), None)
            value = (
                None
                if row is None
                else DERIVED[metric](row)
                if metric in DERIVED
                else row.get(metric)
            )
            out.append((r.result["seed"], value, r.result))
    return out


def _excuse(q: Row, arm: str, value: float | None, about: Row) -> str | None:
    """Why a cell says nothing about its method; None where it has a value, or where the method itself failed."""
    if q["experiment"]:
        return None
    status = about["status"]
    if status == "done" and value is None:
        return f"{arm} has no {q['metric']} at {q['nfe'] or about['headline_nfe']} NFE"
    if status in OTHERS or (q["kind"] == "instability" and status not in ("done", "diverged")):
        return f"{arm} seed {about['seed']} ended as {status}: {about['reason']}"
    return None


def _failures(q: Row, measured: Measured) -> list[str]:
    """Why an experiment says nothing of its question."""
    own = [m for m in measured.get(q["experiment"], []) if m["seed"] in q["seeds"]]
    out = [
        f"{q['experiment']} failed on seed {m['seed']}: {m['failed']}" for m in own if "failed" in m
    ]
    known = {name for m in own for name in m["values"]}
    return out + [
        f"{q['experiment']} measures no '{name}'"
        for name in q["arms"]
        if known and name not in known
    ]


def _quantities(q: Row, name: str, measured: Measured) -> list[tuple[int, float | None, Row]]:
    return [
        (m["seed"], m["values"][name], m)
        for m in measured.get(q["experiment"], [])
        if m["seed"] in q["seeds"] and name in m["values"]
    ]


def _effect(q: Row, control: list[list[float]]) -> None:
    """Effect, interval and p-values, before any correction; and whether a second metric says the opposite."""
    lower = q["direction"] == "lower"
    if q["kind"] == "instability":
        failed = [
            sum(_failed(v, q["threshold"], lower) for v in values)
            for values in q["values"].values()
        ]
        d, interval, p = verdicts.instability(
            (failed[0], failed[1]), (len(q["seeds"]), len(q["seeds"]))
        )
        q |= {"effect": d, "p": p, "_least": len(q["seeds"]), "failed": failed}
        q["ci_low"], q["ci_high"] = interval
        q["seeds_a"] = q["seeds_b"] = len(q["seeds"])
        return
    found = _contrast(q, [[v for v in values if v is not None] for values in q["values"].values()])
    m = 0.0 if q["kind"] == "mechanism" and q["value"] is not None else verdicts.margin(q["margin"])
    q |= {
        "effect": found.d,
        "p": found.p(),
        "p_equivalent": found.p_equivalent(m),
        "_found": found,
        "_m": m,
    }
    q["ci_low"], q["ci_high"] = found.interval()
    if control and min(map(len, control)) >= FEW and q["kind"] not in ("parity", "absolute"):
        other = _contrast(q, control)
        low, high = other.interval()
        name, opposite = (
            CONTROL[q["metric"]],
            (low > 0 and found.d < 0) or (high < 0 and found.d > 0),
        )
        q["control"] = {
            "metric": name,
            "effect": other.d,
            "ci_low": low,
            "ci_high": high,
            "conflict": opposite,
        }


def _contrast(q: Row, arms: list[list[float]]) -> Effect:
    least = LEAST if q["metric"] in SHARES else TINY
    return verdicts.effect(
        q["kind"],
        [verdicts.logs(values, least) for values in arms],
        q["direction"] == "lower",
        q["value"],
    )


def _failed(value: float | None, threshold: float | None, lower: bool) -> bool:
    return value is None or (
        threshold is not None and (value > threshold if lower else value < threshold)
    )


def _correct(found: list[Row]) -> None:
    """Holm's adjustment within a paper's primary claims, and within its others; tests of equivalence are families of their own.

    A family has all that were registered to be tried: those without runs count as p = 1, so that no verdict depends on what was run first.
    """
    families: dict[tuple[str, bool, str], list[Row]] = {}
    for q in found:
        if q["_registered"]:
            families.setdefault((q["method"], q["primary"], "p"), []).append(q)
            if q["kind"] != "instability":
                families.setdefault((q["method"], q["primary"], "p_equivalent"), []).append(q)
    for (_, _, key), members in families.items():
        for q, p in zip(
            members,
            verdicts.holm([1.0 if q[key] is None else q[key] for q in members]),
            strict=True,
        ):
            if q[key] is not None:
                q["p_adjusted" if key == "p" else "_p_equivalent"] = p


def _judge(q: Row, frozen: Frozen) -> None:
    """Verdict and reason."""
    if q["why_not"] is not None:
        q["verdict"], q["reason"] = NOT_RUN, q["why_not"]
    elif (why := _edited(q, frozen)) is not None:
        q["verdict"], q["reason"] = EDITED, why
    elif q["kind"] == "instability":
        q["verdict"], q["reason"] = verdicts.decide_instability(
            q["effect"], q["p_adjusted"], q["_least"], q["scale_free"]
        )
    else:
        lost = [sum(v is None for v in q["values"][arm]) for arm in q["arms"]]
        signs = [
            list(signs) for signs in zip(*verdicts.weights_of(q["kind"], len(lost)), strict=True)
        ]  # negative: a low y favours the claim
        both = q["kind"] in ("monotone", "parity")  # every arm is needed
        failed = sum(n for n, arm in zip(lost, signs, strict=True) if both or min(arm) < 0)
        failed_others = sum(n for n, arm in zip(lost, signs, strict=True) if both or max(arm) > 0)
        conflict = None
        if q["control"] and q["control"]["conflict"]:
            conflict = (
                f"{q['control']['metric']} says the opposite, with an interval that excludes 0"
            )
        q["verdict"], q["reason"] = verdicts.decide(
            q["kind"],
            q["_found"],
            q["_m"],
            q["p_adjusted"],
            q["_p_equivalent"],
            q["scale_free"],
            conflict,
            failed,
            failed_others,
        )


def _edited(q: Row, frozen: Frozen) -> str | None:
    """Why a claim does not count as frozen before its runs; None where every commit behind them holds it, and its seeds, as they are."""
    for commit in q["commits"]:
        if commit not in frozen:
            return f"what stood in commit {commit[:12]}, which its runs record, is not known"
        if frozen[commit]["seeds"][: len(q["seeds"])] != q["seeds"]:
            return f"its seeds were others in commit {commit[:12]}, which its runs record"
        then = frozen[commit]["claims"].get(q["id"])
        if then != q[HASH]:
            what = "registered" if then is None else "changed"
            return (
                f"{what} after its runs, which record commit {commit[:12]}: run it on fresh seeds"
            )
    return None


def withdrawn(asked: list[Row], frozen: Frozen) -> list[str]:
    """Ids of claims that stood in a commit behind runs and stand no more."""
    return sorted(
        {i for then in frozen.values() for i in then["claims"]} - {q["id"] for q in asked}
    )


def counts(found: Iterable[Row]) -> dict[str, int]:
    """How many findings have each verdict, in the order of VERDICTS."""
    found = list(found)
    return {v: sum(q["verdict"] == v for q in found) for v in VERDICTS}
