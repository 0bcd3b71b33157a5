"""`distillbench status`, `logs`, `plan` and `cancel`: how far a table's cells are, what happened in
one, what is left, and an end to it."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from distillbench.cells import validate
from distillbench.cells.jobs import is_trained
from distillbench.cli import audit_pages
from distillbench.cli.evaluate import is_evaluated, known_metrics
from distillbench.cli.extractors import check_extractors
from distillbench.cli.options import ProfileName, TableName, out
from distillbench.cluster import control
from distillbench.tables import contents, overview, story


def status(
    table: TableName = "table2",
    long: Annotated[
        bool,
        typer.Option("--long", help="a line for each cell, with its reason, seconds and folder"),
    ] = False,
    profile: ProfileName = None,
) -> None:
    """How far every cell of a table is: rows are methods, columns are seeds.

    done: trained and evaluated. trained: not evaluated yet. 41% 35 s left: running now. interrupted
    at 41%: the same command as before continues it. waiting: for its teacher or start. to do: can
    start. queued (Priority): in SLURM's queue. lost: by the cluster; the same command tries again.
    FAILED, DIVERGED, OOM, TIMEOUT, HUNG, OVER BUDGET, REFUSED: it has a record that says why; see
    `distillbench logs`.
    """
    jobs = contents.jobs(contents.table(table, profile), known_metrics)
    if not long:
        out.print(overview.matrix(jobs, is_evaluated))
        return
    for line in overview.details(jobs, is_evaluated):
        out.print(line, soft_wrap=True, markup=False)


def logs(
    cell: Annotated[
        str,
        typer.Argument(
            help="benchmark/method[@variant]/seed, e.g. digits/dmd/0, or a cell's folder"
        ),
    ],
) -> None:
    """What happened in a cell: status and reason, starts and deaths, last steps, traceback, files.

    distillbench logs digits/dmd/0

    distillbench logs digits/dmd@no-regression/seed0

    distillbench logs results/runs/digits/teacher/seed0-0123456789ab
    """
    out.print(story.story(story.find(cell)), soft_wrap=True)


def show_plan(table: TableName = "table2", profile: ProfileName = None) -> None:
    """What a table still needs, and a check of every file it will read; with --profile slurm also
    what would be asked of the cluster."""
    wanted = contents.table(table, profile)
    jobs = contents.jobs(wanted, known_metrics)
    check_extractors([job.cells[0].benchmark for job in jobs])
    to_train = [job for job in jobs if not all(is_trained(cell) for cell in job.cells)]
    for warning in validate.validate(to_train):
        print(f"distillbench: {warning}", file=sys.stderr)
    if not to_train:
        how = f"--profile {profile}" if profile else "--cores all"
        out.print(
            f"{table}: every cell is there; `snakemake {how} results/{table}.md` has at most to "
            "evaluate and render"
        )
    for line in overview.forecast(to_train, is_trained, profile):
        out.print(line, soft_wrap=True, markup=False)
    if wanted.kind == "audit":
        out.print(audit_pages.cost(wanted, jobs), soft_wrap=True, markup=False)


def cancel(table: TableName = "table2", profile: ProfileName = "slurm") -> None:
    """End the SLURM jobs of a table's cells; their launchers do not try again. The same snakemake
    command continues them later."""
    numbers = control.cancel(contents.jobs(contents.table(table, profile), known_metrics))
    if numbers:
        print(f"cancelled: jobs {', '.join(numbers)}")
    else:
        print("none of its jobs is in the queue")
