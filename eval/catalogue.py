"""The catalogue of metrics: one entry per metric, in the order of columns. Tables, pages, audits
and claims read what they know of a metric here.

To add a metric, write its function in eval/metrics, return it under its name from
`metrics.evaluate.evaluate_images` or `metrics.mixtures.evaluate_mixture`, and add one entry to
METRICS. No module that computes a number imports this one, so that a changed heading changes no
key.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Family = Literal["images", "mixtures"]
MISSING = "–"  # printed where there is no value
ARROWS = {"lower": " ↓", "higher": " ↑", "none": ""}


@dataclass(frozen=True)
class Metric:
    """What a report has to know of one metric.

    name        key in rows of metrics.json; `<name>_mean`, `<name>_sd` in rows of tables
    heading     words of its column, without the direction
    family      benchmarks that have it
    direction   which values are better; "none" where a value is only read beside others
    target      value of a perfect generator where that is neither 0 nor the largest; printed
    scale       factor of printed values
    digits      digits after the point of printed values
    table       of an image benchmark's two tables the one with its column; None: in neither
    trajectory  printed only for methods that follow their teacher's trajectories
    page        whether the pages of methods show it
    contrast    words in a table's "Differences between arms"; None: not compared there
    main        whether it is the main metric of its family
    verdict     whether a claim may name it; False where it can be negative, for want of a logarithm
    share       whether it is a share of samples, for the least value that is told from zero
    control     name of a second metric whose interval may contradict a verdict on this one
    derived     its value from a row of metrics.json, where that does not hold it under its name
    """

    name: str
    heading: str
    family: Family
    direction: Literal["lower", "higher", "none"]
    target: float | None = None
    scale: float = 1
    digits: int = 3
    table: Literal["main", "diagnostics"] | None = "main"
    trajectory: bool = False
    page: bool = False
    contrast: str | None = None
    main: bool = False
    verdict: bool = True
    share: bool = False
    control: str | None = None
    derived: Callable[[Mapping[str, Any]], float] | None = None

    @property
    def column(self) -> str:
        """Heading of its column: with an arrow to better values, or to the target."""
        if self.target is not None:
            return f"{self.heading} → {self.target:g}"
        return self.heading + ARROWS[self.direction]

    def value(self, row: Mapping[str, Any]) -> float | None:
        """Its value in a row of metrics.json, unscaled; None where the row has none."""
        return row.get(self.name) if self.derived is None else self.derived(row)

    def mean(self, row: Mapping[str, Any]) -> float | None:
        """Its mean over seeds in a row of a table, unscaled; None where the row has none."""
        return row.get(f"{self.name}_mean")

    def cell(self, row: Mapping[str, Any]) -> str:
        """`mean ± sd` of a row of a table, as printed."""
        return self.printed(self.mean(row), row.get(f"{self.name}_sd"))

    def printed(self, mean: float | None, sd: float | None = None) -> str:
        """`mean ± sd` with this metric's scale and digits; the mean alone where sd is None or 0."""
        if mean is None:
            return MISSING
        words = f"{mean * self.scale:.{self.digits}f}"
        return f"{words} ± {sd * self.scale:.{self.digits}f}" if sd else words


def _class_error(row: Mapping[str, Any]) -> float:
    return 1 - row["class_accuracy"]


METRICS: tuple[Metric, ...] = (
    Metric(
        "fid",
        "FID",
        "images",
        "lower",
        page=True,
        contrast="FID",
        main=True,
        control="fid_cross",  # an extractor of another architecture and objective
    ),
    Metric(
        "fid_cross",
        "FID, 2nd extractor",
        "images",
        "lower",
        page=True,
        contrast="FID, second extractor",
    ),
    Metric(
        "fid_teacher", "FID to teacher", "images", "lower", page=True, contrast="FID to teacher"
    ),
    Metric("kid", "KID×10³", "images", "lower", scale=1e3, digits=2, verdict=False),
    Metric("is", "IS", "images", "higher", digits=2),
    Metric("precision", "prec.", "images", "higher", share=True),
    Metric("recall", "recall", "images", "higher", page=True, contrast="recall", share=True),
    Metric("density", "density", "images", "higher", digits=2),
    Metric("coverage", "coverage", "images", "higher", page=True, contrast="coverage", share=True),
    Metric("memorisation", "memor.", "images", "none", share=True),
    Metric("gap_closed", "gap closed", "images", "higher", verdict=False),
    Metric("class_accuracy", "class acc.", "images", "higher", table="diagnostics"),
    Metric("label_tv", "label TV", "images", "lower", table="diagnostics", share=True),
    Metric("diversity", "diversity", "images", "higher", target=1, table="diagnostics"),
    Metric("c2st", "C2ST", "images", "lower", target=0.5, table="diagnostics"),
    Metric("noise_distance", "same noise", "images", "none", table="diagnostics", trajectory=True),
    Metric(
        "class_error",
        "class error",
        "images",
        "lower",
        table=None,
        share=True,
        derived=_class_error,
    ),
    Metric("sliced_w2", "sliced W2", "mixtures", "lower", page=True, main=True),
    Metric("sliced_w2_floor", "floor of W2", "mixtures", "none", page=True),
    Metric("modes", "modes", "mixtures", "higher", digits=1, page=True),
    Metric("modes_total", "of", "mixtures", "none", digits=0),
    Metric("weight_tv", "weight TV", "mixtures", "lower", page=True, share=True),
    Metric("outside", "outside 3σ", "mixtures", "lower", page=True, share=True),
    Metric("outside_exact", "outside, exact", "mixtures", "none"),
)


def metric(name: str) -> Metric:
    """The entry of this name. Raises KeyError where there is none."""
    for entry in METRICS:
        if entry.name == name:
            return entry
    raise KeyError(f"{name}: no metric of eval/catalogue.py")


def is_share(name: str | None) -> bool:
    """Whether a metric of this name is a share of samples; False for what has no entry."""
    return any(m.share for m in METRICS if m.name == name)


def measured(family: Family) -> list[Metric]:
    """Metrics in rows of a family's tables: all but those derived where a claim names them."""
    return [m for m in METRICS if m.family == family and m.derived is None]


def known_names(family: Family) -> tuple[str, ...]:
    """Names that claims on benchmarks of a family may give."""
    return tuple(m.name for m in METRICS if m.family == family and m.verdict)


def family_of(row: Mapping[str, Any]) -> Family:
    """Family of a row of metrics.json, or of a table; "images" for a row without any metric."""
    name = main_metric("mixtures").name
    return "mixtures" if name in row or f"{name}_mean" in row else "images"


def main_metric(family: Family) -> Metric:
    """The metric that orders arms on benchmarks of a family."""
    return next(m for m in METRICS if m.main and m.family == family)


def shown(rows: list[dict[str, Any]], table: str = "main") -> list[Metric]:
    """Columns of one of the two tables: metrics of which some row of a table has a mean."""
    wanted = [m for m in METRICS if m.table == table]
    return with_values(wanted, rows)


def with_values(wanted: list[Metric], rows: list[dict[str, Any]]) -> list[Metric]:
    """Those of `wanted` of which some row of a table has a mean."""
    return [m for m in wanted if any(m.mean(row) is not None for row in rows)]
