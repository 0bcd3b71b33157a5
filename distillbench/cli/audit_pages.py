"""Publishing and rendering of audits: the part of the command line that stands between `audits.py` and eval."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import yaml

from distillbench import config
from distillbench.audits import experiments, freezing, needs, questions
from distillbench.audits.experiments import (
    MECHANISMS,
    Experiment,
    by_experiment,
    experiment_file,
    read_measured,
)
from distillbench.audits.freezing import FROZEN, read_frozen
from distillbench.audits.needs import experiments_of
from distillbench.audits.questions import Question
from distillbench.cells.disk import json_bytes, lock
from distillbench.cells.jobs import Job
from distillbench.cells.provenance import hardware
from distillbench.cli.evaluate import is_evaluated, known_metrics
from distillbench.cli.render import published, written
from distillbench.config import Table
from distillbench.errors import UserError
from distillbench.tables import plan

if TYPE_CHECKING:
    from eval.audit.findings import Finding
    from eval.audit.page import Earlier

EXAMINED = "results/examinations.yaml"  # what was looked into where a verdict is CONTRADICTED, and for as many SUPPORTED


def publish(table: Table) -> None:
    """Cells, measurements and the claims as they stood at the runs' commits into results/records; what is not there is left out."""
    from eval.report import records

    assert table.seeds is not None
    asked = questions.of_table(table, known_metrics)
    cells = [c for j in plan.jobs(table, known_metrics) for c in j.cells]
    ready = [
        c
        for c in cells
        if (r := c.result()) is not None and (r["status"] != "done" or is_evaluated(c))
    ]
    found = experiments_of(asked, table.seeds)
    more = experiments.measured(found)
    results = [c.result() for c in ready]
    commits = {r["provenance"]["commit"] for r in results if r is not None} | experiments.commits(
        more
    )
    more[FROZEN] = json_bytes(
        read_frozen(folder_of(table)) | freezing.frozen({c for c in commits if c}, table.name)
    )
    try:
        with lock(config.root() / "results/runs" / f"{table.name}.lock"):
            same, total = records.publish(
                folder_of(table), [(c.folder, c.labels()) for c in ready], False, more
            )
    except ValueError as e:
        raise UserError(str(e)) from None
    missing = (
        f"; {len(cells) - len(ready)} of {len(cells)} cells are not there"
        if len(ready) < len(cells)
        else ""
    )
    print(
        f"{table.name}: {same} of {total} cells have exactly the metrics published before{missing}",
        file=sys.stderr,
    )


def cost(table: Table, jobs: list[Job]) -> list[str]:
    """What is left to run of an audit, in all: cells, FLOPs, core-hours at the pace of this machine's cells, measurements."""
    assert table.seeds is not None
    cells = [c for j in jobs for c in j.cells]
    paces, missing, flops = [], 0, 0.0
    for cell in cells:
        if (result := cell.result()) is None:
            missing, flops = missing + 1, flops + (0 if cell.arm is None else cell.own_budget)
        elif result["status"] == "done" and result["provenance"]["hardware"] == hardware():
            paces.append(result["cost"]["flops"] / result["cost"]["seconds"])
    asked = questions.of_table(table, known_metrics)
    left = sum(not e.path(s).is_file() for e in experiments_of(asked, table.seeds) for s in e.seeds)
    hours = (
        f", about {flops / median(paces) / 3600:.1f} core-hours by this machine's cells"
        if paces
        else ""
    )
    return [
        f"{table.name}: {len({q.claim.id for q in asked})} claims, {sum(q.trial is not None for q in asked)} questions; {missing} of "
        f"{len(cells)} cells to train, {flops / 1e12:.3g} TFLOP besides teachers{hours}; {left} measurements of mechanisms"
    ]


def folder_of(table: Table) -> Path:
    return config.root() / "results/records" / table.name


def published_findings(table: Table, asked: list[Question], folder: Path) -> list[Finding]:
    """The findings of questions from the published records in `folder`."""
    from eval.audit import findings
    from eval.report import records

    assert table.seeds is not None
    try:
        found, measured = records.read(folder), read_measured(folder)
        frozen = read_frozen(folder)
    except ValueError as e:
        raise UserError(str(e)) from None
    return findings.findings([q.asked(table.seeds) for q in asked], found, measured, frozen)


def current_findings(table: Table, asked: list[Question]) -> list[Finding]:
    """The same from the cells and measurements of this checkout, published or not."""
    from eval.audit import findings
    from eval.report.records import Record, read_json

    assert table.seeds is not None
    records = []
    for cell in (c for j in needs.jobs(asked, table.seeds) for c in j.cells):
        result = cell.result()
        if result is not None and (result["status"] != "done" or is_evaluated(cell)):
            records.append(
                Record(result, read_json(cell.metrics) if result["status"] == "done" else None)
            )
    raw = experiments.measured(experiments_of(asked, table.seeds))
    measured = by_experiment(raw)
    commits = {r.result["provenance"]["commit"] for r in records} | experiments.commits(raw)
    return findings.findings(
        [q.asked(table.seeds) for q in asked],
        records,
        measured,
        freezing.frozen({c for c in commits if c}, table.name),
    )


def render(table: Table, check: bool) -> list[str]:
    """The pages of an audit from its published records; the names of files that differ from those there."""
    from eval.audit import findings, page
    from eval.report import table3

    folder, results = folder_of(table), config.root() / "results"
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no published records: run `snakemake --cores all results/{table.name}.md`"
        )
    asked = questions.of_table(table, known_metrics)
    found, records, measured = (
        published_findings(table, asked, folder),
        published(table.name),
        read_measured(folder),
    )
    write, differing = written(check)
    cost = sum(r.result["cost"]["seconds"] for r in records) + sum(
        m["seconds"] for ms in measured.values() for m in ms
    )
    assert table.seeds is not None
    about = page.Audit(
        name=table.name,
        seeds=f"{table.seeds[0]} to {table.seeds[-1]}",
        cells=len(records),
        measurements=sum(map(len, measured.values())),
        core_hours=cost / 3600,
        withdrawn=findings.withdrawn([q.asked(table.seeds) for q in asked], read_frozen(folder)),
        command=f"snakemake --cores all results/{table.name}.md",
        before=before(table),
    )
    page.write(table.title, found, about, examinations(table), results, write)
    if table.reported_again:
        papers = [
            (m.name, m.file.title, m.claims.model_dump())
            for m in {q.method.name: q.method for q in asked}.values()
        ]
        table3.write(table.reported_again, table.name, papers, records, results, write)
    return differing


def before(table: Table) -> Earlier | None:
    """The audit that this one repeats, with its published findings; None where it repeats none."""
    from eval.audit.page import Earlier

    if table.again_of is None:
        return None
    first = plan.table(table.again_of)
    if first.kind != "audit" or not first.seeds or set(first.seeds) & set(table.seeds or []):
        raise UserError(
            f"workflows/tables/{table.name}.yaml: again_of: '{first.name}' is no audit on other seeds: name one"
        )
    if not folder_of(first).is_dir():
        raise UserError(
            f"{folder_of(first)}: no published records to compare with: run `snakemake --cores all results/{first.name}.md`"
        )
    asked = questions.of_table(first, known_metrics)
    found = published_findings(first, asked, folder_of(first))
    return Earlier(first.name, f"{first.seeds[0]} to {first.seeds[-1]}", found)


def examinations(table: Table) -> dict[str, Any]:
    """results/examinations.yaml of this audit, and of the one that it repeats, which they say under `of`."""
    path = config.root() / EXAMINED
    every = (yaml.safe_load(path.read_text()) or {}) if path.is_file() else {}
    first = (
        {}
        if table.again_of is None
        else {
            key: one | {"of": table.again_of} for key, one in every.get(table.again_of, {}).items()
        }
    )
    return first | every.get(table.name, {})


def measure(name: str, seeds: list[int], report: Any) -> None:
    """Run an experiment on seeds, as a rule of the workflow does."""
    if not experiment_file(name).is_file():
        raise UserError(f"measure {name}: no {MECHANISMS}/{name}.py there")
    chosen = Experiment(name, tuple(seeds))
    chosen.measure(report)
    for seed in seeds:
        if "failed" in (found := json.loads(chosen.path(seed).read_text())):
            print(
                f"{MECHANISMS}/{name}.py, seed {seed}: failed: {found['failed']}", file=sys.stderr
            )
