"""Publishing and rendering of audits: between `distillbench.audits` and `eval.audit`."""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import yaml

from distillbench import config
from distillbench.audits import experiments, freezing, needs, questions
from distillbench.audits.experiments import read_measured
from distillbench.audits.freezing import FROZEN, Frozen, read_frozen
from distillbench.audits.questions import Question
from distillbench.cells.cell import Cell
from distillbench.cells.disk import json_bytes, lock
from distillbench.cells.jobs import Job
from distillbench.cells.provenance import hardware
from distillbench.cli.evaluate import has_ended, known_metrics
from distillbench.cli.render import PageWriter, no_records, published
from distillbench.config import Table
from distillbench.errors import UserError
from distillbench.registry import folders
from distillbench.tables import contents

if TYPE_CHECKING:
    from eval.audit.findings import Finding
    from eval.audit.page import Earlier
    from eval.report.records import Record
    from eval.report.tables import Appendix

# What was looked into where a verdict is CONTRADICTED, and for as many SUPPORTED.
EXAMINED = "results/examinations.yaml"


def audit_table(name: str) -> Table:
    """The audit called `name`; UserError where the table is of another kind."""
    table = contents.table(name)
    if table.kind != "audit":
        raise UserError(
            f"audit {name}: workflows/tables/{name}.yaml is a table of kind {table.kind}: "
            "name one of kind audit"
        )
    return table


def folder_of(table: Table) -> Path:
    """The published records of an audit."""
    return config.root() / "results/records" / table.name


def asked_of(table: Table, asked: list[Question]) -> list[dict[str, Any]]:
    """Questions as eval is told of them."""
    assert table.seeds is not None
    return [question.asked(table.seeds) for question in asked]


def seeds_words(table: Table) -> str:
    """The seeds of an audit, '10 to 19'."""
    assert table.seeds is not None
    return f"{table.seeds[0]} to {table.seeds[-1]}"


def frozen_claims(table: Table, results: list[dict[str, Any]], raw: dict[str, bytes]) -> Frozen:
    """Claims as they stood at the commits that records, and experiments' results, were run at."""
    commits = experiments.commits(raw)
    commits |= {result["provenance"]["commit"] for result in results}
    return freezing.frozen({commit for commit in commits if commit}, table.name)


def publish(table: Table) -> None:
    """Copy ended cells, measurements, and the claims as they stood at the runs' commits into
    results/records; what is not there is left out."""
    from eval.report import records

    assert table.seeds is not None
    asked = questions.of_table(table, known_metrics)
    cells = [cell for job in contents.jobs(table, known_metrics) for cell in job.cells]
    ended = []
    results = []
    for cell in cells:
        if has_ended(cell):
            result = cell.result()
            assert result is not None
            ended.append(cell)
            results.append(result)
    more = experiments.measured(needs.experiments_of(asked, table.seeds))
    frozen = read_frozen(folder_of(table)) | frozen_claims(table, results, more)
    more[FROZEN] = json_bytes(frozen)
    labelled = [(cell.folder, cell.labels()) for cell in ended]
    try:
        with lock(config.root() / "results/runs" / f"{table.name}.lock"):
            same, total = records.publish(folder_of(table), labelled, False, more)
    except ValueError as e:
        raise UserError(str(e)) from None
    missing = ""
    if len(ended) < len(cells):
        missing = f"; {len(cells) - len(ended)} of {len(cells)} cells are not there"
    print(
        f"{table.name}: {same} of {total} cells have exactly the metrics published before{missing}",
        file=sys.stderr,
    )


def cost(table: Table, jobs: list[Job]) -> str:
    """What is left to run of an audit: cells, FLOPs, core-hours at the pace of this machine's
    cells, measurements."""
    assert table.seeds is not None
    cells = [cell for job in jobs for cell in job.cells]
    missing = [cell for cell in cells if cell.result() is None]
    flops = sum(cell.own_budget for cell in missing if cell.arm is not None)
    asked = questions.of_table(table, known_metrics)
    claims = {question.claim.id for question in asked}
    tried = [question for question in asked if question.trial is not None]
    measurements = 0
    for experiment in needs.experiments_of(asked, table.seeds):
        paths = [experiment.path(seed) for seed in experiment.seeds]
        measurements += sum(not path.is_file() for path in paths)
    paces = flops_per_second(cells)
    hours = ""
    if paces:
        core_hours = flops / median(paces) / 3600
        hours = f", about {core_hours:.1f} core-hours by this machine's cells"
    return (
        f"{table.name}: {len(claims)} claims, {len(tried)} questions; "
        f"{len(missing)} of {len(cells)} cells to train, "
        f"{flops / 1e12:.3g} TFLOP besides teachers{hours}; "
        f"{measurements} measurements of mechanisms"
    )


def flops_per_second(cells: list[Cell]) -> list[float]:
    """The pace of each of the cells that was done on this machine."""
    paces = []
    for cell in cells:
        result = cell.result()
        if result is None or result["status"] != "done":
            continue
        if result["provenance"]["hardware"] == hardware():
            paces.append(result["cost"]["flops"] / result["cost"]["seconds"])
    return paces


def published_findings(table: Table, asked: list[Question], folder: Path) -> list[Finding]:
    """The findings of questions from the published records in `folder`."""
    from eval.audit import findings
    from eval.report import records

    try:
        found = records.read(folder)
    except ValueError as e:
        raise UserError(str(e)) from None
    measured = read_measured(folder)
    return findings.findings(asked_of(table, asked), found, measured, read_frozen(folder))


def current_findings(table: Table, asked: list[Question]) -> list[Finding]:
    """The findings of questions from the cells and measurements of this checkout, published or
    not."""
    from eval.audit import findings
    from eval.report.records import Record, read_json

    assert table.seeds is not None
    records: list[Record] = []
    for job in needs.jobs(asked, table.seeds):
        for cell in job.cells:
            if has_ended(cell):
                result = cell.result()
                assert result is not None
                metrics = read_json(cell.metrics) if result["status"] == "done" else None
                records.append(Record(result, metrics))
    raw = experiments.measured(needs.experiments_of(asked, table.seeds))
    frozen = frozen_claims(table, [record.result for record in records], raw)
    measured = experiments.by_experiment(raw)
    return findings.findings(asked_of(table, asked), records, measured, frozen)


def render(table: Table, check: bool) -> list[str]:
    """Render the pages of an audit from its published records.

    Returns the names of files that differed; UserError where there are no records.
    """
    from eval.audit import findings, page

    folder = folder_of(table)
    results = config.root() / "results"
    if not folder.is_dir():
        raise no_records(folder, table.name)
    asked = questions.of_table(table, known_metrics)
    found = published_findings(table, asked, folder)
    records = published(table.name)
    measured = [result for own in read_measured(folder).values() for result in own]
    seconds = sum(record.result["cost"]["seconds"] for record in records)
    seconds += sum(result["seconds"] for result in measured)
    about = page.Audit(
        name=table.name,
        seeds=seeds_words(table),
        cells=len(records),
        measurements=len(measured),
        core_hours=seconds / 3600,
        withdrawn=findings.withdrawn(asked_of(table, asked), read_frozen(folder)),
        command=f"snakemake --cores all results/{table.name}.md",
        before=before(table),
    )
    writer = PageWriter(check)
    examined = examinations(table)
    page.write(table.title, found, about, examined, results, writer.write)
    return writer.differing


def beside_papers(name: str) -> Appendix:
    """The papers' ablations beside the arms of an audit, from its published records."""
    from eval.report import table3

    audit = contents.table(name)
    if audit.kind != "audit":
        raise UserError(f"workflows/tables: key 'beside': '{name}' is no audit: name one")
    papers = [
        table3.Paper(method.name, method.file.title, tuple(method.claims.model_dump()["reported"]))
        for method in folders.discover().values()
    ]
    return table3.appendix(papers, published(name), name)


def before(table: Table) -> Earlier | None:
    """The audit that this one repeats, with its published findings; None where it repeats none."""
    from eval.audit.page import Earlier

    if table.again_of is None:
        return None
    first = contents.table(table.again_of)
    if first.kind != "audit" or not first.seeds or set(first.seeds) & set(table.seeds or []):
        raise UserError(
            f"workflows/tables/{table.name}.yaml: again_of: '{first.name}' is no audit on other "
            "seeds: name one"
        )
    folder = folder_of(first)
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no published records to compare with: "
            f"run `snakemake --cores all results/{first.name}.md`"
        )
    asked = questions.of_table(first, known_metrics)
    found = published_findings(first, asked, folder)
    return Earlier(first.name, seeds_words(first), found)


def examinations(table: Table) -> dict[str, Any]:
    """results/examinations.yaml of this audit, and of the one that it repeats.

    Entries of that one say so under `of`.
    """
    path = config.root() / EXAMINED
    if not path.is_file():
        return {}
    every = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    found = {}
    if table.again_of is not None:
        for key, entry in every.get(table.again_of, {}).items():
            found[key] = entry | {"of": table.again_of}
    return found | every.get(table.name, {})
