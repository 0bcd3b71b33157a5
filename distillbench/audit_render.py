"""Publishing and rendering of audits: the part of the command line that stands between `audits.py` and eval."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from distillbench import audits, config, plan
from distillbench.cell import hardware, lock
from distillbench.config import Table
from distillbench.errors import UserError
from distillbench.scoring import is_evaluated, published, written

EXAMINED = "results/examinations.yaml"  # what was looked into where a verdict is CONTRADICTED, and for as many SUPPORTED


def publish(table: Table) -> None:
    """Cells, measurements and the claims as they stood at the runs' commits into results/records; what is not there is left out."""
    from eval import records

    assert table.seeds is not None
    asked = audits.questions(table)
    cells = [c for j in plan.jobs(table) for c in j.cells]
    ready = [c for c in cells if (r := c.result()) is not None and (r["status"] != "done" or is_evaluated(c))]
    found = audits.experiments(asked, table.seeds)
    more = audits.measured(found)
    results = [c.result() for c in ready]
    commits = {r["provenance"]["commit"] for r in results if r is not None} | audits.commits(more)
    more[audits.FROZEN] = audits.as_json(audits.read_frozen(folder_of(table)) | audits.frozen({c for c in commits if c}, table.name))
    try:
        with lock(config.root() / "results/runs" / f"{table.name}.lock"):
            same, total = records.publish(folder_of(table), [(c.folder, c.labels()) for c in ready], False, more)
    except ValueError as e:
        raise UserError(str(e)) from None
    missing = f"; {len(cells) - len(ready)} of {len(cells)} cells are not there" if len(ready) < len(cells) else ""
    print(f"{table.name}: {same} of {total} cells have exactly the metrics published before{missing}", file=sys.stderr)


def cost(table: Table, jobs: list[plan.Job]) -> list[str]:
    """What is left to run of an audit, in all: cells, FLOPs, core-hours at the pace of this machine's cells, measurements."""
    assert table.seeds is not None
    cells = [c for j in jobs for c in j.cells]
    paces, missing, flops = [], 0, 0.0
    for cell in cells:
        if (result := cell.result()) is None:
            missing, flops = missing + 1, flops + (0 if cell.arm is None else cell.own_budget)
        elif result["status"] == "done" and result["provenance"]["hardware"] == hardware():
            paces.append(result["cost"]["flops"] / result["cost"]["seconds"])
    asked = audits.questions(table)
    left = sum(not e.path(s).is_file() for e in audits.experiments(asked, table.seeds) for s in e.seeds)
    hours = f", about {flops / median(paces) / 3600:.1f} core-hours by this machine's cells" if paces else ""
    return [
        f"{table.name}: {len({q.claim.id for q in asked})} claims, {sum(q.trial is not None for q in asked)} questions; {missing} of "
        f"{len(cells)} cells to train, {flops / 1e12:.3g} TFLOP besides teachers{hours}; {left} measurements of mechanisms"
    ]


def folder_of(table: Table) -> Path:
    return config.root() / "results/records" / table.name


def findings(table: Table, asked: list[audits.Question], folder: Path) -> list[dict[str, Any]]:
    """The findings of questions from the published records in `folder`."""
    from eval import audit, records

    assert table.seeds is not None
    try:
        found, measured = records.read(folder), audits.read_measured(folder)
        frozen = audits.read_frozen(folder)
    except ValueError as e:
        raise UserError(str(e)) from None
    return audit.findings([q.asked(table.seeds) for q in asked], found, measured, frozen)


def unpublished(table: Table, asked: list[audits.Question]) -> list[dict[str, Any]]:
    """The same from the cells and measurements of this checkout, published or not."""
    from eval import audit
    from eval.records import Record, read_json

    assert table.seeds is not None
    records = []
    for cell in (c for j in audits.jobs(asked, table.seeds) for c in j.cells):
        result = cell.result()
        if result is not None and (result["status"] != "done" or is_evaluated(cell)):
            records.append(Record(result, read_json(cell.metrics) if result["status"] == "done" else None))
    raw = audits.measured(audits.experiments(asked, table.seeds))
    measured = audits.by_experiment(raw)
    commits = {r.result["provenance"]["commit"] for r in records} | audits.commits(raw)
    return audit.findings([q.asked(table.seeds) for q in asked], records, measured, audits.frozen({c for c in commits if c}, table.name))


def render(table: Table, check: bool) -> list[str]:
    """The pages of an audit from its published records; the names of files that differ from those there."""
    from eval import ablations, audit, audit_page

    folder, results = folder_of(table), config.root() / "results"
    if not folder.is_dir():
        raise UserError(f"{folder}: no published records: run `snakemake --cores all results/{table.name}.md`")
    asked = audits.questions(table)
    found, records, measured = findings(table, asked, folder), published(table.name), audits.read_measured(folder)
    write, differing = written(check)
    cost = sum(r.result["cost"]["seconds"] for r in records) + sum(m["seconds"] for ms in measured.values() for m in ms)
    assert table.seeds is not None
    about = {
        "name": table.name, "seeds": f"{table.seeds[0]} to {table.seeds[-1]}", "cells": len(records),
        "measurements": sum(map(len, measured.values())), "core_hours": cost / 3600,
        "withdrawn": audit.withdrawn([q.asked(table.seeds) for q in asked], audits.read_frozen(folder)),
        "command": f"snakemake --cores all results/{table.name}.md",
        "before": before(table),
    }  # fmt: skip
    audit_page.write(table.name, table.title, found, about, examinations(table), results, write)
    if table.reported_again:
        papers = [(m.name, m.file.title, m.claims.model_dump()) for m in {q.method.name: q.method for q in asked}.values()]
        ablations.write(table.reported_again, table.name, papers, records, results, write)
    return differing


def before(table: Table) -> dict[str, Any] | None:
    """Name, seeds and published findings of the audit that this one repeats, if it repeats one."""
    if table.again_of is None:
        return None
    first = plan.table(table.again_of)
    if first.kind != "audit" or not first.seeds or set(first.seeds) & set(table.seeds or []):
        raise UserError(f"workflows/tables/{table.name}.yaml: again_of: '{first.name}' is no audit on other seeds: name one")
    if not folder_of(first).is_dir():
        raise UserError(f"{folder_of(first)}: no published records to compare with: run `snakemake --cores all results/{first.name}.md`")
    return {
        "name": first.name, "seeds": f"{first.seeds[0]} to {first.seeds[-1]}",
        "found": findings(first, audits.questions(first), folder_of(first)),
    }  # fmt: skip


def examinations(table: Table) -> dict[str, Any]:
    """results/examinations.yaml of this audit, and of the one that it repeats, which they say under `of`."""
    path = config.root() / EXAMINED
    every = (yaml.safe_load(path.read_text()) or {}) if path.is_file() else {}
    first = {} if table.again_of is None else {key: one | {"of": table.again_of} for key, one in every.get(table.again_of, {}).items()}
    return first | every.get(table.name, {})


def measure(name: str, seeds: list[int], report: Any) -> None:
    """Run an experiment on seeds, as a rule of the workflow does."""
    if not audits.experiment_file(name).is_file():
        raise UserError(f"measure {name}: no {audits.ROOM}/{name}.py there")
    chosen = audits.Experiment(name, tuple(seeds))
    chosen.measure(report)
    for seed in seeds:
        if "failed" in (found := json.loads(chosen.path(seed).read_text())):
            print(f"{audits.ROOM}/{name}.py, seed {seed}: failed: {found['failed']}", file=sys.stderr)
