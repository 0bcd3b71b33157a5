"""What a job may use on a cluster: `workflows/resources.yaml`, and what is particular to one of
them: `slurm/site.yaml`. Imports no torch."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, model_validator

from distillbench.config import root
from distillbench.errors import UserError, nearest
from distillbench.reading import Strict, explain, merged, read

FILE = "workflows/resources.yaml"


class Resources(Strict):
    """What one job may use; it trains some seeds of one arm, one after another.

    With several ranks it trains one cell.
    """

    nodes: int = Field(gt=0)
    ranks: int = Field(gt=0, description="processes per node; all of them train one cell together")
    gpus: int = Field(ge=0, description="per node")
    cpus: int = Field(gt=0, description="per rank")
    memory_gb: float = Field(gt=0, description="per node")
    minutes: int = Field(
        gt=0,
        description="time limit; a job that reaches it saves a checkpoint and goes on in the next "
        "one",
    )
    time_limits: int = Field(
        ge=0, description="how many of them a cell may reach before it is recorded as `timeout`"
    )
    seeds: int | None = Field(
        gt=0, description="per job; null: all, so that short cells share an import of torch"
    )
    tries: int = Field(
        gt=0,
        description="submissions of a job that the machine lost: node failure, cancelled, refused",
    )
    backoff_s: float = Field(
        ge=0, description="seconds before the second of them; each further one waits twice as long"
    )

    @model_validator(mode="after")
    def _fits(self) -> Resources:
        if self.nodes * self.ranks > 1 and self.seeds != 1:
            raise ValueError("several ranks train one cell: set seeds: 1")
        return self


class ResourcesFile(Strict):
    """`workflows/resources.yaml`: defaults, then per benchmark, then per method or arm.

    'teacher' is an arm.
    """

    defaults: dict[str, Any]
    benchmarks: dict[str, dict[str, Any]] = Field(default_factory=dict)
    methods: dict[str, dict[str, Any]] = Field(default_factory=dict)


class Site(Strict):
    """`slurm/site.yaml`: this cluster."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    sbatch: dict[str, str | int | bool] = Field(
        default_factory=dict, description="further options of sbatch, without their dashes"
    )
    benchmarks: dict[str, list[str]] = Field(
        default_factory=dict, description="of a table, in place of its file's"
    )


@lru_cache
def _file(path: Path, _mtime: int) -> ResourcesFile:
    return read(path, ResourcesFile)


def of(benchmark: str, arm: str) -> Resources:
    """Resources of an arm's jobs on a benchmark: the defaults, over them the benchmark's, the
    method's, the arm's; UserError names file and key of a mistake."""
    path = root() / FILE
    if not path.is_file():
        raise UserError(f"{path}: no such file: take it from the repository")
    found = _file(path, path.stat().st_mtime_ns)
    values = merged(found.defaults, found.benchmarks.get(benchmark, {}))
    for name in dict.fromkeys((arm.partition("@")[0], arm)):
        values = merged(values, found.methods.get(name, {}))
    try:
        return Resources.model_validate(values)
    except ValidationError as e:
        raise explain(e, Resources, f"{path} ({benchmark}/{arm})") from None


def site(profile: str) -> Site:
    """The site file of a Snakemake profile; UserError where there is none."""
    path = root() / profile / "site.yaml"
    if not path.is_file():
        profiles = (file.parent.name for file in root().glob("*/site.yaml"))
        raise UserError(f"{path}: no such file, {nearest(profile, profiles)}")
    return read(path, Site)


def request(benchmark: str, arm: str, stage: str, where: Site) -> str:
    """JSON that tells a job's launcher its resources, and sbatch's options of this cluster.

    Evaluation takes one rank.
    """
    found = of(benchmark, arm)
    if stage == "evaluate":
        found = found.model_copy(update={"nodes": 1, "ranks": 1})
    named = where.model_dump(include={"partition", "account", "qos"}, exclude_none=True)
    asked = found.model_dump(exclude={"seeds"})
    asked["sbatch"] = named | where.sbatch
    return json.dumps(asked, sort_keys=True)
