"""The findings of an audit: every question, that is a claim on a benchmark, with its values per
seed, its effect and its verdict.

A pure function of the questions (`distillbench/audits/questions.py`), of published records and
measurements, and of what was frozen when.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from operator import attrgetter
from typing import Any

from eval import catalogue
from eval.audit import verdicts
from eval.audit.verdicts import EDITED, FEW, LEAST, NOT_RUN, TINY, VERDICTS, Effect
from eval.report.records import Record, grouped
from eval.report.rows import Row
from eval.report.text import rounded

# statuses of a cell that say nothing about the method's quality
OTHERS = ("refused", "over_budget")
# keys of a finding's twin, `where` as `source`, and of the evidence in it
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
    "claim_hash",
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
Values = list[float | None]  # per seed, None where the method itself failed
Measured = dict[str, list[Row]]  # results of an experiment by its name
Arms = dict[tuple[str, str], list[Record]]  # by benchmark and arm
# commit -> {"claims": {id: hash}, "seeds": [...]}, as they stood there
Frozen = dict[str, dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A claim on one benchmark, and how it is tried (keys: docs/audit.md).

    metric, share, nfe and threshold are those of the trial; why_not says why there is none.
    """

    id: str
    method: str
    title: str
    claim: str
    where: str
    kind: str
    scale_free: bool
    primary: bool
    refuted_if: str
    seen_before_freezing: str | None
    arms: list[str]
    direction: str
    experiment: str | None
    value: float | None
    claim_hash: str
    benchmark: str | None
    why_not: str | None
    seeds: list[int]
    margin: float | None
    metric: str | None = None
    share: float | None = None
    nfe: int | None = None
    threshold: float | None = None

    @property
    def key(self) -> str:
        """Its name in an audit: id and benchmark."""
        return f"{self.id}/{self.benchmark}" if self.benchmark else self.id

    @property
    def lower(self) -> bool:
        """Whether lower values of its metric are better."""
        return self.direction == "lower"

    @property
    def is_bound(self) -> bool:
        """Whether a mechanism's quantity is compared with a value: no gain, so no equivalence."""
        return self.kind == "mechanism" and self.value is not None

    @property
    def least(self) -> float:
        """The least value of its metric that is told from zero."""
        return LEAST if catalogue.is_share(self.metric) else TINY


@dataclass(frozen=True)
class Control:
    """The same contrast under a second metric; `conflict`: its interval says the opposite."""

    metric: str
    effect: float
    ci_low: float
    ci_high: float
    conflict: bool


@dataclass(frozen=True, kw_only=True)
class Finding(Asked):
    """A question with its evidence and its verdict.

    Effects and margins are on the scale of the logarithm, or are rates for an instability. p is
    that of no effect, p_equivalent that of an effect beyond the margin, p_adjusted p corrected for
    the family; all are None where nothing was tested.
    """

    verdict: str
    reason: str
    effect: float | None
    ci_low: float | None
    ci_high: float | None
    p: float | None
    p_adjusted: float | None
    p_equivalent: float | None
    control: Control | None
    seeds_a: int
    seeds_b: int
    budget: float | None
    values: dict[str, Values]
    commits: list[str]
    dirty: bool
    cells: dict[str, dict[int, str]]

    def twin(self) -> Row:
        """As an audit's .json has it: `source` is the claim's place in its paper; 6 digits."""
        whole = rounded(asdict(self), 6)
        out = {"source" if key == "where" else key: whole[key] for key in PUBLISHED}
        out["evidence"] = {key: whole[key] for key in EVIDENCE}
        return out


@dataclass(frozen=True)
class Observation:
    """One seed of an arm: its value, and the result or the measurement that has it."""

    seed: int
    value: float | None
    about: Row


@dataclass(frozen=True)
class Evidence:
    """What was run for a question; `why_not`: why no verdict can come of it."""

    why_not: str | None
    values: dict[str, Values] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)
    dirty: bool = False
    cells: dict[str, dict[int, str]] = field(default_factory=dict)
    budget: float | None = None
    control: list[list[float]] = field(default_factory=list)

    def known(self) -> list[list[float]]:
        """Values of seeds that did not fail, by arm."""
        return [_known(values) for values in self.values.values()]


@dataclass(frozen=True)
class Tested:
    """Effect, interval and p-values of a question before any correction.

    contrast and margin: None and 0 for an instability.
    """

    effect: float
    interval: tuple[float, float]
    p: float
    seeds_a: int
    seeds_b: int
    p_equivalent: float | None = None
    contrast: Effect | None = None
    margin: float = 0.0
    control: Control | None = None


@dataclass(frozen=True)
class Tried:
    """A question on its way to a verdict; `tested` is None where its evidence says why not."""

    question: Asked
    evidence: Evidence
    tested: Tested | None


def findings(
    asked: list[Row], records: list[Record], measured: Measured, frozen: Frozen
) -> list[Finding]:
    """One finding per question, in their order.

    asked: `distillbench.audits.questions.Question.asked` of each.
    """
    arms = grouped(records, attrgetter("benchmark", "arm"))
    tried = [_try(Asked(**question), arms, measured) for question in asked]
    adjusted = _adjusted(tried, equivalence=False)
    adjusted_equivalent = _adjusted(tried, equivalence=True)
    out = []
    for one, p, p_equivalent in zip(tried, adjusted, adjusted_equivalent, strict=True):
        verdict, reason = _judge(one, p, p_equivalent, frozen)
        out.append(_finding(one, p, verdict, reason))
    return out


def _try(question: Asked, arms: Arms, measured: Measured) -> Tried:
    if question.why_not is not None:
        return Tried(question, Evidence(question.why_not), None)
    evidence = _evidence(question, arms, measured)
    if evidence.why_not is not None:
        return Tried(question, evidence, None)
    test = _instability if question.kind == "instability" else _contrast
    return Tried(question, evidence, test(question, evidence))


def _finding(tried: Tried, p_adjusted: float | None, verdict: str, reason: str) -> Finding:
    evidence = tried.evidence
    tested = tried.tested
    low, high = (None, None) if tested is None else tested.interval
    return Finding(
        **vars(tried.question),
        verdict=verdict,
        reason=reason,
        effect=None if tested is None else tested.effect,
        ci_low=low,
        ci_high=high,
        p=None if tested is None else tested.p,
        p_adjusted=p_adjusted,
        p_equivalent=None if tested is None else tested.p_equivalent,
        control=None if tested is None else tested.control,
        seeds_a=0 if tested is None else tested.seeds_a,
        seeds_b=0 if tested is None else tested.seeds_b,
        budget=evidence.budget,
        values=evidence.values,
        commits=evidence.commits,
        dirty=evidence.dirty,
        cells=evidence.cells,
    )


def _evidence(q: Asked, arms: Arms, measured: Measured) -> Evidence:
    """Values per arm and seed with the commits behind them, or why they say nothing."""
    observed: dict[str, list[Observation]] = {}
    control: list[list[float]] = []
    excuses: list[str] = []
    if q.experiment:
        results = [m for m in measured.get(q.experiment, []) if m["seed"] in q.seeds]
        excuses += _failures(q, results)
        for arm in q.arms:
            observed[arm] = _quantities(arm, results)
    else:
        for arm in q.arms:
            records = [r for r in arms.get((str(q.benchmark), arm), []) if r.seed in q.seeds]
            observed[arm] = _cells(q, records, str(q.metric))
            excuses += _excuses(q, arm, observed[arm])
            second = catalogue.metric(str(q.metric)).control
            if second is not None:
                control.append(_known(o.value for o in _cells(q, records, second)))
    values: dict[str, Values] = {}
    cells: dict[str, dict[int, str]] = {}
    commits = set()
    dirty = False
    budget = 0.0
    for arm, own in observed.items():
        by_seed = {o.seed: o.value for o in own}
        values[arm] = [by_seed[seed] for seed in q.seeds if seed in by_seed]
        cells[arm] = {o.seed: o.about["key"] for o in own}
        for observation in own:
            about = observation.about
            commits.add(about["provenance"]["commit"] or "none")
            dirty |= about["provenance"].get("dirty", False)
            if not q.experiment:
                budget = max(budget, about["cost"].get("limit_flops") or 0)
    why_not = excuses[0] if excuses else _missing(q, values) or _fruitless(q, observed)
    return Evidence(why_not, values, sorted(commits), dirty, cells, budget or None, control)


def _missing(q: Asked, values: dict[str, Values]) -> str | None:
    """Which seeds have not run, of the first arm that lacks some."""
    for arm, own in values.items():
        missing = len(q.seeds) - len(own)
        if missing > 0:
            return f"compute: {missing} of {len(q.seeds)} seeds of {arm} are not there"
    return None


def _fruitless(q: Asked, observed: dict[str, list[Observation]]) -> str | None:
    """Which arm has no value at all; of an instability that is the outcome."""
    if q.kind == "instability":
        return None
    for arm, own in observed.items():
        if not _known(o.value for o in own):
            first = own[0].about
            ended = f"seed {first['seed']} ended as {first['status']}: {first['reason']}"
            return f"no seed of {arm} came to an end; {ended}"
    return None


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _cells(q: Asked, records: list[Record], metric: str) -> list[Observation]:
    """A metric of an arm's records; at the question's NFE, or at the headline NFE of the arm."""
    entry = catalogue.metric(metric)
    out = []
    for record in records:
        row = record.at(q.nfe)
        value = None if row is None else entry.value(row)
        out.append(Observation(record.seed, value, record.result))
    return out


def _excuses(q: Asked, arm: str, observed: list[Observation]) -> list[str]:
    """Why cells say nothing about their method.

    None for a cell that has a value, or where the method itself failed.
    """
    out = []
    for observation in observed:
        about = observation.about
        status = about["status"]
        odd = q.kind == "instability" and status not in ("done", "diverged")
        if status == "done" and observation.value is None:
            nfe = q.nfe or about["headline_nfe"]
            out.append(f"{arm} has no {q.metric} at {nfe} NFE")
        elif status in OTHERS or odd:
            out.append(f"{arm} seed {about['seed']} ended as {status}: {about['reason']}")
    return out


def _failures(q: Asked, results: list[Row]) -> list[str]:
    """Why an experiment says nothing of its question."""
    out = []
    names: set[str] = set()
    for result in results:
        names.update(result["values"])
        if "failed" in result:
            out.append(f"{q.experiment} failed on seed {result['seed']}: {result['failed']}")
    for name in q.arms:
        if names and name not in names:
            out.append(f"{q.experiment} measures no '{name}'")
    return out


def _quantities(name: str, results: list[Row]) -> list[Observation]:
    """What an experiment measured under this name."""
    out = []
    for result in results:
        if name in result["values"]:
            out.append(Observation(result["seed"], result["values"][name], result))
    return out


def _instability(q: Asked, evidence: Evidence) -> Tested:
    """Difference of failure rates of two arms; a seed beyond the threshold has failed too."""
    first, second = (_failed(q, values) for values in evidence.values.values())
    seeds = len(q.seeds)
    effect, interval, p = verdicts.instability((first, second), (seeds, seeds))
    return Tested(effect, interval, p, seeds, seeds)


def _failed(q: Asked, values: Values) -> int:
    """How many seeds failed."""
    count = 0
    for value in values:
        if value is None:
            count += 1
        elif q.threshold is not None:
            count += value > q.threshold if q.lower else value < q.threshold
    return count


def _contrast(q: Asked, evidence: Evidence) -> Tested:
    """Effect of any other claim, with a second metric beside it where there is one."""
    known = evidence.known()
    contrast = _effect(q, known)
    margin = 0.0 if q.is_bound else verdicts.margin(q.margin or 0.0)
    return Tested(
        contrast.d,
        contrast.interval(),
        contrast.p(),
        seeds_a=len(known[0]),
        seeds_b=min(map(len, known[1:]), default=0),
        p_equivalent=contrast.p_equivalent(margin),
        contrast=contrast,
        margin=margin,
        control=_control(q, evidence.control, contrast.d),
    )


def _control(q: Asked, arms: list[list[float]], d: float) -> Control | None:
    """The contrast under the control of the question's metric, beside the effect d."""
    if not arms or min(map(len, arms)) < FEW or q.kind in ("parity", "absolute"):
        return None
    other = _effect(q, arms)
    low, high = other.interval()
    conflict = (low > 0 and d < 0) or (high < 0 and d > 0)
    name = str(catalogue.metric(str(q.metric)).control)
    return Control(name, other.d, low, high, conflict)


def _effect(q: Asked, arms: list[list[float]]) -> Effect:
    ys = [verdicts.logs(values, q.least) for values in arms]
    return verdicts.effect(q.kind, ys, q.lower, q.value)


def _adjusted(tried: list[Tried], equivalence: bool) -> list[float | None]:
    """Holm's adjustment within a paper's primary claims, and within its others.

    Tests of equivalence are families of their own, without instabilities. A family has all that
    were registered to be tried: those without runs count as p = 1, so that no verdict depends on
    what was run first.
    """
    families: dict[tuple[str, bool], dict[int, float | None]] = {}
    for index, one in enumerate(tried):
        question = one.question
        never = question.why_not is not None
        if never or (equivalence and question.kind == "instability"):
            continue
        p = None
        if one.tested is not None:
            p = one.tested.p_equivalent if equivalence else one.tested.p
        families.setdefault((question.method, question.primary), {})[index] = p
    out: list[float | None] = [None] * len(tried)
    for members in families.values():
        ps = [1.0 if p is None else p for p in members.values()]
        for index, adjusted in zip(members, verdicts.holm(ps), strict=True):
            if members[index] is not None:
                out[index] = adjusted
    return out


def _judge(
    tried: Tried, p: float | None, p_equivalent: float | None, frozen: Frozen
) -> tuple[str, str]:
    """Verdict and reason; the p-values are adjusted for their families."""
    q = tried.question
    tested = tried.tested
    if tested is None:
        return NOT_RUN, str(tried.evidence.why_not)
    why = _edited(q, tried.evidence.commits, frozen)
    if why is not None:
        return EDITED, why
    assert p is not None
    if tested.contrast is None:
        return verdicts.decide_instability(tested.effect, p, len(q.seeds), q.scale_free)
    assert p_equivalent is not None
    conflict = None
    if tested.control is not None and tested.control.conflict:
        name = tested.control.metric
        conflict = f"{name} says the opposite, with an interval that excludes 0"
    failed, failed_others = _lost(q, tried.evidence)
    return verdicts.decide(
        q.kind,
        tested.contrast,
        tested.margin,
        p,
        p_equivalent,
        q.scale_free,
        conflict,
        failed,
        failed_others,
    )


def _lost(q: Asked, evidence: Evidence) -> tuple[int, int]:
    """Failed seeds of arms that a positive effect favours, and of arms that a negative one does."""
    weights = verdicts.weights_of(q.kind, len(q.arms))
    every = q.kind in ("monotone", "parity")  # every arm is needed
    favoured = others = 0
    for values, signs in zip(evidence.values.values(), zip(*weights, strict=True), strict=True):
        lost = values.count(None)
        if every or min(signs) < 0:  # a low y favours the claim
            favoured += lost
        if every or max(signs) > 0:
            others += lost
    return favoured, others


def _edited(q: Asked, commits: list[str], frozen: Frozen) -> str | None:
    """Why a claim does not count as frozen before its runs.

    None where every commit behind them holds it, and its seeds, as they are.
    """
    for commit in commits:
        runs = f"commit {commit[:12]}, which its runs record"
        if commit not in frozen:
            return f"what stood in {runs}, is not known"
        if frozen[commit]["seeds"][: len(q.seeds)] != q.seeds:
            return f"its seeds were others in {runs}"
        then = frozen[commit]["claims"].get(q.id)
        if then != q.claim_hash:
            what = "registered" if then is None else "changed"
            again = "run it on fresh seeds"
            return f"{what} after its runs, which record commit {commit[:12]}: {again}"
    return None


def withdrawn(asked: list[Row], frozen: Frozen) -> list[str]:
    """Ids of claims that stood in a commit behind runs and stand no more."""
    stood: set[str] = set()
    for then in frozen.values():
        stood.update(then["claims"])
    return sorted(stood - {question["id"] for question in asked})


def counts(found: Iterable[Finding]) -> dict[str, int]:
    """How many findings have each verdict, in the order of VERDICTS."""
    drawn = [finding.verdict for finding in found]
    return {verdict: drawn.count(verdict) for verdict in VERDICTS}
