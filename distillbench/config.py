"""Models of the files a user edits (project, benchmark, table, method) and their one-line errors. Imports no torch."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from distillbench.errors import UserError, nearest

M = TypeVar("M", bound=BaseModel)
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the same, faster, where libyaml is there
SHARE = re.compile(r"x(\d+\.?\d*)")  # the last part of method@x0.25: an arm with that share of the budget


class Strict(BaseModel):
    """Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Project(Strict):
    """`distillbench.yaml` at the root of a checkout."""

    method_paths: list[str] = Field([], description="folders of methods outside the checkout (or folders of such folders)")


class DigitsData(Strict):
    """scikit-learn's 8x8 digits (they come with the package)."""

    kind: Literal["digits"]
    inner: bool = Field(False, description="split the training half once more, for choosing settings: no reported digit is seen")

    def fingerprint(self) -> str:
        spec = importlib.util.find_spec("sklearn")
        assert spec is not None and spec.submodule_search_locations
        return digest((Path(spec.submodule_search_locations[0]) / "datasets/data/digits.csv.gz").read_bytes())


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
        return digest(self.model_dump_json().encode())


class NetworkSpec(Strict):
    """The architecture of teacher, students and critics."""

    width: int = Field(gt=0)
    depth: int = Field(gt=0)


class TeacherSpec(Strict):
    """How the teacher is trained. On mixtures the velocity is exact and this network only initialises students."""

    updates: int = Field(gt=0)
    batch: int = Field(gt=0)
    lr: float = Field(gt=0)
    betas: tuple[float, float] = (0.9, 0.99)
    warmup: float = Field(0.03, ge=0, lt=1)
    final_lr: float = Field(0.02, ge=0, le=1)
    half_life: float = Field(0.1, gt=0, description="of the weight average, as a share of the updates")
    time_mean: float = 0.0
    time_std: float = Field(1.0, gt=0)
    label_dropout: float = Field(0.1, ge=0, lt=1)
    heun_steps: int = Field(32, gt=0, description="the 'many steps' of the reference sampler; two evaluations each")


class Budget(Strict):
    """What every method may spend per seed, in units the harness meters."""

    flops: float = Field(gt=0)


class Sampling(Strict):
    """How many samples a student and its teacher give for evaluation."""

    count: int = Field(gt=0)
    batch: int = Field(1000, gt=0)


class Benchmark(Strict):
    """`workflows/benchmarks/<name>.yaml`: same teacher, same data, same budget, same evaluator for every method."""

    name: str
    family: str = Field(description="methods may give settings for a family of benchmarks")
    data: Annotated[DigitsData | MixtureData, Field(discriminator="kind")]
    network: NetworkSpec
    teacher: TeacherSpec
    budget: Budget
    sampling: Sampling
    extractor: str | None = Field(None, description="feature extractor of the evaluation: a name for images, none for mixtures")
    cross_extractor: str | None = Field(None, description="a second one, of other architecture and objective, for a column of its own")
    seeds: list[int] = Field(min_length=1)
    guidance: float = Field(1.0, description="guidance weight of teacher and students")
    timeout_s: float = Field(3600, gt=0, description="a cell that trains longer is recorded as `timeout`")
    stall_s: float = Field(300, gt=0, description="a cell in which no step and no batch of samples ends for so long is recorded as `hung`")

    @model_validator(mode="after")
    def _fits(self) -> Benchmark:
        if (self.extractor is None) != isinstance(self.data, MixtureData):
            raise ValueError("images need an extractor, mixtures have none")
        if self.guidance != 1 and isinstance(self.data, MixtureData) and self.data.layout != "image":
            raise ValueError(f"guidance {self.guidance:g} needs data with classes; remove the key")
        return self


class Evaluation(Strict):
    """Evaluations of one network in a cycle of a method's updates, as its paper's algorithm needs them."""

    role: str = Field(description="of the meter: student, student.tangent, teacher, critic, features, or a player's further networks")
    calls: int = Field(1, gt=0)
    rows: float | None = Field(1, gt=0, description="of all these calls together, in batches; null: as many as are metered")
    gradient: Literal["none", "inputs", "weights", "both", "penalty"] = Field(
        "none", description="what is differentiated in; penalty: weights, and through the gradient in the inputs (R1)"
    )
    blocks: int | None = Field(None, gt=0, description="evaluates the first blocks only")


class Variant(Strict):
    """A named change to a method's settings."""

    config: dict[str, Any] = {}
    benchmarks: dict[str, dict[str, Any]] = {}
    group: Literal["distillation", "from_scratch"] | None = None
    fidelity: Literal["official code", "paper text", "reconstruction"] | None = None
    adaptation: bool | None = None
    trajectory: bool | None = None
    start: str | None = Field(None, description="as of the method; 'none': from no other arm")
    cost: list[Evaluation] | None = Field(None, description="as of the method, where the variant's updates differ")


class MethodFile(Strict):
    """`methods/<name>/config.yaml`."""

    title: str
    paper: str
    group: Literal["distillation", "from_scratch"] = "distillation"
    fidelity: Literal["official code", "paper text", "reconstruction"]
    adaptation: bool = Field(False, description="used outside its paper's setting")
    trajectory: bool = Field(False, description="aims at the teacher's own sample of the same noise")
    start: str | None = Field(
        None, description="arm whose finished student `task.network('start')` loads, of the same seed, e.g. meanflow@x0.7; its cost counts"
    )
    config: dict[str, Any] = {}
    benchmarks: dict[str, dict[str, Any]] = Field({}, description="settings per family or name of a benchmark")
    variants: dict[str, Variant] = {}
    cost: list[Evaluation] | None = Field(None, description="evaluations of one cycle of updates; Table 1 compares them with the meter's")
    search: dict[str, list[Any]] = Field({}, description="values that `distillbench tune` tries, by key of config, e.g. student.lr")

    @model_validator(mode="after")
    def _fits(self) -> MethodFile:
        for name in self.variants:
            if "@" in name or SHARE.fullmatch(name):
                raise ValueError(f"variant '{name}': '@' and names like x0.25, which mean a share of the budget, are reserved: rename it")
        return self


class Table(Strict):
    """`workflows/tables/<name>.yaml`."""

    name: str
    title: str
    kind: Literal["metrics", "costs", "audit"] = Field(
        "metrics", description="costs: what methods are and cost, from the records of `sources`; audit: the claims of `methods`, on `seeds`"
    )
    sources: list[str] = Field([], description="tables whose records a table of costs reads; the first also for what an update costs")
    benchmarks: list[str] = Field(min_length=1)
    methods: Literal["all"] | list[str] = Field("all", description="'all' discovered methods, or names")
    variants: list[str] = Field([], description="more rows, as method@variant")
    seeds: list[int] | None = Field(None, min_length=1, description="instead of those of the benchmarks")
    compare: list[tuple[str, str]] = Field([], description="pairs of arms whose metrics are shown as ratios, each with an interval")
    draws: bool = Field(False, description="publish repeated draws of single checkpoints as well (draws.json)")
    reported: str | None = Field(None, description="file with the papers' own numbers, shown in a section of their own")

    reported_again: str | None = Field(None, description="of an audit: name of the page that sets the papers' ablations beside its arms")
    again_of: str | None = Field(None, description="of an audit: name of another one, on other seeds, whose verdicts it is compared with")

    @model_validator(mode="after")
    def _fits(self) -> Table:
        if self.seeds and len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds: one is given twice")
        if self.kind == "audit" and not self.seeds:
            raise ValueError("an audit names its seeds: fresh ones, on which no setting was chosen and no claim was thought of")
        if self.kind != "audit" and (self.again_of or self.reported_again):
            raise ValueError("again_of and reported_again are keys of an audit: remove them or set kind: audit")
        return self


def digest(data: bytes) -> str:
    """16 hexadecimal digits of SHA-256."""
    return hashlib.sha256(data).hexdigest()[:16]


def canonical(value: Any) -> bytes:
    """One byte string per JSON value, whatever the order of its keys."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def merged(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """`change` over `base`, dictionaries key by key."""
    out = dict(base)
    for key, value in change.items():
        out[key] = merged(out[key], value) if isinstance(value, dict) and isinstance(out.get(key), dict) else value
    return out


def explain(error: ValidationError, model: type[BaseModel], where: str, text: str | None = None) -> UserError:
    """The first problem of a validation as one line: file, key, remedy; with the line where the file's `text` is given."""
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")  # a misspelt key is also a missing one
    path = [p for p in first["loc"]]
    where += "" if text is None else f":{line_of(text, path)}"
    key = ".".join(str(p) for p in path)
    if first["type"] == "extra_forbidden":
        return UserError(f"{where}: unknown key '{key}', {nearest(str(path[-1]), _keys_beside(model, path))}")
    if first["type"] == "missing":
        return UserError(f"{where}: key '{key}' is missing")
    return UserError(f"{where}: {key or 'file'}: {first['msg']} (got {first['input']!r:.60})")


def _keys_beside(model: type[BaseModel], path: list[Any]) -> list[str]:
    """The fields of the (nested) model in which the last element of `path` was looked up."""
    for part in path[:-1]:
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        inner = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        model = inner[0] if inner else model
    return list(model.model_fields)


def line_of(text: str, path: list[Any]) -> int:
    """The line at which the value under `path`, keys and indices, begins in YAML; of its nearest parent where it is missing."""
    node = _composed(text)
    line = 1 if node is None else node.start_mark.line + 1
    for part in path:
        if isinstance(node, yaml.SequenceNode) and isinstance(part, int):
            node = node.value[part]
        elif isinstance(node, yaml.MappingNode) and (found := [pair for pair in node.value if pair[0].value == str(part)]):
            line, node = found[0][0].start_mark.line + 1, found[0][1]
            continue
        else:
            break
        line = node.start_mark.line + 1
    return line


@lru_cache
def _composed(text: str) -> Any:
    return yaml.compose(text, LOADER)


def read(path: Path, model: type[M], lines: bool = False) -> M:
    """A YAML file as `model`; UserError names file, key and remedy, with `lines` the line as well."""
    try:
        about = path.stat()
        return _read(path, model, lines, (about.st_mtime_ns, about.st_size, about.st_ino))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror}): make it a readable file") from None


@lru_cache(maxsize=512)
def _read(path: Path, model: type[M], lines: bool, _stamp: tuple[int, ...]) -> M:
    """Once for each state of a file: an audit asks for hundreds of arms, whose models are frozen."""
    text = ""
    try:
        text = path.read_text()
        return model.model_validate(yaml.load(text, LOADER) or {})
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(e).split())}") from None
    except ValidationError as e:
        raise explain(e, model, str(path), text if lines else None) from None


def root() -> Path:
    """The checkout we stand in: the nearest folder upwards with a `distillbench.yaml`."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "distillbench.yaml").is_file():
            return folder
    raise UserError(f"{here}: not inside a distillbench checkout (no distillbench.yaml here or above): cd into one")


def _named(folder: Path, name: str, what: str) -> Path:
    path = folder / f"{name}.yaml"
    if not path.is_file():
        raise UserError(f"{folder}: unknown {what} '{name}', {nearest(name, (p.stem for p in folder.glob('*.yaml')))}")
    return path


def benchmark(name: str) -> Benchmark:
    """The benchmark called `name`."""
    path = _named(root() / "workflows/benchmarks", name, "benchmark")
    found = read(path, Benchmark)
    if found.name != name:
        raise UserError(f"{path}: key 'name' is '{found.name}', expected '{name}'")
    return found


def table(name: str) -> Table:
    """The table called `name`."""
    path = _named(root() / "workflows/tables", name, "table")
    found = read(path, Table)
    if found.name != name:
        raise UserError(f"{path}: key 'name' is '{found.name}', expected '{name}'")
    if found.reported and not (root() / found.reported).is_file():
        raise UserError(f"{path}: key 'reported': {found.reported} does not exist")
    return found


SCHEMAS: dict[str, type[BaseModel]] = {
    "workflows/benchmarks/schema.json": Benchmark,
    "workflows/tables/schema.json": Table,
    "methods/config.schema.json": MethodFile,
}
