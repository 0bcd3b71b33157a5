"""From the metric of every seed to the verdict on a claim: the rule of docs/audit.md, in the order in which it is applied.

The unit is a training seed. y is the logarithm of the metric, one value a seed; d is a contrast of the arms' mean y, oriented so that
positive favours the claim, and m the margin on the same scale. Every function is pure and knows no file. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, log, log1p, sqrt

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats
from scipy.special import stdtr, stdtrit  # Student's t: distribution and quantile

LEVEL = 0.05  # of a family, two-sided; of equivalence each of two one-sided tests
FLOOR = 0.01  # least sd of y in an arm: a few seeds that agree by chance prove nothing
LEAST = 1e-4  # the least share that is told from zero, for the logarithm: one in 10,000 samples
TINY = 1e-9  # the same of any other quantity
TOLERANCE = 0.05  # of a paper's absolute number
FEW, PROVISIONAL = (
    3,
    5,
)  # seeds in an arm: below the first no verdict, below the second a provisional one
POWER = 0.8
SUPPORTED, CONTRADICTED, REVERSED, INCONCLUSIVE = (
    "SUPPORTED",
    "CONTRADICTED",
    "REVERSED_AT_SCALE",
    "INCONCLUSIVE",
)
NOT_RUN, NOT_COMPARABLE, EDITED = "NOT_RUN", "NOT_COMPARABLE", "EDITED"
VERDICTS = (SUPPORTED, CONTRADICTED, REVERSED, INCONCLUSIVE, NOT_RUN, NOT_COMPARABLE, EDITED)
JUDGED = VERDICTS[:4]  # from runs


@dataclass(frozen=True)
class Effect:
    """A contrast d with its standard error and Welch-Satterthwaite degrees of freedom.

    least: seeds in the smallest arm; ways: of how many such contrasts this is the least favourable, each of which must hold; smallest:
    the smallest d among them.
    """

    d: float
    se: float
    dof: float
    least: int
    ways: int = 1
    smallest: float = inf

    def interval(self, level: float = LEVEL) -> tuple[float, float]:
        """Two-sided, of coverage 1 - level over all ways; infinite without degrees of freedom."""
        half = -self.se * float(stdtrit(self.dof, level / 2 / self.ways)) if self.dof > 0 else inf
        return self.d - half, self.d + half

    def p(self) -> float:
        """Two-sided, of d = 0."""
        return (
            min(1.0, 2 * self.ways * float(stdtr(self.dof, -abs(self.d) / self.se)))
            if self.dof > 0
            else 1.0
        )

    def p_equivalent(self, m: float) -> float:
        """Two one-sided tests, of |d| >= m."""
        return (
            min(1.0, self.ways * float(stdtr(self.dof, -(m - abs(self.d)) / self.se)))
            if self.dof > 0
            else 1.0
        )

    def detectable(self) -> float:
        """The gap that these seeds detect with a power of 80 %."""
        return (
            -self.se * float(stdtrit(self.dof, LEVEL / 2) + stdtrit(self.dof, 1 - POWER))
            if self.dof > 0
            else inf
        )

    def seeds_needed(self, gap: float) -> int | None:
        """Per arm, to detect `gap` with that power at the spread seen; None above 1,000."""
        if not self.dof > 0:
            return None
        unit = self.se * sqrt(self.least)
        for n in range(2, 1001):
            if (
                -unit / sqrt(n) * (stdtrit(2 * n - 2, LEVEL / 2) + stdtrit(2 * n - 2, 1 - POWER))
                <= gap
            ):
                return n
        return None


def logs(values: Sequence[float], least: float = TINY) -> list[float]:
    """y of values that are not negative."""
    return [log(max(v, least)) for v in values]


def contrast(arms: Sequence[ArrayLike], weights: Sequence[float]) -> Effect:
    """sum_i w_i mean(y_i), arms independent: y per seed [n_i]. Each arm's sd is at least FLOOR."""
    ys = [np.asarray(y, float) for y in arms]
    d, least = (
        float(sum(w * y.mean() for w, y in zip(weights, ys, strict=True) if len(y))),
        min(map(len, ys)),
    )
    if least < 2:
        return Effect(d, inf, 0, least)
    parts = [
        w**2 * max(float(np.var(y, ddof=1)), FLOOR**2) / len(y)
        for w, y in zip(weights, ys, strict=True)
    ]
    dof = sum(parts) ** 2 / sum(v**2 / (len(y) - 1) for v, y in zip(parts, ys, strict=True))
    return Effect(d, sqrt(sum(parts)), dof, least)


def weights_of(kind: str, arms: int) -> list[list[float]]:
    """Contrasts of mean y that are positive where a lower metric favours a claim of this kind; several must all hold.

    monotone: the slope of y on the arm's rank. Kinds and the order of arms: `distillbench/claims.py`.
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
    """Of a claim: the least favourable of its contrasts. `value`: what one arm is compared with, on the scale of the metric."""
    sign = 1 if lower else -1
    found = [contrast(arms, [sign * w for w in weights]) for weights in weights_of(kind, len(arms))]
    if value is not None:
        bound = value * (1 + TOLERANCE) ** sign if kind == "absolute" else value
        found = [Effect(e.d + sign * log(bound), e.se, e.dof, e.least) for e in found]
    worst = min(found, key=lambda e: (e.d / e.se, e.d))
    return Effect(worst.d, worst.se, worst.dof, worst.least, len(found), min(e.d for e in found))


def holm(ps: Sequence[float]) -> list[float]:
    """Adjusted p-values of one family, in the order given (Holm 1979)."""
    order = sorted(range(len(ps)), key=lambda i: ps[i])
    adjusted, largest = [0.0] * len(ps), 0.0
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

    m: 0 for a bound, which claims no gain and so has no equivalence. p, p_equivalent: of the effect, adjusted for its family; conflict:
    a second metric that says the opposite with an interval of its own; failed, failed_others: seeds that the method itself ended, of the
    arms that a positive effect favours and of those that a negative one does. Not for instabilities (`decide_instability`).
    """
    against = CONTRADICTED if scale_free else REVERSED
    if found.least < FEW:
        return INCONCLUSIVE, f"underpowered: {found.least} seeds in an arm"
    if conflict is not None:
        return INCONCLUSIVE, f"metric conflict: {conflict}"
    significant, provisional = p <= LEVEL, ", provisional" if found.least < PROVISIONAL else ""
    reverse = significant and found.d <= -m and not failed_others
    if kind == "parity":
        if reverse:
            return against, "reversed"
        if p_equivalent <= LEVEL and not failed:
            return SUPPORTED, f"equivalent{provisional}"
        return INCONCLUSIVE, "not equal: better" if significant and found.d >= m else _power(
            found, m, failed
        )
    if kind == "absolute":
        if significant and found.d > 0:
            return (
                (SUPPORTED, f"within the tolerance{provisional}")
                if not failed
                else (INCONCLUSIVE, _power(found, m, failed))
            )
        if significant and found.d < 0:
            return (
                (CONTRADICTED, "above the tolerance")
                if scale_free
                else (NOT_COMPARABLE, "another budget than the paper's")
            )
        return INCONCLUSIVE, _power(found, m, failed)
    if reverse:
        return against, "reversed"
    if p_equivalent <= LEVEL and m > 0:
        return CONTRADICTED, "equivalent"
    if significant and found.d > 0 and min(found.d, found.smallest) >= m and not failed:
        return SUPPORTED, provisional.removeprefix(", ")
    if significant and -m < found.d < m:
        return INCONCLUSIVE, "the effect is below the margin"
    return INCONCLUSIVE, _power(found, m, failed if found.d > 0 else failed_others)


def _power(found: Effect, m: float, failed: int) -> str:
    """Why nothing follows: what these seeds could have shown, and how many it takes, both before a correction for other claims."""
    if failed:
        return f"{failed} seeds of the arms that the effect favours failed"
    needed = found.seeds_needed(max(m, abs(found.d)))
    return (
        f"detectable gap {np.expm1(found.detectable()):.1%}, seeds needed {needed or 'over 1000'}"
    )


def instability(
    failed: tuple[int, int], seeds: tuple[int, int]
) -> tuple[float, tuple[float, float], float]:
    """Difference of failure rates of two arms, Newcombe's 95 % interval for it, and the p of Fisher's exact test, two-sided."""
    table = [[f, n - f] for f, n in zip(failed, seeds, strict=True)]
    (a, b), (x, y) = (
        [f / n for f, n in zip(failed, seeds, strict=True)],
        map(_wilson, failed, seeds),
    )
    low, high = sqrt((a - x[0]) ** 2 + (y[1] - b) ** 2), sqrt((x[1] - a) ** 2 + (b - y[0]) ** 2)
    return a - b, (a - b - low, a - b + high), float(stats.fisher_exact(table).pvalue)


def _wilson(failed: int, n: int) -> tuple[float, float]:
    found = stats.binomtest(failed, n).proportion_ci(1 - LEVEL, "wilson")
    return float(found.low), float(found.high)


def decide_instability(
    difference: float, p: float, least: int, scale_free: bool
) -> tuple[str, str]:
    """(verdict, reason) from the difference of failure rates and its adjusted p."""
    if least < FEW:
        return INCONCLUSIVE, f"underpowered: {least} seeds in an arm"
    if p > LEVEL:
        return INCONCLUSIVE, "failure rates are not told apart"
    if difference < 0:
        return (CONTRADICTED if scale_free else REVERSED), "reversed"
    return SUPPORTED, "provisional" if least < PROVISIONAL else ""
