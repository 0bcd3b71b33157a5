"""How much one arm differs from another, from published records: ratios of metrics with an
interval, and no verdict."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from scipy import stats

from eval import catalogue
from eval.catalogue import Metric
from eval.report import text
from eval.report.records import Record, by_arm, by_benchmark
from eval.report.text import significant


def ratio(
    first: list[float], second: list[float], level: float = 0.95
) -> tuple[float, float, float]:
    """Ratio of the geometric means of two arms over seeds, with Welch's interval on logarithms.

    first, second: positive values, two or more of each. Welch keeps its level at 3 to 5 seeds,
    where a bootstrap over seeds does not; seeds that share a teacher are not paired. Raises
    ValueError for other values.
    """
    if not _has_ratio(first, second):
        raise ValueError("a ratio needs two or more positive values of each arm")
    found = stats.ttest_ind(np.log(first), np.log(second), equal_var=False)
    interval = found.confidence_interval(level)
    middle = float(np.mean(np.log(first)) - np.mean(np.log(second)))
    return math.exp(middle), math.exp(interval.low), math.exp(interval.high)


def _has_ratio(first: list[float], second: list[float]) -> bool:
    return min(len(first), len(second)) >= 2 and min(first + second) > 0


def compared() -> list[Metric]:
    """The metrics that arms of a table are compared in."""
    return [metric for metric in catalogue.METRICS if metric.contrast is not None]


def effects(records: list[Record], pairs: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """One row per benchmark, pair of arms and metric with a `contrast`; floats with 6 digits.

    Both arms at the headline NFE of the first; the second at its own where it has no samples at
    that NFE.
    """
    out = []
    for benchmark, own in by_benchmark(records).items():
        arms = by_arm(own)
        for first, second in pairs:
            nfe = _headline(arms.get(first, []))
            of_first = _rows_at(arms.get(first, []), nfe)
            of_second = _rows_at(arms.get(second, []), nfe)
            for metric in compared():
                a = _values(metric, of_first)
                b = _values(metric, of_second)
                if not _has_ratio(a, b):
                    continue
                middle, low, high = ratio(a, b)
                row = {
                    "benchmark": benchmark,
                    "first": first,
                    "second": second,
                    "metric": metric.name,
                    "ratio": significant(middle),
                    "low": significant(low),
                    "high": significant(high),
                    "seeds_first": len(a),
                    "seeds_second": len(b),
                }
                out.append(row)
    return out


def _headline(records: list[Record]) -> int | None:
    """Headline NFE of the first record with samples."""
    for record in records:
        if record.rows:
            return int(record.result["headline_nfe"])
    return None


def _rows_at(records: list[Record], nfe: int | None) -> list[dict[str, Any]]:
    """The rows of records at an NFE; of one without, that at its headline NFE."""
    found = [record.at(nfe) or record.at(None) for record in records]
    return [row for row in found if row is not None]


def _values(metric: Metric, rows: list[dict[str, Any]]) -> list[float]:
    return [value for value in map(metric.value, rows) if value is not None]


def section(rows: Iterable[dict[str, Any]]) -> list[str]:
    """The markdown lines of `effects`."""
    body = []
    for row in rows:
        arms = f"{row['first']} / {row['second']}"
        metric = catalogue.metric(row["metric"]).contrast
        interval = f"{row['low']:.3f} to {row['high']:.3f}"
        seeds = f"{row['seeds_first']} / {row['seeds_second']}"
        body.append([arms, metric, f"{row['ratio']:.3f}", interval, seeds])
    head = ["arms", "metric", "ratio", "95 % interval", "seeds"]
    words = (
        "Ratio of the first arm's metric to the second's (geometric means over training seeds) "
        "with Welch's interval on the logarithms, both at the headline NFE of the first (the "
        "second at its own, where it has no other). Several comparisons stand here and none is "
        "corrected for the others; no verdict is drawn."
    )
    return ["## Differences between arms", "", text.table(head, body), "", words, ""]
