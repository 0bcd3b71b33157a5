"""Models of `methods/<name>/claims.yaml`: the numbers a paper reports and the claims it makes, as
experiments. Imports no torch.

A claim is frozen by its hash: the commit that its runs record must hold the same claim
(`audits/freezing.py`, which reads MARGINS and MARGIN from this file's text at that commit).
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from distillbench import config
from distillbench.hashing import canonical, digest
from distillbench.reading import Strict

Kind = Literal[
    "comparative",
    "monotone",
    "interior optimum",
    "interaction",
    "parity",
    "absolute",
    "instability",
    "mechanism",
]
# How many arms a kind takes; monotone claims and mechanisms take several numbers.
ARMS = {
    "comparative": 2,
    "interior optimum": 3,
    "interaction": 4,
    "parity": 2,
    "absolute": 1,
    "instability": 2,
}
# Default margins by family, with which a benchmark's name begins: about one sd over training seeds
# there (docs/audit.md).
MARGINS = {
    "digits": 0.05,
    "gaussians": 0.10,
}
MARGIN = 0.02  # elsewhere; the coefficient of variation of FID at ImageNet scale is 1 to 2 %


class Paper(Strict):
    """Which text the numbers and claims are from."""

    source: str = Field(min_length=1, description="arXiv number or address")
    version: str = Field(
        min_length=1, description="e.g. v2, or 'abstract' where the body is not public"
    )


class Reported(Strict):
    """A number a paper reports, in its own setting."""

    where: str = Field(min_length=1, description="table or figure")
    setting: str = Field(description="data set, model, NFE: whatever it takes to read the number")
    metric: str
    value: float
    arm: str | None = Field(
        None, description="method@variant beside whose row at this NFE it is shown"
    )
    nfe: int | None = None
    budget: str | None = Field(
        None, description="iterations, epochs, images or GPU-hours behind it, where the paper says"
    )
    protocol: str | None = Field(
        None, description="samples, reference and evaluator, where the paper says"
    )


class Trial(Strict):
    """How a claim is tried on one benchmark."""

    metric: str | None = Field(
        None, description="a metric of the benchmark; of a mechanism the words that the page shows"
    )
    share: float = Field(1.0, gt=0, description="of the benchmark's budget, for every arm")
    seeds: int = Field(ge=3, description="per arm: the first so many of the audit's")
    margin: float | None = Field(
        None,
        gt=0,
        description="smallest relative difference that counts; of the benchmark's family if left "
        "out",
    )
    nfe: int | None = Field(
        None, gt=0, description="network evaluations; the headline NFE of each arm if left out"
    )
    threshold: float | None = Field(
        None,
        gt=0,
        description="of an instability: a seed whose metric is beyond it has failed, as one that "
        "diverged",
    )


class Claim(Strict):
    """A claim of a paper, or a question asked of it, and the experiment that answers it.

    arms are method@variant (of a mechanism: quantities that its experiment measures):

    comparative       two: the first has the better metric
    monotone          three or more: the metric gets better along them
    interior optimum  three: the first, between the other two, is better than both
    interaction       four: the first gains more over the second than the third over the fourth
    parity            two: no difference beyond the margin
    absolute          one: its metric is at most `value`
    instability       two: more seeds of the first fail
    mechanism         one with `value`, two, or more, read as absolute, comparative, monotone
    """

    id: str = Field(
        pattern=r"^[A-Za-z0-9]+(-[A-Za-z0-9.]+)+$",
        description="stable, unique over all methods, e.g. FF-C3a",
    )
    claim: str = Field(min_length=1, description="what is said, in one sentence")
    where: str = Field(
        min_length=1, description="table, figure, equation or section; or whose question it is"
    )
    kind: Kind
    scale_free: bool = Field(
        description="about an identity, a mechanism or a comparison stated without a scale"
    )
    primary: bool = Field(
        description="one of those the paper stands on: they are corrected for each other"
    )
    refuted_if: str = Field(min_length=1, description="what would count against it")
    seen_before_freezing: str | None = Field(
        None,
        description="where a like outcome had been seen; the seeds here are fresh all the same",
    )
    arms: list[str] = Field(default_factory=list)
    direction: Literal["lower", "higher"] = Field(
        "lower", description="which values of the metric are better"
    )
    trials: dict[str, Trial] = Field(default_factory=dict, description="by benchmark")
    experiment: str | None = Field(
        None, description="of a mechanism: file in mechanisms/ that measures the quantities"
    )
    value: float | None = Field(
        None, gt=0, description="of an absolute claim, or a mechanism with one quantity"
    )
    untestable: str | None = Field(
        None, description="why no arm of this suite can test it; then nothing else is declared"
    )

    @field_validator("arms")
    @classmethod
    def _distinct(cls, arms: list[str]) -> list[str]:
        if len(set(arms)) != len(arms):
            raise ValueError("an arm is named twice")
        return arms

    @model_validator(mode="after")
    def _fits(self) -> Claim:
        if self.untestable:
            if self.arms or self.trials or self.experiment:
                raise ValueError("untestable: remove arms, trials and experiment, or that key")
            return self
        if not (self.arms and self.trials):
            raise ValueError("needs `arms` and `trials`, or `untestable: why`")
        if (self.kind == "mechanism") != (self.experiment is not None):
            raise ValueError("`experiment` belongs to kind: mechanism, and to that alone")
        count = len(self.arms)
        if self.kind == "monotone" and count < 3:
            raise ValueError(f"kind: monotone takes three arms or more, here are {count}")
        if self.kind in ARMS and count != ARMS[self.kind]:
            raise ValueError(f"kind: {self.kind} takes {ARMS[self.kind]} arms, here are {count}")
        is_absolute = self.kind == "absolute" or (self.kind == "mechanism" and count == 1)
        if (self.value is not None) != is_absolute:
            raise ValueError(
                "`value` belongs to an absolute claim, or a mechanism with one quantity, and to "
                "these alone"
            )
        for benchmark, trial in self.trials.items():
            if trial.metric is None and self.kind != "mechanism":
                raise ValueError(f"trials.{benchmark}: key 'metric' is missing")
            if trial.threshold is not None and self.kind != "instability":
                raise ValueError(f"trials.{benchmark}: `threshold` belongs to an instability")
        return self

    def margin(self, benchmark: str, defaults: dict[str, Any] | None = None) -> float:
        """The smallest relative difference that counts on a benchmark.

        defaults: this module's constants MARGINS and MARGIN at another commit.
        """
        own = self.trials[benchmark].margin
        if own:
            return own
        constants = defaults or {}
        by_family = constants.get("MARGINS", MARGINS)
        elsewhere = constants.get("MARGIN", MARGIN)
        return by_family.get(benchmark.partition("-")[0], elsewhere)

    def hash(self, defaults: dict[str, Any] | None = None) -> str:
        """Hash of everything the claim says, every choice that a result could have tempted one to
        make included; `defaults` as of `margin`."""
        said = self.model_dump(mode="json", exclude_defaults=True)
        said["margins"] = {name: self.margin(name, defaults) for name in self.trials}
        return digest(canonical(said))


class ClaimsFile(Strict):
    """`methods/<name>/claims.yaml`."""

    paper: Paper | None = None
    reported: list[Reported] = Field(default_factory=list)
    claims: list[Claim] = Field(default_factory=list)

    @model_validator(mode="after")
    def _unique(self) -> ClaimsFile:
        ids = [claim.id for claim in self.claims]
        for name in ids:
            if ids.count(name) > 1:
                raise ValueError(
                    f"claim id '{name}' is given twice: ids are unique and stay as they are"
                )
        return self


SCHEMAS = config.SCHEMAS | {"methods/claims.schema.json": ClaimsFile}
