"""The verdict engine: statistics against scipy, its rule line by line, error rates."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from eval.audit import verdicts
from eval.audit.verdicts import (
    CONTRADICTED,
    FLOOR,
    INCONCLUSIVE,
    LEVEL,
    NOT_COMPARABLE,
    REVERSED,
    SUPPORTED,
)

M = verdicts.margin(0.02)


def judge(arms, kind="comparative", m=M, lower=True, scale_free=True, value=None, **more):
    """The verdict where the claim is alone in its family."""
    found = verdicts.effect(kind, arms, lower, value)
    return verdicts.decide(kind, found, m, found.p(), found.p_equivalent(m), scale_free, **more)


def test_a_comparison_is_welchs():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 0.05, 7), rng.normal(0.04, 0.2, 4)
    found, scipy = (
        verdicts.effect("comparative", [a, b], True),
        stats.ttest_ind(b, a, equal_var=False),
    )
    interval = scipy.confidence_interval(0.95)
    assert found.p() == pytest.approx(scipy.pvalue, rel=1e-9) and found.least == 4
    assert found.interval() == pytest.approx((interval.low, interval.high), rel=1e-9)
    assert verdicts.effect("comparative", [a, b], False).d == -found.d


def test_equivalence_is_two_one_sided_tests():
    rng = np.random.default_rng(1)
    a, b, m = rng.normal(0, 0.1, 9), rng.normal(0.05, 0.1, 9), 0.2
    found = verdicts.effect("comparative", [a, b], True)
    upper = stats.ttest_ind(b - m, a, equal_var=False, alternative="less").pvalue
    lower = stats.ttest_ind(b + m, a, equal_var=False, alternative="greater").pvalue
    assert found.p_equivalent(m) == pytest.approx(max(upper, lower), rel=1e-9)
    low, high = found.interval(0.1)
    assert (found.p_equivalent(m) <= LEVEL) == (-m <= low and high <= m)


def test_equal_values_are_not_certain():
    found = verdicts.effect("comparative", [[0.0] * 5, [0.03] * 5], True)
    assert found.se == pytest.approx(FLOOR * (2 / 5) ** 0.5)


def test_slope_on_rank_and_difference_of_differences():
    arms = [[x, x + 0.01, x - 0.01] for x in (3.0, 2.5, 2.3, 1.0)]
    slope = stats.linregress([0, 1, 2, 3], [3.0, 2.5, 2.3, 1.0]).slope
    assert verdicts.effect("monotone", arms, True).d == pytest.approx(-slope)
    assert verdicts.effect("monotone", arms, False).d == pytest.approx(slope)
    assert verdicts.effect("mechanism", arms, True).d == pytest.approx(-slope)
    assert verdicts.effect("interaction", arms, True).d == pytest.approx((2.5 - 3.0) - (1.0 - 2.3))


def test_an_interior_optimum_must_beat_both_ends():
    inner, good, bad = [1.0, 1.01, 0.99], [0.5, 0.51, 0.49], [1.5, 1.51, 1.49]
    assert judge([inner, bad, bad], "interior optimum") == (SUPPORTED, "provisional")
    assert judge([inner, good, bad], "interior optimum") == (CONTRADICTED, "reversed")
    assert judge([inner, bad, good], "interior optimum") == (CONTRADICTED, "reversed")
    close = [1.045, 1.046, 1.044]  # certainly better than this end, by less than the margin
    assert judge([inner, close, bad], "interior optimum", m=0.06)[0] != SUPPORTED
    one, both = (
        verdicts.effect("comparative", [inner, bad], True),
        verdicts.effect("interior optimum", [inner, bad, bad], True),
    )
    assert both.p() == pytest.approx(2 * one.p()) and both.interval()[0] < one.interval()[0]


def around(middle, n=5, sd=0.01):
    """n values with this mean and sample sd."""
    z = np.linspace(-1, 1, n)
    return list(middle + sd * z / z.std(ddof=1))


@pytest.mark.parametrize(
    ("arms", "more", "expected"),
    [
        ([around(1), around(1.5, 2)], {}, (INCONCLUSIVE, "underpowered: 2 seeds in an arm")),
        (
            [around(1), around(1.5)],
            {"conflict": "fid_cross -8 %"},
            (INCONCLUSIVE, "metric conflict: fid_cross -8 %"),
        ),
        ([around(1.5), around(1)], {}, (CONTRADICTED, "reversed")),
        ([around(1.5), around(1)], {"scale_free": False}, (REVERSED, "reversed")),
        ([around(1, 10), around(1, 10)], {}, (CONTRADICTED, "equivalent")),
        ([around(1, 10), around(1, 10)], {"scale_free": False}, (CONTRADICTED, "equivalent")),
        ([around(1), around(1.5)], {}, (SUPPORTED, "")),
        ([around(1, 4), around(1.5)], {}, (SUPPORTED, "provisional")),
        (
            [around(1), around(1.5)],
            {"failed": 1},
            (INCONCLUSIVE, "1 seeds of the arms that the effect favours failed"),
        ),
        ([around(1.5), around(1)], {"failed": 1}, (CONTRADICTED, "reversed")),
        (
            [around(1.5), around(1)],
            {"failed_others": 1},
            (INCONCLUSIVE, "1 seeds of the arms that the effect favours failed"),
        ),
        ([around(1), around(1.5)], {"failed_others": 1}, (SUPPORTED, "")),
        (
            [around(1, 50), around(1.018, 50)],
            {},
            (INCONCLUSIVE, "the effect is below the margin"),
        ),  # and not equivalent to it
        ([around(1, 5, 0.3), around(1.1, 5, 0.3)], {}, (INCONCLUSIVE, "detectable gap")),
    ],
)
def test_the_first_match_wins(arms, more, expected):
    verdict, reason = judge(arms, **more)
    assert verdict == expected[0] and reason.startswith(expected[1])
    if "detectable" in expected[1]:
        assert int(reason.rpartition(" ")[2]) > 50


def test_parity_is_supported_by_equivalence_alone():
    assert judge([around(1, 10), around(1, 10)], "parity") == (SUPPORTED, "equivalent")
    assert judge([around(1.5), around(1)], "parity") == (CONTRADICTED, "reversed")
    assert judge([around(1), around(1.5)], "parity") == (INCONCLUSIVE, "not equal: better")
    assert judge([around(1, 5, 0.3), around(1, 5, 0.3)], "parity")[0] == INCONCLUSIVE


def test_an_absolute_number_is_met_within_its_tolerance():
    """The number of a paper, which another protocol never contradicts."""
    paper = 2.0

    def y(value):
        return [around(np.log(value))]

    assert judge(y(2.0), "absolute", value=paper) == (SUPPORTED, "within the tolerance")
    # its upper bound is above 2.1
    assert judge(y(2.09), "absolute", value=paper)[0] == INCONCLUSIVE
    assert judge(y(3.0), "absolute", value=paper, scale_free=False)[0] == NOT_COMPARABLE
    assert judge(y(3.0), "absolute", value=paper) == (CONTRADICTED, "above the tolerance")
    assert judge(y(3.0), "mechanism", value=paper) == (CONTRADICTED, "reversed")
    assert judge(y(3.0), "mechanism", value=paper, lower=False) == (SUPPORTED, "")


def test_divergence_is_fishers():
    difference, (low, high), p = verdicts.instability((5, 0), (5, 5))
    assert difference == 1 and p == pytest.approx(2 / 252) and 0.3 < low < 1 == high
    assert verdicts.decide_instability(difference, p, 5, False) == (SUPPORTED, "")
    assert verdicts.decide_instability(-difference, p, 5, False) == (REVERSED, "reversed")
    assert (
        verdicts.decide_instability(0.2, verdicts.instability((1, 0), (5, 5))[2], 5, True)[0]
        == INCONCLUSIVE
    )
    assert verdicts.decide_instability(1, 0.0, 2, True)[0] == INCONCLUSIVE


def test_holm():
    assert verdicts.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert verdicts.holm([]) == [] and verdicts.holm([0.5, 0.9]) == [1.0, 1.0]


def test_what_runs_later_takes_no_significance_back():
    """A claim that has not run counts as p = 1: whatever it becomes, no other adjusted p grows."""
    rng = np.random.default_rng(6)
    for _ in range(300):
        ps = rng.uniform(size=8) ** 3
        waiting = rng.uniform(size=8) < 0.5
        before, after = (
            verdicts.holm(np.where(waiting, 1.0, ps).tolist()),
            verdicts.holm(ps.tolist()),
        )
        assert all(a <= b + 1e-12 for a, b, w in zip(after, before, waiting) if not w)
    # Planted: a family of those that have run
    alone, both = (
        verdicts.holm([0.03]),
        verdicts.holm([0.03, 0.04]),
    )
    assert both[0] > alone[0]


@pytest.mark.parametrize("n", [5, 10])
def test_how_often_a_repetition_is_inside_the_first_interval(n: int):
    """What results/audit-again.md says of exact repetitions: 85 to 87 %."""
    rng, inside, runs = np.random.default_rng(7), 0, 4000
    for _ in range(runs):
        first, second = (
            verdicts.effect("comparative", rng.normal(0, 0.05, (2, n)), True) for _ in range(2)
        )
        low, high = first.interval()
        inside += low <= second.d <= high
    assert abs(inside / runs - {5: 0.87, 10: 0.85}[n]) < 0.02


def test_holm_keeps_the_error_of_a_family():
    """A false verdict of ten true nulls in at most 5 % of papers, where single tests give 40 %."""
    rng, wrong, alone, runs = np.random.default_rng(5), 0, 0, 800
    for _ in range(runs):
        found = [
            verdicts.effect("comparative", rng.normal(0, 0.05, (2, 5)), True) for _ in range(10)
        ]
        wrong += min(verdicts.holm([e.p() for e in found])) <= LEVEL
        alone += min(e.p() for e in found) <= LEVEL
    assert wrong / runs <= 0.05 + 3 * (0.05 * 0.95 / runs) ** 0.5 and alone / runs > 0.3


def rates(
    gap: float, n: int, noise: str, runs: int = 2000, cov: float = 0.013
) -> dict[tuple[str, str], float]:
    """Share of each verdict where the first arm is better by `gap` on the scale of y.

    The margin is 0.02.
    """
    rng = np.random.default_rng([int(1000 * gap), n, len(noise)])
    z = (
        rng.normal(size=(runs, 2, n))
        if noise == "normal"
        else rng.standard_t(4, (runs, 2, n)) / 2**0.5
    )
    y = cov * z + np.array([0.0, gap])[:, None]
    found = [judge(arms, m=0.02) for arms in y]
    plain = [
        (verdict, reason.split(",")[0] if verdict == CONTRADICTED else "")
        for verdict, reason in found
    ]
    return {key: plain.count(key) / runs for key in set(plain)}


@pytest.mark.parametrize("noise", ["normal", "t4"])
@pytest.mark.parametrize("n", [3, 5, 10])
def test_the_rule_by_simulation(n: int, noise: str):
    """The rates that docs/audit.md states; bounds with three standard errors of 2,000 runs."""

    def above(p):
        return p + 3 * (p * (1 - p) / 2000) ** 0.5

    none, double, single = rates(0.0, n, noise), rates(0.04, n, noise), rates(0.02, n, noise)
    assert none.get((SUPPORTED, ""), 0) <= 0.01  # false support, the bar
    assert none.get((SUPPORTED, ""), 0) <= above(0.006) and none.get(
        (CONTRADICTED, "reversed"), 0
    ) <= above(0.02)
    low, high = {3: (0.71, 0.77), 5: (0.96, 0.98), 10: (0.997, 1.0)}[n]
    slack = 3 * (low * (1 - low) / 2000) ** 0.5
    assert low - slack <= double[SUPPORTED, ""] <= high + slack
    assert single.get((CONTRADICTED, "equivalent"), 0) <= above(0.045)


def test_the_simulation_can_fail():
    """Without a margin, differences of nothing are supported as often as the level says."""
    none = np.random.default_rng(3).normal(0, 0.013, (2000, 2, 5))
    assert sum(judge(y, m=0.0)[0] == SUPPORTED for y in none) / 2000 > 0.01
