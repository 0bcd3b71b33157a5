# The workflow's front door: `snakemake --cores all results/table2.md`, or on a cluster
# `snakemake --profile slurm results/table2.md`. Rules order the stages; records decide.
import os
import sys

from distillbench.cli import workflow as workflows

WORKFLOW = workflows.read(sys.argv, config.get("tables"))


wildcard_constraints:
    benchmark=r"[^/]+",
    arm=r"[^/]+",
    batch=r"[0-9a-f]{12}",


include: "workflows/rules/teacher.smk"
include: "workflows/rules/cells.smk"
include: "workflows/rules/audits.smk"
include: "workflows/rules/tables.smk"


rule all:
    default_target: True
    input:
        "results/table2.md",


onerror:
    for name in WORKFLOW.jobs:
        shell(f"python -m distillbench.cli table {name} --partial {WORKFLOW.as_profile}")
        print(f"results/{name}.partial.md says what is missing", file=sys.stderr)
