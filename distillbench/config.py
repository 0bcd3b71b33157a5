"""Models of the files a user edits: project, benchmark, table, method. Imports no torch."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, model_validator

from distillbench.errors import UserError, nearest
from distillbench.hashing import digest
from distillbench.reading import Strict, read

# The last part of method@x0.25: an arm with that share of the budget.
SHARE = re.compile(r"x(\d+\.?\d*)")


class Project(Strict):
    """`distillbench.yaml` at the root of a checkout."""

    method_paths: list[str] = Field(
        [], description="folders of methods outside the checkout (or folders of such folders)"
    )


class DigitsData(Strict):
    """scikit-learn's 8x8 digits (they come with the package)."""

    kind: Literal["digits"]
    inner: bool = Field(
        False,
        description=(
            "split the training half once more, for choosing settings: no reported digit is seen"
        ),
    )

    def fingerprint(self) -> str:
        """Hash of the installed file of digits, 16 hexadecimal digits."""
        spec = importlib.util.find_spec("sklearn")
        assert spec is not None and spec.submodule_search_locations
        package = Path(spec.submodule_search_locations[0])
        return digest((package / "datasets/data/digits.csv.gz").read_bytes())


class MixtureData(Strict):
    """Gaussian mixture whose velocity is known in closed form."""

    kind: Literal["mixture"]
    layout: Literal["ring", "grid", "image"]
    sigma: float = Field(gt=0)
    weights: list[float] = Field(min_length=1, description="unnormalised weights of the components")

    @model_validator(mode="after")
    def _fits(self) -> MixtureData:
        if self.layout == "grid" and round(len(self.weights) ** 0.5) ** 2 != len(self.weights):
            raise ValueError("a grid needs a square number of weights")
        if self.layout == "image" and not 2 <= len(self.weights) <= 8:
            raise ValueError("an image mixture has 2 to 8 components")
        return self

    def fingerprint(self) -> str:
        """Hash of these settings, 16 hexadecimal digits."""
        return digest(self.model_dump_json().encode())


class NetworkSpec(Strict):
    """The architecture of teacher, students and critics."""

    width: int = Field(gt=0)
    depth: int = Field(gt=0)


class TeacherSpec(Strict):
    """How the teacher is trained. On mixtures its network only initialises students."""

    updates: int = Field(gt=0)
    batch: int = Field(gt=0)
    lr: float = Field(gt=0)
    betas: tuple[float, float] = (0.9, 0.99)
    warmup: float = Field(0.03, ge=0, lt=1)
    final_lr: float = Field(0.02, ge=0, le=1)
    half_life: float = Field(
        0.1, gt=0, description="of the weight average, as a share of the updates"
    )
    time_mean: float = 0.0
    time_std: float = Field(1.0, gt=0)
    label_dropout: float = Field(0.1, ge=0, lt=1)
    heun_steps: int = Field(
        32, gt=0, description="the 'many steps' of the reference sampler; two evaluations each"
    )


class Budget(Strict):
    """What every method may spend per seed, in units the harness meters."""

    flops: float = Field(gt=0)


class Sampling(Strict):
    """How many samples a student and its teacher give for evaluation."""

    count: int = Field(gt=0)
    batch: int = Field(1000, gt=0)


class Benchmark(Strict):
    """`workflows/benchmarks/<name>.yaml`: one teacher, data, budget, evaluator for all methods."""

    name: str
    family: str = Field(description="methods may give settings for a family of benchmarks")
    data: Annotated[DigitsData | MixtureData, Field(discriminator="kind")]
    network: NetworkSpec
    teacher: TeacherSpec
    budget: Budget
    sampling: Sampling
    extractor: str | None = Field(
        None,
        description="feature extractor of the evaluation: a name for images, none for mixtures",
    )
    cross_extractor: str | None = Field(
        None,
        description="a second one, of other architecture and objective, for a column of its own",
    )
    seeds: list[int] = Field(min_length=1)
    guidance: float = Field(1.0, description="guidance weight of teacher and students")
    timeout_s: float = Field(
        3600, gt=0, description="a cell that trains longer is recorded as `timeout`"
    )
    stall_s: float = Field(
        300,
        gt=0,
        description=(
            "a cell in which no step and no batch of samples ends for so long is recorded as `hung`"
        ),
    )

    @model_validator(mode="after")
    def _fits(self) -> Benchmark:
        if (self.extractor is None) != isinstance(self.data, MixtureData):
            raise ValueError("images need an extractor, mixtures have none")
        has_classes = not isinstance(self.data, MixtureData) or self.data.layout == "image"
        if self.guidance != 1 and not has_classes:
            raise ValueError(f"guidance {self.guidance:g} needs data with classes; remove the key")
        return self


class Evaluation(Strict):
    """Evaluations of one network in a cycle of updates, as the paper's algorithm needs them."""

    role: str = Field(
        description=(
            "of the meter: student, student.tangent, teacher, critic, features, "
            "or a player's further networks"
        )
    )
    calls: int = Field(1, gt=0)
    rows: float | None = Field(
        1, gt=0, description="of all these calls together, in batches; null: as many as are metered"
    )
    gradient: Literal["none", "inputs", "weights", "both", "penalty"] = Field(
        "none",
        description=(
            "what is differentiated in; penalty: weights, and through the gradient in the inputs "
            "(R1)"
        ),
    )
    blocks: int | None = Field(None, gt=0, description="evaluates the first blocks only")


class Variant(Strict):
    """A named change to a method's settings."""

    config: dict[str, Any] = Field({})
    benchmarks: dict[str, dict[str, Any]] = Field({})
    group: Literal["distillation", "from_scratch"] | None = None
    fidelity: Literal["official code", "paper text", "reconstruction"] | None = None
    adaptation: bool | None = None
    trajectory: bool | None = None
    start: str | None = Field(None, description="as of the method; 'none': from no other arm")
    cost: list[Evaluation] | None = Field(
        None, description="as of the method, where the variant's updates differ"
    )


class MethodFile(Strict):
    """`methods/<name>/config.yaml`."""

    title: str
    paper: str
    group: Literal["distillation", "from_scratch"] = "distillation"
    fidelity: Literal["official code", "paper text", "reconstruction"]
    adaptation: bool = Field(False, description="used outside its paper's setting")
    trajectory: bool = Field(
        False, description="aims at the teacher's own sample of the same noise"
    )
    start: str | None = Field(
        None,
        description=(
            "arm whose finished student `task.network('start')` loads, of the same seed, "
            "e.g. meanflow@x0.7; its cost counts"
        ),
    )
    config: dict[str, Any] = Field({})
    benchmarks: dict[str, dict[str, Any]] = Field(
        {}, description="settings per family or name of a benchmark"
    )
    variants: dict[str, Variant] = Field({})
    cost: list[Evaluation] | None = Field(
        None,
        description="evaluations of one cycle of updates; Table 1 compares them with the meter's",
    )
    search: dict[str, list[Any]] = Field(
        {}, description="values that `distillbench tune` tries, by key of config, e.g. student.lr"
    )

    @model_validator(mode="after")
    def _fits(self) -> MethodFile:
        for name in self.variants:
            if "@" in name or SHARE.fullmatch(name):
                raise ValueError(
                    f"variant '{name}': '@' and names like x0.25, which mean a share of the "
                    "budget, are reserved: rename it"
                )
        return self


class Table(Strict):
    """`workflows/tables/<name>.yaml`."""

    name: str
    title: str
    kind: Literal["metrics", "costs", "audit"] = Field(
        "metrics",
        description=(
            "costs: what methods are and cost, from the records of `sources`; "
            "audit: the claims of `methods`, on `seeds`"
        ),
    )
    sources: list[str] = Field(
        [],
        description=(
            "tables whose records a table of costs reads; the first also for what an update costs"
        ),
    )
    benchmarks: list[str] = Field(min_length=1)
    methods: Literal["all"] | list[str] = Field(
        "all", description="'all' discovered methods, or names"
    )
    variants: list[str] = Field([], description="more rows, as method@variant")
    share: float = Field(1.0, gt=0, description="of the benchmarks' budget, for every arm")
    seeds: list[int] | None = Field(
        None, min_length=1, description="instead of those of the benchmarks"
    )
    compare: list[tuple[str, str]] = Field(
        [], description="pairs of arms whose metrics are shown as ratios, each with an interval"
    )
    draws: bool = Field(
        False, description="publish repeated draws of single checkpoints as well (draws.json)"
    )
    reported: str | None = Field(
        None, description="file with the papers' own numbers, shown in a section of their own"
    )
    beside: str | None = Field(
        None,
        description=(
            "name of an audit: its arms stand beside the papers' own ablations, "
            "in a section of their own"
        ),
    )
    again_of: str | None = Field(
        None,
        description=(
            "of an audit: name of another one, on other seeds, whose verdicts it is compared with"
        ),
    )

    @model_validator(mode="after")
    def _fits(self) -> Table:
        if self.seeds and len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds: one is given twice")
        if self.kind == "audit" and not self.seeds:
            raise ValueError(
                "an audit names its seeds: fresh ones, on which no setting was chosen "
                "and no claim was thought of"
            )
        if self.kind != "audit" and self.again_of:
            raise ValueError("again_of is a key of an audit: remove it or set kind: audit")
        if self.kind != "metrics" and self.beside:
            raise ValueError("beside is a key of a table of metrics: remove it")
        if self.kind != "metrics" and self.share != 1:
            raise ValueError("share is a key of a table of metrics: remove it")
        return self


def root() -> Path:
    """Root of the checkout: the nearest folder upwards with a `distillbench.yaml`.

    Upwards from the working directory; UserError where there is none.
    """
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "distillbench.yaml").is_file():
            return folder
    raise UserError(
        f"{here}: not inside a distillbench checkout (no distillbench.yaml here or above): "
        "cd into one"
    )


def _named(folder: Path, name: str, what: str) -> Path:
    """`<name>.yaml` in `folder`; UserError with the nearest name where there is none."""
    path = folder / f"{name}.yaml"
    if not path.is_file():
        known = [p.stem for p in folder.glob("*.yaml")]
        raise UserError(f"{folder}: unknown {what} '{name}', {nearest(name, known)}")
    return path


def benchmark(name: str) -> Benchmark:
    """The benchmark called `name`; UserError where there is none or its file is wrong."""
    path = _named(root() / "workflows/benchmarks", name, "benchmark")
    model = read(path, Benchmark)
    if model.name != name:
        raise UserError(f"{path}: key 'name' is '{model.name}', expected '{name}'")
    return model


def table(name: str) -> Table:
    """The table called `name`; UserError where there is none or its file is wrong."""
    path = _named(root() / "workflows/tables", name, "table")
    model = read(path, Table)
    if model.name != name:
        raise UserError(f"{path}: key 'name' is '{model.name}', expected '{name}'")
    if model.reported and not (root() / model.reported).is_file():
        raise UserError(f"{path}: key 'reported': {model.reported} does not exist")
    return model


SCHEMAS: dict[str, type[BaseModel]] = {
    "workflows/benchmarks/schema.json": Benchmark,
    "workflows/tables/schema.json": Table,
    "methods/config.schema.json": MethodFile,
}
