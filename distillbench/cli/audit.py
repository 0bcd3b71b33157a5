"""`distillbench audit` and `measure`: one claim tried and judged, one experiment run. The page of a
whole audit is made by `audit_pages.py`."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from distillbench import config
from distillbench.audits import needs, questions
from distillbench.audits.experiments import MECHANISMS, Experiment, experiment_file
from distillbench.audits.questions import Question
from distillbench.cells.progress import Report, reporter
from distillbench.cli import audit_pages
from distillbench.cli.evaluate import known_metrics
from distillbench.cli.options import AuditName, out, parse_seeds
from distillbench.errors import UserError

if TYPE_CHECKING:
    from eval.audit.findings import Finding


def audit(
    name: AuditName = "audit",
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

    The whole page, with evidence: `snakemake --cores all results/audit.md`. Only missing cells run;
    those of tables are shared. Verdicts are corrected for all claims of a paper that have run, as
    on the page.
    """
    table = audit_pages.audit_table(name)
    assert table.seeds is not None
    every = questions.of_table(table, known_metrics)
    asked = questions.chosen(every, method, benchmark, claim)
    if list_:
        for question in asked:
            out.print(line_of(question), soft_wrap=True, markup=False)
        return
    stamps = needs.stamps(every, asked, table.seeds)
    if run and stamps:
        make_stamps(stamps, name)
    wanted = {(question.claim.id, question.benchmark) for question in asked}
    methods = {question.method.name for question in asked}
    # Verdicts are corrected within a paper: all of its claims are judged, those wanted are shown.
    of_papers = [question for question in every if question.method.name in methods]
    for finding in audit_pages.current_findings(table, of_papers):
        if (finding.id, finding.benchmark) in wanted:
            out.print("\n".join(lines_of(finding)), soft_wrap=True, markup=False)


def line_of(question: Question) -> str:
    """A question as `--list` shows it: id, kind, benchmark, arms and number of seeds."""
    how = question.why_not
    if how is None:
        seeds = question.trial.seeds if question.trial else 0
        how = f"{question.benchmark}: {' | '.join(question.arms)}, {seeds} seeds"
    return f"{question.claim.id}  {question.claim.kind}  {how}"


def make_stamps(stamps: list[str], table: str) -> None:
    """Let Snakemake run what stamps of a table stand for; typer.Exit with its code if it fails."""
    command = [sys.executable, "-m", "snakemake", "--quiet", "--cores", "all"]
    command += [*stamps, "--config", f"tables={table}"]
    code = subprocess.run(command, cwd=config.root()).returncode
    if code != 0:
        raise typer.Exit(code)


def lines_of(finding: Finding) -> list[str]:
    """A verdict with its reason, and below it what it rests on."""
    from eval.audit import page

    reason = f" ({finding.reason})" if finding.reason else ""
    lines = [f"{finding.id}: {finding.verdict}{reason}"]
    if finding.effect is not None:
        seeds = page.seeds_words(finding)
        numbers = f"{page.interval(finding)}, n {seeds}, {page.ground(finding)}"
        evidence = [finding.claim, numbers, *page.plot(finding)]
        lines += [f"  {line}" for line in evidence]
    return lines


def measure(
    experiment: Annotated[str, typer.Argument(help="a file in mechanisms/, without .py")],
    seeds: Annotated[str, typer.Option(help="comma-separated")] = "10,11,12,13,14",
) -> None:
    """Run an experiment of a mechanism on seeds; what was measured is not measured again."""
    run_experiment(experiment, parse_seeds(seeds, "10,11"), reporter(f"measure {experiment}"))


def run_experiment(name: str, seeds: list[int], report: Report) -> None:
    """Measure an experiment on seeds, as a rule of the workflow does; say where it failed."""
    if not experiment_file(name).is_file():
        raise UserError(f"measure {name}: no {MECHANISMS}/{name}.py there")
    experiment = Experiment(name, tuple(seeds))
    experiment.measure(report)
    for seed in seeds:
        result = json.loads(experiment.path(seed).read_text(encoding="utf-8"))
        if "failed" in result:
            where = f"{MECHANISMS}/{name}.py, seed {seed}"
            print(f"{where}: failed: {result['failed']}", file=sys.stderr)
