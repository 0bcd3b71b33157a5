"""From the metric of every seed to the verdict on a claim: the rule of docs/audit.md, in the order
in which it is applied.

The unit is a training seed. y is the logarithm of the metric, one value a seed; d is a contrast of
the arms' mean y, oriented so that positive favours the claim, and m the margin on the same scale.
Every function is pure and knows no file. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf, log, log1p, sqrt
from operator import attrgetter

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats
from scipy.special import stdtr, stdtrit  # Student's t: distribution and quantile

LEVEL = 0.05  # of a family, two-sided; of equivalence each of two one-sided tests
FLOOR = 0.01  # least sd of y in an arm: a few seeds that agree by chance prove nothing
LEAST = 1e-4  # the least share that is told from zero, for the logarithm: one in 10,000 samples
TINY = 1e-9  # the same of any other quantity
TOLERANCE = 0.05  # of a paper's absolute number
FEW = 3  # seeds in an arm below which there is no verdict
PROVISIONAL = 5  # seeds in an arm below which a verdict is provisional
POWER = 0.8
MOST = 1000  # seeds that are asked for
SUPPORTED = "SUPPORTED"
CONTRADICTED = "CONTRADICTED"
REVERSED = "REVERSED_AT_SCALE"
INCONCLUSIVE = "INCONCLUSIVE"
NOT_RUN = "NOT_RUN"
NOT_COMPARABLE = "NOT_COMPARABLE"
EDITED = "EDITED"
JUDGED = (SUPPORTED, CONTRADICTED, REVERSED, INCONCLUSIVE)  # from runs
VERDICTS = (*JUDGED, NOT_RUN, NOT_COMPARABLE, EDITED)


@dataclass(frozen=True)
class Effect:
    """A contrast d with its standard error and Welch-Satterthwaite degrees of freedom.

    least: seeds in the smallest arm; ways: of how many such contrasts this is the least favourable,
    each of which must hold; smallest: the smallest d among them. Without degrees of freedom (dof 0)
    nothing is known of it.
    """

    d: float
    se: float
    dof: float
    least: int
    ways: int = 1
    smallest: float = inf

    def interval(self, level: float = LEVEL) -> tuple[float, float]:
        """Two-sided interval of coverage 1 - level over all ways."""
        half = inf
        if self.dof > 0:
            half = -self.se * float(stdtrit(self.dof, level / 2 / self.ways))
        return self.d - half, self.d + half

    def p(self) -> float:
        """Two-sided p-value of d = 0."""
        if not self.dof > 0:
            return 1.0
        return min(1.0, 2 * self.ways * float(stdtr(self.dof, -abs(self.d) / self.se)))

    def p_equivalent(self, m: float) -> float:
        """p-value of |d| >= m, by two one-sided tests."""
        if not self.dof > 0:
            return 1.0
        return min(1.0, self.ways * float(stdtr(self.dof, -(m - abs(self.d)) / self.se)))

    def detectable(self) -> float:
        """The gap that these seeds detect with a power of 80 %."""
        if not self.dof > 0:
            return inf
        return -self.se * float(stdtrit(self.dof, LEVEL / 2) + stdtrit(self.dof, 1 - POWER))

    def seeds_needed(self, gap: float) -> int | None:
        """Seeds per arm to detect `gap` with that power at the spread seen; None above MOST."""
        if not self.dof > 0:
            return None
        unit = self.se * sqrt(self.least)
        for n in range(2, MOST + 1):
            dof = 2 * n - 2
            quantiles = stdtrit(dof, LEVEL / 2) + stdtrit(dof, 1 - POWER)
            if -unit / sqrt(n) * quantiles <= gap:
                return n
        return None


def logs(values: Sequence[float], least: float = TINY) -> list[float]:
    """y of values that are not negative; those below `least` count as `least`."""
    return [log(max(v, least)) for v in values]


def contrast(arms: Sequence[ArrayLike], weights: Sequence[float]) -> Effect:
    """sum_i w_i mean(y_i), arms independent: y per seed [n_i]. Each arm's sd is at least FLOOR."""
    ys = [np.asarray(y, float) for y in arms]
    weighted = list(zip(weights, ys, strict=True))
    d = float(sum(w * y.mean() for w, y in weighted if len(y)))
    least = min(map(len, ys))
    if least < 2:
        return Effect(d, inf, 0, least)
    parts = []
    squares = []
    for w, y in weighted:
        part = w**2 * max(float(np.var(y, ddof=1)), FLOOR**2) / len(y)
        parts.append(part)
        squares.append(part**2 / (len(y) - 1))
    dof = sum(parts) ** 2 / sum(squares)
    return Effect(d, sqrt(sum(parts)), dof, least)


def weights_of(kind: str, arms: int) -> list[list[float]]:
    """Contrasts of mean y that are positive where a lower metric favours a claim of this kind.

    Several must all hold. monotone: the slope of y on the arm's rank. Kinds and the order of arms:
    `distillbench/registry/claims.py`.
    """
    if kind == "interior optimum":
        return [[-1, 1, 0], [-1, 0, 1]]
    if kind == "interaction":
        return [[-1, 1, 1, -1]]
    if kind in ("monotone", "mechanism") and arms > 2:
        rank = np.arange(arms) - (arms - 1) / 2
        return [list(map(float, -rank / (rank**2).sum()))]
    return [[-1, 1]] if arms == 2 else [[-1]]


def effect(kind: str, arms: Sequence[ArrayLike], lower: bool, value: float | None = None) -> Effect:
    """Effect of a claim: the least favourable of its contrasts.

    lower: whether lower values of the metric are better. value: what one arm is compared with, on
    the scale of the metric.
    """
    sign = 1 if lower else -1
    found = []
    for weights in weights_of(kind, len(arms)):
        part = contrast(arms, [sign * w for w in weights])
        if value is not None:
            bound = value * (1 + TOLERANCE) ** sign if kind == "absolute" else value
            part = replace(part, d=part.d + sign * log(bound))
        found.append(part)
    worst = min(found, key=_favour)
    smallest = min(map(attrgetter("d"), found))
    return replace(worst, ways=len(found), smallest=smallest)


def _favour(part: Effect) -> tuple[float, float]:
    """Order of contrasts by how much they favour a claim."""
    return part.d / part.se, part.d


def holm(ps: Sequence[float]) -> list[float]:
    """Adjusted p-values of one family, in the order given (Holm 1979)."""
    order = sorted(range(len(ps)), key=ps.__getitem__)
    adjusted = [0.0] * len(ps)
    largest = 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[i]))
        adjusted[i] = largest
    return adjusted


def margin(relative: float) -> float:
    """A relative margin on the scale of y."""
    return log1p(relative)


def decide(
    kind: str,
    found: Effect,
    m: float,
    p: float,
    p_equivalent: float,
    scale_free: bool,
    conflict: str | None = None,
    failed: int = 0,
    failed_others: int = 0,
) -> tuple[str, str]:
    """(verdict, reason): the first that matches.

    m: 0 for a bound, which claims no gain and so has no equivalence. p, p_equivalent: of the
    effect, adjusted for its family; conflict: a second metric that says the opposite with an
    interval of its own; failed, failed_others: seeds that the method itself ended, of the arms
    that a positive effect favours and of those that a negative one does. Not for instabilities
    (`decide_instability`).
    """
    if found.least < FEW:
        return INCONCLUSIVE, f"underpowered: {found.least} seeds in an arm"
    if conflict is not None:
        return INCONCLUSIVE, f"metric conflict: {conflict}"
    significant = p <= LEVEL
    if kind == "absolute":
        return _decide_absolute(found, m, significant, scale_free, failed)
    if significant and found.d <= -m and not failed_others:
        return _against(scale_free), "reversed"
    equivalent = p_equivalent <= LEVEL
    if kind == "parity":
        if equivalent and not failed:
            return SUPPORTED, f"equivalent{_provisional(found)}"
        if significant and found.d >= m:
            return INCONCLUSIVE, "not equal: better"
        return INCONCLUSIVE, _power(found, m, failed)
    if equivalent and m > 0:
        return CONTRADICTED, "equivalent"
    if significant and found.d > 0 and min(found.d, found.smallest) >= m and not failed:
        return SUPPORTED, _provisional(found).removeprefix(", ")
    if significant and -m < found.d < m:
        return INCONCLUSIVE, "the effect is below the margin"
    return INCONCLUSIVE, _power(found, m, failed if found.d > 0 else failed_others)


def _decide_absolute(
    found: Effect, m: float, significant: bool, scale_free: bool, failed: int
) -> tuple[str, str]:
    """`decide` for one arm that is compared with a paper's number and its tolerance."""
    if significant and found.d > 0 and not failed:
        return SUPPORTED, f"within the tolerance{_provisional(found)}"
    if significant and found.d < 0:
        if scale_free:
            return CONTRADICTED, "above the tolerance"
        return NOT_COMPARABLE, "another budget than the paper's"
    return INCONCLUSIVE, _power(found, m, failed)


def _against(scale_free: bool) -> str:
    """What a reversed claim is."""
    return CONTRADICTED if scale_free else REVERSED


def _provisional(found: Effect) -> str:
    return ", provisional" if found.least < PROVISIONAL else ""


def _power(found: Effect, m: float, failed: int) -> str:
    """Why nothing follows: what these seeds could have shown, and how many it takes.

    Both are before a correction for other claims.
    """
    if failed:
        return f"{failed} seeds of the arms that the effect favours failed"
    gap = np.expm1(found.detectable())
    needed = found.seeds_needed(max(m, abs(found.d)))
    return f"detectable gap {gap:.1%}, seeds needed {needed or f'over {MOST}'}"


def instability(
    failed: tuple[int, int], seeds: tuple[int, int]
) -> tuple[float, tuple[float, float], float]:
    """Difference of failure rates of two arms, its interval, and a p-value.

    Newcombe's 95 % interval, and Fisher's exact test, two-sided.
    """
    table = [[f, n - f] for f, n in zip(failed, seeds, strict=True)]
    a = failed[0] / seeds[0]
    b = failed[1] / seeds[1]
    a_low, a_high = _wilson(failed[0], seeds[0])
    b_low, b_high = _wilson(failed[1], seeds[1])
    low = sqrt((a - a_low) ** 2 + (b_high - b) ** 2)
    high = sqrt((a_high - a) ** 2 + (b - b_low) ** 2)
    return a - b, (a - b - low, a - b + high), float(stats.fisher_exact(table).pvalue)


def _wilson(failed: int, n: int) -> tuple[float, float]:
    """Wilson's interval for a rate."""
    found = stats.binomtest(failed, n).proportion_ci(1 - LEVEL, "wilson")
    return float(found.low), float(found.high)


def decide_instability(
    difference: float, p: float, least: int, scale_free: bool
) -> tuple[str, str]:
    """(verdict, reason) from the difference of failure rates and its adjusted p.

    least: seeds in the smallest arm.
    """
    if least < FEW:
        return INCONCLUSIVE, f"underpowered: {least} seeds in an arm"
    if p > LEVEL:
        return INCONCLUSIVE, "failure rates are not told apart"
    if difference < 0:
        return _against(scale_free), "reversed"
    return SUPPORTED, "provisional" if least < PROVISIONAL else ""
