"""Ratios between arms: closed form, coverage of the interval, which rows they are made from."""

import math

import numpy as np
import pytest
from scipy import stats

from eval.report.effects import effects, ratio, section
from eval.report.records import Record


def test_ratio_is_that_of_geometric_means_with_welchs_interval():
    a, b = [1.0, 1.1, 1.2], [2.0, 2.6, 2.2, 2.1]
    x, y = np.log(a), np.log(b)
    va, vb = x.var(ddof=1) / 3, y.var(ddof=1) / 4
    freedom = (va + vb) ** 2 / (va**2 / 2 + vb**2 / 3)
    half = stats.t.ppf(0.975, freedom) * math.sqrt(va + vb)
    middle, low, high = ratio(a, b)
    assert math.log(middle) == pytest.approx(x.mean() - y.mean())
    assert [math.log(low), math.log(high)] == pytest.approx(
        [math.log(middle) - half, math.log(middle) + half]
    )
    back = ratio(b, a)
    assert back == pytest.approx((1 / middle, 1 / high, 1 / low))  # arms exchanged: another number
    pooled = stats.ttest_ind(x, y).confidence_interval(0.95)
    assert abs(pooled.low - math.log(low)) > 1e-3  # equal variances would be another interval
    for bad in (([1.0], b), ([1.0, -1.0], b), ([1.0, 0.0], b)):
        with pytest.raises(ValueError, match="two or more positive"):
            ratio(*bad)


def test_interval_keeps_its_level_at_five_seeds():
    rng = np.random.default_rng(0)
    draws = np.exp(rng.normal(0, 0.03, (2000, 2, 5)))
    covered = np.mean(
        [low <= 1 <= high for _, low, high in (ratio(list(a), list(b)) for a, b in draws)]
    )
    assert 0.935 <= covered <= 0.975


def record(arm: str, seed: int, fid: float, headline: int = 1) -> Record:
    method, _, variant = arm.partition("@")
    result = {
        "benchmark": "digits",
        "method": method,
        "variant": variant or None,
        "seed": seed,
        "headline_nfe": headline,
    }
    rows = [
        {
            "nfe": n,
            "fid": fid * n,
            "fid_cross": None,
            "fid_teacher": -0.1,
            "recall": 0.5,
            "coverage": 0.9,
        }
        for n in (1, 2)
    ]
    return Record(result, {"rows": rows})


def test_effects_are_at_the_first_arms_headline_and_skip_what_has_no_ratio():
    records = [record("a", s, 1.0 + s / 100) for s in range(3)] + [
        record("a@b", s, 2.0 + s / 100, headline=2) for s in range(3)
    ]
    # both at 1, not the second at 2
    assert next(r["ratio"] for r in effects(records, [("a", "a@b")])) == pytest.approx(
        0.5, rel=0.01
    )
    for r in records[3:]:
        r.metrics["rows"] = r.metrics["rows"][1:]  # no samples at 1
    found = {r["metric"]: r for r in effects(records, [("a", "a@b")])}
    # no second extractor, and no logarithm of a negative number
    assert set(found) == {
        "fid",
        "recall",
        "coverage",
    }
    assert (
        found["fid"]["ratio"] == pytest.approx(0.25, rel=0.01) and found["fid"]["seeds_second"] == 3
    )
    assert "| a / a@b | FID      | 0.25" in "\n".join(section(list(found.values())))
    assert effects(records[:4], [("a", "a@b")]) == []  # one seed of the second arm
