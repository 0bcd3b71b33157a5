"""What the Snakefile needs to know: jobs, their stamps made to agree with the records, and what is
wrong with the files, said before any work starts."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from distillbench import config
from distillbench.audits import needs, questions
from distillbench.audits.experiments import Experiment
from distillbench.cells import validate
from distillbench.cells.environment import BEGAN
from distillbench.cells.jobs import Job, is_trained
from distillbench.cli.evaluate import has_ended, known_metrics
from distillbench.cli.extractors import check_extractors
from distillbench.cluster import control
from distillbench.config import Table
from distillbench.errors import UserError
from distillbench.registry import folders, resources
from distillbench.registry.resources import Site
from distillbench.tables import contents

JobName = tuple[str, str, str]  # benchmark, arm, hash of keys


@dataclass
class Workflow:
    """Everything that rules ask for."""

    profile: str | None
    site: Site
    costs: dict[str, str] = field(default_factory=dict)  # table of costs -> its first source
    jobs: dict[str, list[Job]] = field(default_factory=dict)  # by table
    every_job: dict[JobName, Job] = field(default_factory=dict)
    experiments: dict[str, list[Experiment]] = field(default_factory=dict)  # by audit
    every_experiment: dict[tuple[str, str], Experiment] = field(default_factory=dict)

    @property
    def as_profile(self) -> str:
        """The option by which commands are told the profile."""
        return f"--profile {self.profile}" if self.profile else ""

    @property
    def retries(self) -> int:
        """How often Snakemake repeats a job; a launcher on a cluster tries by itself."""
        return 0 if self.profile else 1

    def job(self, benchmark: str, arm: str, keys: str) -> Job:
        """The job of a stamp."""
        return self.every_job[benchmark, arm, keys]

    def needed_by(self, job: Job) -> list[str]:
        """Stamps of teachers, and of other students, that a job's cells start from."""
        keys = {one.key for cell in job.cells for one in cell.needed}
        found = []
        for other in self.every_job.values():
            if any(cell.key in keys for cell in other.cells):
                found.append(other.stamp("trained"))
        return found

    def stamps(self, table: str) -> list[str]:
        """Stamps of all cells of a table."""
        return [job.stamp("evaluated") for job in self.jobs[table]]

    def measured(self, table: str) -> list[str]:
        """Stamps of all experiments of an audit."""
        return [experiment.stamp for experiment in self.experiments[table]]

    def seeds(self, experiment: str, keys: str) -> str:
        """Seeds of an experiment as the command line takes them."""
        return ",".join(str(seed) for seed in self.every_experiment[experiment, keys].seeds)

    def request(self, benchmark: str, arm: str, stage: str) -> str:
        """What a job of this stage may use, for its launcher."""
        return resources.request(benchmark, arm, stage, self.site)


def claims_files() -> list[str]:
    """Every method's claims.yaml."""
    paths = [method.path / "claims.yaml" for method in folders.discover().values()]
    return [str(path) for path in paths if path.is_file()]


def read(arguments: Sequence[str], wanted: str | None) -> Workflow:
    """The workflow of a Snakemake command line; exits with one line and code 2 on a mistake.

    wanted: the one table that it is about, where the arguments do not name its page.
    """
    os.environ[BEGAN] = str(time.time())
    try:
        return prepare(arguments, wanted)
    except UserError as e:
        print(f"distillbench: {e}", file=sys.stderr)
        sys.exit(2)


def profile_of(arguments: Sequence[str]) -> str | None:
    """The Snakemake profile in use if it is one of a cluster, with a site.yaml, else None."""
    named = os.environ.get("SNAKEMAKE_PROFILE", "")
    for word, following in zip(arguments, [*arguments[1:], ""]):
        if word == "--profile":
            named = following
        elif word.startswith("--profile="):
            named = word.partition("=")[2]
    name = named.rstrip("/")
    return name if name and (config.root() / name / "site.yaml").is_file() else None


def tables_of(arguments: Sequence[str], wanted: str | None, profile: str | None) -> list[Table]:
    """The tables whose pages are asked for, all of them where none is named."""
    names = sorted(path.stem for path in (config.root() / "workflows/tables").glob("*.yaml"))
    named = []
    for name in names:
        if name == wanted or any(f"results/{name}." in argument for argument in arguments):
            named.append(name)
    return [contents.table(name, profile) for name in named or names]


def prepare(arguments: Sequence[str], wanted: str | None) -> Workflow:
    """Jobs of the tables asked for; stamps agree with records, and files have been checked.

    Tables of costs have no jobs: their first source, which they read, is among the tables.
    """
    profile = profile_of(arguments)
    workflow = Workflow(profile, resources.site(profile) if profile else Site())
    tables: dict[str, Table] = {}
    for table in tables_of(arguments, wanted, profile):
        if table.kind == "costs":
            source = contents.table(table.sources[0], profile)
            workflow.costs[table.name] = source.name
            tables[source.name] = source
        else:
            tables[table.name] = table
    for name, table in tables.items():
        workflow.jobs[name] = contents.jobs(table, known_metrics)
        for job in workflow.jobs[name]:
            workflow.every_job[job.benchmark, job.arm, job.keys] = job
        if table.kind == "audit":
            assert table.seeds is not None
            asked = questions.of_table(table, known_metrics)
            workflow.experiments[name] = needs.experiments_of(asked, table.seeds)
            for experiment in workflow.experiments[name]:
                workflow.every_experiment[experiment.name, experiment.keys] = experiment
    every = list(workflow.every_job.values())
    check_extractors([job.cells[0].benchmark for job in every])

    to_train = [job for job in every if not job.sync("trained", is_trained)]
    to_evaluate = [job for job in every if not job.sync("evaluated", has_ended)]
    to_measure = [e for e in workflow.every_experiment.values() if not e.sync()]
    if profile:
        requests = [workflow.request(job.benchmark, job.arm, "train") for job in to_train]
        requests += [workflow.request(job.benchmark, job.arm, "evaluate") for job in to_evaluate]
        control.check_requests(requests)
    for warning in validate.validate(to_train):
        print(f"distillbench: {warning}", file=sys.stderr)
    unfinished: list[Any] = [*to_evaluate, *to_measure]
    for name, jobs in workflow.jobs.items():
        own = [*jobs, *workflow.experiments.get(name, [])]
        complete = not any(one in unfinished for one in own)
        contents.note_cells(tables[name], jobs, complete)
    return workflow
