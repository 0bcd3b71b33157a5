"""`distillbench table`, `pages`, `schema` and `rekey`: published records, and what is rendered from
them."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
import yaml

from distillbench import config
from distillbench.cells.disk import json_bytes, lock, write_atomically
from distillbench.cli import audit_pages
from distillbench.cli.evaluate import has_ended, is_evaluated, known_metrics
from distillbench.cli.options import ProfileName, out
from distillbench.cli.render import (
    PageWriter,
    no_records,
    published,
    render_costs,
    render_pages,
    say_rendered,
)
from distillbench.config import Table
from distillbench.errors import UserError
from distillbench.registry.claims import SCHEMAS
from distillbench.tables import contents, overview


def table(
    name: Annotated[str, typer.Argument(help="name of a file in workflows/tables, e.g. table2")],
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="compare the files there with the published records; exit 1 if they differ",
        ),
    ] = False,
    render: Annotated[
        bool, typer.Option("--render", help="render from the published records; look at no cell")
    ] = False,
    profile: ProfileName = None,
    partial: Annotated[
        bool,
        typer.Option("--partial", help="write NAME.partial.md: what is missing; render nothing"),
    ] = False,
) -> None:
    """Publish the records of a table's cells to results/records and render the table from them.

    A table of `kind: costs` has no cells of its own: it is rendered from the published records of
    its sources.
    """
    wanted = contents.table(name, profile)
    incomplete = config.root() / "results" / f"{name}.partial.md"
    if partial:
        if wanted.kind != "costs":
            text = overview.partial(name, contents.jobs(wanted, known_metrics), is_evaluated)
            write_atomically(incomplete, text.encode())
        return
    incomplete.unlink(missing_ok=True)
    from_cells = not (check or render)
    if wanted.kind == "costs":
        differing = render_costs(wanted, check)
    elif wanted.kind == "audit":
        if from_cells:
            audit_pages.publish(wanted)
        differing = audit_pages.render(wanted, check)
    else:
        if from_cells:
            publish_cells(wanted)
        differing = render_metrics(wanted, check)
    raise typer.Exit(say_rendered(f"results/{name}", differing, check))


def publish_cells(table: Table) -> None:
    """Copy the records of a table's cells, all of which must have ended, to results/records."""
    from eval.report import records

    cells = [cell for job in contents.jobs(table, known_metrics) for cell in job.cells]
    for cell in cells:
        if not has_ended(cell):
            lacks = "trained" if cell.result() is None else "evaluated"
            raise UserError(
                f"{cell.label} is not {lacks}: run `snakemake --cores all results/{table.name}.md`"
            )
    results = config.root() / "results"
    labelled = [(cell.folder, cell.labels()) for cell in cells]
    try:
        with lock(results / "runs" / f"{table.name}.lock"):
            same, total = records.publish(results / "records" / table.name, labelled, table.draws)
    except ValueError as e:
        raise UserError(str(e)) from None
    print(
        f"{table.name}: {same} of {total} cells have exactly the metrics published before",
        file=sys.stderr,
    )


def render_metrics(table: Table, check: bool) -> list[str]:
    """Render a table of metrics and its picture from published records and external samples.

    Returns the names of files that differed; UserError where there are no records.
    """
    from eval.report import external, figures, tables

    results = config.root() / "results"
    reported = None
    if table.reported:
        text = (config.root() / table.reported).read_text(encoding="utf-8")
        reported = yaml.safe_load(text)
    records = published(table.name)
    try:
        others = external.read_external(results / "external", table.benchmarks)
    except ValueError as e:
        raise UserError(str(e)) from None
    if not records:
        raise no_records(results / "records" / table.name, table.name)
    writer = PageWriter(check)
    appendix = audit_pages.beside_papers(table.beside) if table.beside else None
    tables.write(
        table.name,
        table.title,
        records,
        others,
        reported,
        table.compare,
        results,
        writer.write,
        appendix,
    )
    # A table of another share of the budget has no arm without it in its name.
    every_arm = table.methods != "all" or table.share != 1
    picture = figures.picture(records, with_variants=every_arm)
    writer.write(results / f"{table.name}.png", picture)
    return writer.differing


def pages(
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="compare the files there with folders and published records; exit 1 if they "
            "differ",
        ),
    ] = False,
) -> None:
    """Render docs/methods, a page for each method and an index, from the methods' folders and
    published records."""
    raise typer.Exit(say_rendered("docs/methods", render_pages(check), check))


def schema(
    check: Annotated[
        bool, typer.Option("--check", help="compare the files there; exit 1 if they differ")
    ] = False,
) -> None:
    """Write the JSON schemas that editors check benchmark, table and method files with."""
    writer = PageWriter(check)
    for path, model in SCHEMAS.items():
        writer.write(config.root() / path, json_bytes(model.model_json_schema()))
    if check and writer.differing:
        out.print("schemas differ from the models: run `distillbench schema`")
        raise typer.Exit(1)


def rekey(
    base: Annotated[str, typer.Argument(help="a commit whose code gave the published keys")],
    prove: Annotated[int, typer.Option(min=1, help="how many cells to train again, at least")] = 12,
    seed: Annotated[int, typer.Option(help="of the draw of these cells; choose it beforehand")] = 0,
) -> None:
    """New keys for published records after a change of code that changed no number.

    Draws cells, at least one of every method on every family of benchmarks, trains them again and
    compares their metrics with the published ones. Only if all are equal the new keys are written;
    results/records/rekeyed.json says from and to which commit, and by which cells.
    """
    from distillbench.cli.rekey import rekey as prove_and_write

    if not prove_and_write(base, prove, seed):
        raise typer.Exit(1)
