"""What a table needs: its arms, and its cells as jobs. Imports no torch."""

from __future__ import annotations

import time

from distillbench import config
from distillbench.audits import needs, questions
from distillbench.audits.questions import KnownMetrics
from distillbench.cells.cell import Cell
from distillbench.cells.disk import make_folder, write_atomically
from distillbench.cells.jobs import Job, start_arms
from distillbench.config import Table, root
from distillbench.errors import UserError, nearest
from distillbench.registry import folders, resources
from distillbench.registry.folders import Arm


def table(name: str, profile: str | None = None) -> Table:
    """The table `name`, on the benchmarks that the site file of a profile gives it, if it does."""
    found = config.table(name)
    if profile is not None:
        benchmarks = resources.site(profile).benchmarks.get(name)
        if benchmarks:
            return found.model_copy(update={"benchmarks": benchmarks})
    return found


def arms(table: Table) -> list[Arm]:
    """A table's methods in their default variant, its variants, and what all these start from.

    All of them have the table's share of the budget. Raises UserError where `compare` names another
    arm.
    """
    methods = sorted(folders.discover()) if table.methods == "all" else table.methods
    found = [folders.arm(name).at(table.share) for name in (*methods, *table.variants)]
    found += start_arms(found)
    names = [arm.name for arm in found]
    for pair in table.compare:
        for name in pair:
            if name not in names:
                raise UserError(
                    f"workflows/tables/{table.name}.yaml: key 'compare': '{name}' is no arm of "
                    f"this table, {nearest(name, names)}"
                )
    return found


def jobs(table: Table, metrics: KnownMetrics) -> list[Job]:
    """Every benchmark's teachers, a job each, and its arms, as many seeds in a job as they may.

    Students wait for their own teacher alone. metrics: what claims of an audit may name.
    """
    if table.kind == "audit":
        assert table.seeds is not None
        return needs.jobs(questions.of_table(table, metrics), table.seeds)
    out = []
    for name in table.benchmarks:
        b = config.benchmark(name)
        seeds = table.seeds or b.seeds
        out += [Job((Cell(b, None, seed),)) for seed in seeds]
        for arm in arms(table):
            size = resources.of(b.name, arm.name).seeds or len(seeds)
            cells = [Cell(b, arm, seed) for seed in seeds]
            out += [Job(tuple(cells[i : i + size])) for i in range(0, len(cells), size)]
    return out


def note_cells(table: Table, wanted: list[Job], complete: bool) -> None:
    """Write results/runs/<table>.cells, which lists the table's stamps.

    It is renewed while cells are missing, so that Snakemake sees work. Without it a table newer
    than its remaining inputs would count as up to date when a cell's record is deleted.
    """
    path = root() / f"results/runs/{table.name}.cells"
    text = "".join(f"{job.stamp('evaluated')}\n" for job in wanted)
    if not complete or not path.is_file() or not path.read_text().startswith(text):
        make_folder(path.parent)
        # New content: of an equal one Snakemake would ignore the new time.
        write_atomically(path, f"{text}{time.time_ns()}\n".encode())
