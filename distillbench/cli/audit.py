"""The commands of audits and bundles, which `cli.py` adds to its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from distillbench import config
from distillbench.audits import needs, questions
from distillbench.cells.progress import reporter
from distillbench.cli.evaluate import known_metrics
from distillbench.config import Table
from distillbench.errors import UserError
from distillbench.tables import plan

app = typer.Typer()
out = Console(highlight=False)


def audit_table(name: str) -> Table:
    table = plan.table(name)
    if table.kind != "audit":
        raise UserError(
            f"audit {name}: workflows/tables/{name}.yaml is a table of kind {table.kind}: name one of kind audit"
        )
    return table


@app.command()
def audit(
    name: Annotated[str, typer.Argument(help="an audit in workflows/tables")] = "audit",
    method: Annotated[str | None, typer.Option(help="claims of this method alone")] = None,
    benchmark: Annotated[str | None, typer.Option(help="on this benchmark alone")] = None,
    claim: Annotated[str | None, typer.Option(help="this claim alone, by its id")] = None,
    run: Annotated[
        bool,
        typer.Option(
            "--run/--no-run",
            help="train and measure what is missing; --no-run: judge what is there",
        ),
    ] = True,
    list_: Annotated[
        bool, typer.Option("--list", help="list the claims with their arms; run nothing")
    ] = False,
) -> None:
    """Run what a claim still needs, and print its verdict.

    distillbench audit --claim FF-C3a              one claim, on every benchmark it names

    distillbench audit --method freeflow --benchmark gaussians-ring

    distillbench audit --list                      all claims: id, kind, benchmark, arms

    The whole page, with evidence: `snakemake --cores all results/audit.md`. Only missing cells run; those of tables are shared.
    Verdicts are corrected for all claims of a paper that have run, as on the page.
    """
    from distillbench.cli import audit_pages
    from eval.audit import page

    table = audit_table(name)
    assert table.seeds is not None
    asked = questions.chosen(questions.of_table(table, known_metrics), method, benchmark, claim)
    if list_:
        for q in asked:
            how = (
                q.why_not
                or f"{q.benchmark}: {' | '.join(q.arms)}, {q.trial.seeds if q.trial else 0} seeds"
            )
            out.print(f"{q.claim.id}  {q.claim.kind}  {how}", soft_wrap=True, markup=False)
        return
    stamps = needs.stamps(questions.of_table(table, known_metrics), asked, table.seeds)
    if run and stamps:
        command = [
            sys.executable,
            "-m",
            "snakemake",
            "--quiet",
            "--cores",
            "all",
            *stamps,
            "--config",
            f"tables={name}",
        ]
        if (code := subprocess.run(command, cwd=config.root()).returncode) != 0:
            raise typer.Exit(code)
    names = {(q.claim.id, q.benchmark) for q in asked}
    every = questions.of_table(table, known_metrics)
    of_papers = [
        q for q in every if q.method.name in {a.method.name for a in asked}
    ]  # families are a paper's
    for found in (
        f
        for f in audit_pages.current_findings(table, of_papers)
        if (f.id, f.benchmark) in names
    ):
        reason = f" ({found.reason})" if found.reason else ""
        lines = [f"{found.id}: {found.verdict}{reason}"]
        if found.effect is not None:
            numbers = f"{page.interval(found)}, n {page.seeds_words(found)}, {page.ground(found)}"
            lines += ["  " + line for line in (found.claim, numbers, *page.plot(found))]
        out.print("\n".join(lines), soft_wrap=True, markup=False)


@app.command()
def measure(
    experiment: Annotated[str, typer.Argument(help="a file in mechanisms/, without .py")],
    seeds: Annotated[str, typer.Option(help="comma-separated")] = "10,11,12,13,14",
) -> None:
    """Run an experiment of a mechanism on seeds; what was measured is not measured again."""
    from distillbench.cli import audit_pages

    try:
        chosen = [int(s) for s in seeds.split(",")]
    except ValueError:
        raise UserError(
            f"--seeds: '{seeds}' is not a comma-separated list of whole numbers, e.g. 10,11"
        ) from None
    audit_pages.measure(experiment, chosen, reporter(f"measure {experiment}"))


@app.command()
def bundle(
    output: Annotated[Path, typer.Option(help="the archive, .tar.gz")] = Path(
        "distillbench-audit.tar.gz"
    ),
    name: Annotated[str, typer.Argument(help="an audit in workflows/tables")] = "audit",
) -> None:
    """One archive for a reviewer: tables, audit, records, claims, configurations, code, environment, checksums, a manifest.

    Two bundles of one checkout are the same bytes. `distillbench verify BUNDLE` checks one.
    """
    from distillbench.cli import bundles

    audit_table(name)
    digest, count = bundles.write(output, name)
    print(f"{output}: {count} files, sha256 {digest}")


@app.command()
def verify(
    bundle: Annotated[Path, typer.Argument(help="an archive that `distillbench bundle` wrote")],
    rerun: Annotated[
        int,
        typer.Option(
            min=0,
            help="train so many cells of it again, drawn at random, and compare their metrics",
        ),
    ] = 0,
    seed: Annotated[int | None, typer.Option(help="of that draw; random if left out")] = None,
) -> None:
    """Hash every file of a bundle, draw its verdicts again from the values per seed, render its pages again; exit code 1 if one differs.

    Nothing of the bundle is executed: verdicts and reruns use the code of this checkout, and say so where it is not the bundle's.
    """
    from distillbench.cli import bundles

    bad = 0
    for finding in bundles.verify(bundle, rerun, seed):
        bad += not finding.good
        out.print(
            f"{'ok    ' if finding.good else 'FAILED'}  {finding.text}",
            soft_wrap=True,
            markup=False,
        )
    if bad:
        raise typer.Exit(1)
