# The workflow's front door: `snakemake --cores all results/table2.md`. Rules order the stages; records decide.
import sys

from distillbench import config as files
from distillbench import plan
from distillbench.errors import UserError
from eval.records import is_evaluated


def evaluated(cell):
    """A cell that failed has nothing to evaluate."""
    result = cell.result()
    return result is not None and (result["status"] != "done" or is_evaluated(cell.metrics, cell.benchmark.extractor))


def evaluation_source(cell):
    return cell.metrics if cell.metrics.is_file() else cell.record


# One line and exit code 2 for a mistake in a file, before any work starts.
try:
    TABLES = {table.name: table for table in files.tables()}
    JOBS = {name: plan.jobs(table) for name, table in TABLES.items()}
except UserError as error:
    print(f"distillbench: {error}", file=sys.stderr)
    sys.exit(2)

EVERY = {(j.benchmark, j.arm, j.keys): j for jobs in JOBS.values() for j in jobs}
TODO = [j for j in EVERY.values() if not j.sync("trained", plan.is_trained, lambda c: c.record)]
for j in EVERY.values():
    j.sync("evaluated", evaluated, evaluation_source)
if TODO:
    try:
        for warning in plan.validate(TODO):
            print(f"distillbench: {warning}", file=sys.stderr)
    except UserError as error:
        print(f"distillbench: {error}", file=sys.stderr)
        sys.exit(2)


def job_of(wildcards):
    return EVERY[wildcards.benchmark, wildcards.arm, wildcards.batch]


def teachers_of(wildcards, stage="trained"):
    """The stamps of the teachers that an arm's cells start from and are compared with."""
    keys = [c.teacher.key for c in job_of(wildcards).cells]
    return [j.stamp(stage) for j in EVERY.values() if j.arm == "teacher" and j.cells[0].key in keys]


wildcard_constraints:
    benchmark=r"[^/]+",
    arm=r"[^/]+",
    batch=r"[0-9a-f]{12}",


include: "workflows/rules/teacher.smk"
include: "workflows/rules/cells.smk"
include: "workflows/rules/tables.smk"


rule all:
    default_target: True
    input:
        "results/table2.md",
