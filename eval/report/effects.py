"""How much one arm differs from another, from published records: ratios of metrics with an interval, and no verdict."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from scipy import stats
from tabulate import tabulate

from eval.report.records import Record

METRICS = {
    "fid": "FID",
    "fid_cross": "FID, second extractor",
    "fid_teacher": "FID to teacher",
    "recall": "recall",
    "coverage": "coverage",
}


def ratio(
    first: list[float], second: list[float], level: float = 0.95
) -> tuple[float, float, float]:
    """Ratio of the geometric means of two arms over seeds and Welch's interval for it, on logarithms.

    first, second: positive values, two or more of each. Welch keeps its level at 3 to 5 seeds, where a bootstrap over seeds
    does not; seeds that share a teacher are not paired. Raises ValueError for other values.
    """
    if min(len(first), len(second)) < 2 or min(first + second) <= 0:
        raise ValueError("a ratio needs two or more positive values of each arm")
    found = stats.ttest_ind(np.log(first), np.log(second), equal_var=False)
    interval = found.confidence_interval(level)
    middle = float(np.mean(np.log(first)) - np.mean(np.log(second)))
    return math.exp(middle), math.exp(interval.low), math.exp(interval.high)


def effects(records: list[Record], pairs: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """One row per benchmark, pair of arms and metric of METRICS; floats with 6 digits.

    Both arms at the headline NFE of the first; the second at its own where it has no samples at that NFE.
    """
    out = []
    for benchmark in sorted({r.result["benchmark"] for r in records}):
        own = [r for r in records if r.result["benchmark"] == benchmark]
        for first, second in pairs:
            nfe = next((r.result["headline_nfe"] for r in own if r.arm == first and r.rows), None)
            rows = [
                [row for r in own if r.arm == arm for row in _at(r, nfe)] for arm in (first, second)
            ]
            for metric in METRICS:
                a, b = (
                    [row[metric] for row in part if row.get(metric) is not None] for part in rows
                )
                if min(len(a), len(b)) < 2 or min(a + b) <= 0:
                    continue
                middle, low, high = (float(f"{v:.6g}") for v in ratio(a, b))
                numbers = {
                    "ratio": middle,
                    "low": low,
                    "high": high,
                    "seeds_first": len(a),
                    "seeds_second": len(b),
                }
                out.append(
                    {
                        "benchmark": benchmark,
                        "first": first,
                        "second": second,
                        "metric": metric,
                        **numbers,
                    }
                )
    return out


def _at(record: Record, nfe: int | None) -> list[dict[str, Any]]:
    """The row at an NFE, or at the headline NFE."""
    return [r for r in record.rows if r["nfe"] == nfe] or [
        r for r in record.rows if r["nfe"] == record.result["headline_nfe"]
    ]


def section(rows: Iterable[dict[str, Any]]) -> list[str]:
    """The markdown lines of `effects`."""
    body = [
        [
            f"{r['first']} / {r['second']}",
            METRICS[r["metric"]],
            f"{r['ratio']:.3f}",
            f"{r['low']:.3f} to {r['high']:.3f}",
            f"{r['seeds_first']} / {r['seeds_second']}",
        ]
        for r in rows
    ]
    head = ["arms", "metric", "ratio", "95 % interval", "seeds"]
    words = (
        "Ratio of the first arm's metric to the second's (geometric means over training seeds) with Welch's interval on the logarithms, "
        "both at the headline NFE of the first (the second at its own, where it has no other). "
        "Several comparisons stand here and none is corrected for the others; no verdict is drawn."
    )
    return [
        "## Differences between arms",
        "",
        tabulate(body, head, "github", disable_numparse=True),
        "",
        words,
        "",
    ]
