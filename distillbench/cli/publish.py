"""The commands that publish records and render pages from them, which `cli.py` adds to its own."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from distillbench import config
from distillbench.cells.disk import lock, write_atomically, write_json
from distillbench.cli.evaluate import is_evaluated, known_metrics
from distillbench.cli.render import render_costs, render_pages, verdict, written
from distillbench.errors import UserError
from distillbench.registry.claims import SCHEMAS
from distillbench.tables import plan

app = typer.Typer()
ProfileName = Annotated[
    str | None,
    typer.Option(
        "--profile", help="a Snakemake profile, e.g. slurm: its site.yaml may change benchmarks"
    ),
]


@app.command("table")
def table_(
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

    A table of `kind: costs` has no cells of its own: it is rendered from the published records of its sources.
    """
    import yaml

    from distillbench.cli import audit_pages
    from distillbench.tables import overview
    from eval.report import external, figures, records, tables

    table, results = plan.table(name, profile), config.root() / "results"
    if partial:
        text = (
            overview.partial(name, plan.jobs(table, known_metrics), is_evaluated)
            if table.kind != "costs"
            else ""
        )
        return write_atomically(results / f"{name}.partial.md", text.encode()) if text else None
    (results / f"{name}.partial.md").unlink(missing_ok=True)
    if table.kind == "costs":
        raise typer.Exit(verdict(f"results/{name}", render_costs(table, check), check))
    if table.kind == "audit":
        if not (check or render):
            audit_pages.publish(table)
        raise typer.Exit(verdict(f"results/{name}", audit_pages.render(table, check), check))
    folder = results / "records" / name
    if not (check or render):
        cells = [c for j in plan.jobs(table, known_metrics) for c in j.cells]
        for c in cells:
            if (result := c.result()) is None or (
                result["status"] == "done" and not is_evaluated(c)
            ):
                lacks = "trained" if result is None else "evaluated"
                raise UserError(
                    f"{c.label} is not {lacks}: run `snakemake --cores all results/{name}.md`"
                )
        with lock(results / "runs" / f"{name}.lock"):
            try:
                same, total = records.publish(
                    folder, [(c.folder, c.labels()) for c in cells], table.draws
                )
            except ValueError as e:
                raise UserError(str(e)) from None
        print(
            f"{name}: {same} of {total} cells have exactly the metrics published before",
            file=sys.stderr,
        )
    reported = (
        yaml.safe_load((config.root() / table.reported).read_text()) if table.reported else None
    )
    try:
        found, others = (
            records.read(folder),
            external.read_external(results / "external", table.benchmarks),
        )
    except ValueError as e:
        raise UserError(str(e)) from None
    if not found:
        raise UserError(
            f"{folder}: no published records: run `snakemake --cores all results/{name}.md`"
        )
    write, differing = written(check)
    appendix = audit_pages.beside_papers(table.beside) if table.beside else None
    tables.write(
        name, table.title, found, others, reported, table.compare, results, write, appendix
    )
    write(results / f"{name}.png", figures.picture(found, with_variants=table.methods != "all"))
    raise typer.Exit(verdict(f"results/{name}", differing, check))


@app.command()
def pages(
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="compare the files there with folders and published records; exit 1 if they differ",
        ),
    ] = False,
) -> None:
    """Render docs/methods, a page for each method and an index, from the methods' folders and published records."""
    raise typer.Exit(verdict("docs/methods", render_pages(check), check))


@app.command(hidden=True)
def schema() -> None:
    """Write the JSON schemas that editors check benchmark, table and method files with."""
    for path, model in SCHEMAS.items():
        write_json(config.root() / path, model.model_json_schema())


@app.command()
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
