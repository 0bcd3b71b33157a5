"""The questions of an audit, claims on benchmarks; whatever is wrong with one is said before
anything runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from distillbench import reading
from distillbench.audits.experiments import MECHANISMS, experiment_file
from distillbench.config import Table, root
from distillbench.errors import UserError, nearest
from distillbench.registry import folders
from distillbench.registry.claims import Claim, Trial
from distillbench.registry.folders import MethodFolder

# Names that claims may give on a benchmark, by its name; raises UserError where there is none.
KnownMetrics = Callable[[str], tuple[str, ...]]


@dataclass(frozen=True)
class Question:
    """A claim of a method on one benchmark; without a trial where `why_not` says why."""

    method: MethodFolder
    claim: Claim
    benchmark: str | None = None
    trial: Trial | None = None
    why_not: str | None = None

    @property
    def arms(self) -> tuple[str, ...]:
        """The claim's arms at their share of the budget; of a mechanism its quantities."""
        if self.trial is None or self.claim.experiment:
            return tuple(self.claim.arms)
        share = self.trial.share
        return tuple(folders.arm(name).at(share).name for name in self.claim.arms)

    def asked(self, seeds: list[int]) -> dict[str, Any]:
        """What eval/audit is told of it: the claim, its hash, and how it is tried here."""
        asked = self.claim.model_dump(exclude={"trials", "untestable"})
        asked["method"] = self.method.name
        asked["title"] = self.method.file.title
        asked["claim_hash"] = self.claim.hash()
        asked["benchmark"] = self.benchmark
        asked["arms"] = list(self.arms)
        asked["why_not"] = self.why_not
        asked["seeds"] = seeds[: self.trial.seeds] if self.trial else []
        asked["margin"] = self.claim.margin(self.benchmark) if self.benchmark else None
        if self.trial is not None:
            asked |= self.trial.model_dump(include={"metric", "share", "nfe", "threshold"})
        return asked


def line_of_claim(method: MethodFolder, index: int) -> str:
    """`file:line` of a method's claim."""
    path = method.path / "claims.yaml"
    return f"{path}:{reading.line_of(path.read_text(), ['claims', index])}"


def misfits(
    claim: Claim, metrics: KnownMetrics, exists: Callable[[str], object]
) -> Iterator[tuple[str, str]]:
    """(what was expected, what was seen) where a claim names something that is not there.

    exists: raises UserError on the name of an arm that is not there.
    """
    for benchmark, trial in claim.trials.items():
        try:
            known = metrics(benchmark)
            if claim.experiment:
                yield from _misfit_of_experiment(claim.id, claim.experiment)
                continue
            if trial.metric not in known:
                near = nearest(str(trial.metric), known)
                yield f"claim {claim.id} to name a metric of {benchmark}, {near}", str(trial.metric)
            for name in claim.arms:
                exists(name)
        except UserError as e:
            yield f"claim {claim.id} to name a benchmark and arms that exist", str(e)


def _misfit_of_experiment(claim_id: str, name: str) -> Iterator[tuple[str, str]]:
    if not experiment_file(name).is_file():
        there = [path.stem for path in (root() / MECHANISMS).glob("*.py")]
        yield f"claim {claim_id} to name an experiment, {nearest(name, there)}", name


def of_table(table: Table, metrics: KnownMetrics) -> list[Question]:
    """Every claim of a table's methods on its benchmarks, in the order of files.

    Raises UserError with file, line and remedy on a mistake in a claim.
    """
    found: list[Question] = []
    places: dict[str, str] = {}
    names = sorted(folders.discover()) if table.methods == "all" else table.methods
    for name in names:
        method = folders.arm(name).folder
        for index, claim in enumerate(method.claims.claims):
            place = line_of_claim(method, index)
            if claim.id in places:
                raise UserError(
                    f"{place}: claim id '{claim.id}' is also at {places[claim.id]}: "
                    "ids are unique over all methods; rename one"
                )
            places[claim.id] = place
            for expected, saw in misfits(claim, metrics, folders.arm):
                raise UserError(f"{place}: expected {expected}; saw {saw}")
            found += _questions_of(method, claim, table, place)
    return found


def _questions_of(
    method: MethodFolder, claim: Claim, table: Table, place: str
) -> Iterator[Question]:
    if claim.untestable:
        yield Question(method, claim, why_not=claim.untestable)
    seeds = len(table.seeds or [])
    for benchmark, trial in claim.trials.items():
        if trial.seeds > seeds:
            raise UserError(
                f"{place}: claim {claim.id} declares {trial.seeds} seeds on {benchmark}, "
                f"workflows/tables/{table.name}.yaml has {seeds}: add seeds there"
            )
        if benchmark in table.benchmarks:
            yield Question(method, claim, benchmark, trial)
        else:
            why_not = f"{benchmark} is none of this audit's benchmarks"
            yield Question(method, claim, benchmark, None, why_not)


def chosen(
    found: list[Question], method: str | None, benchmark: str | None, claim: str | None
) -> list[Question]:
    """Those of a method, on a benchmark, of one claim; UserError where there is none."""
    known = {
        "method": {q.method.name for q in found},
        "benchmark": {q.benchmark for q in found if q.benchmark},
        "claim": {q.claim.id for q in found},
    }
    wanted = {"method": method, "benchmark": benchmark, "claim": claim}
    for what, name in wanted.items():
        if name is not None and name not in known[what]:
            near = nearest(name, known[what])
            raise UserError(f"--{what}: no claim of '{name}' in this audit, {near}")
    out = []
    for q in found:
        own = {"method": q.method.name, "benchmark": q.benchmark, "claim": q.claim.id}
        if all(name is None or own[what] == name for what, name in wanted.items()):
            out.append(q)
    return out
