# The workflow's front door: `snakemake --cores all results/table2.md`, or `snakemake --profile slurm results/table2.md` on a cluster.
# Rules order the stages; records decide.
import os
import sys
import time

from distillbench import audits, cluster
from distillbench import config as files
from distillbench import launcher, plan, registry, resources
from distillbench.errors import UserError
from distillbench.scoring import check_extractors
from eval.records import is_evaluated

os.environ[launcher.BEGAN] = str(time.time())  # to the launchers, which a later `distillbench cancel` ends


def profile():
    """The profile in use if it is one of a cluster, with a site.yaml, else None."""
    words = iter(sys.argv)
    named = [next(words, "") if word == "--profile" else word.partition("=")[2] for word in words if word.startswith("--profile")]
    name = (named or [os.environ.get("SNAKEMAKE_PROFILE", "")])[-1].rstrip("/")
    return name if name and (files.root() / name / "site.yaml").is_file() else None


def evaluated(cell):
    """A cell that failed has nothing to evaluate."""
    result, b = cell.result(), cell.benchmark
    return result is not None and (result["status"] != "done" or is_evaluated(cell.metrics, b.extractor, b.cross_extractor))


def prepare():
    """Jobs of the tables asked for, stamps made to agree with the records, files checked before any work starts; and the tables
    of costs, which have no jobs, with their first source, whose jobs are among them."""
    names = sorted(p.stem for p in (files.root() / "workflows/tables").glob("*.yaml"))
    named = [n for n in names if any(f"results/{n}." in argument for argument in sys.argv) or n == config.get("tables")]
    tables = {name: plan.table(name, PROFILE) for name in named or names}
    costs = {name: table.sources[0] for name, table in tables.items() if table.kind == "costs"}
    tables |= {name: plan.table(name, PROFILE) for name in costs.values()}
    tables = {name: table for name, table in tables.items() if name not in costs}
    measured = {n: audits.experiments(audits.questions(t), t.seeds) for n, t in tables.items() if t.kind == "audit"}
    measuring = {(e.name, e.keys): e for es in measured.values() for e in es}
    unmeasured = [e for e in measuring.values() if not e.sync()]
    jobs = {name: plan.jobs(table) for name, table in tables.items()}
    check_extractors([j.cells[0].benchmark for js in jobs.values() for j in js])
    every = {(j.benchmark, j.arm, j.keys): j for js in jobs.values() for j in js}
    todo = [j for j in every.values() if not j.sync("trained", plan.is_trained)]
    done = {key for key, j in every.items() if j.sync("evaluated", evaluated)}
    if PROFILE:
        ahead = [(j, "train") for j in todo] + [(j, "evaluate") for key, j in every.items() if key not in done]
        cluster.check([resources.request(j.benchmark, j.arm, stage, SITE) for j, stage in ahead])
    for warning in plan.validate(todo) if todo else []:
        print(f"distillbench: {warning}", file=sys.stderr)
    for name, js in jobs.items():
        complete = all((j.benchmark, j.arm, j.keys) in done for j in js) and not set(measured.get(name, ())) & set(unmeasured)
        plan.note_cells(tables[name], js, complete)
    return jobs, every, costs, measured, measuring


try:
    PROFILE = profile()
    SITE = resources.site(PROFILE) if PROFILE else resources.Site()
    JOBS, EVERY, COSTS, MEASURED, MEASURING = prepare()
except UserError as error:  # one line and exit code 2
    print(f"distillbench: {error}", file=sys.stderr)
    sys.exit(2)


AS_PROFILE = f"--profile {PROFILE}" if PROFILE else ""
RETRIES = 0 if PROFILE else 1  # a launcher tries by itself


def job_of(wildcards):
    return EVERY[wildcards.benchmark, wildcards.get("arm", "teacher"), wildcards.batch]


def request(stage):
    """What a job of this stage may use, for its launcher."""
    return lambda w: resources.request(w.benchmark, w.get("arm", "teacher"), stage, SITE)


def needed_by(wildcards):
    """The stamps of the teachers, and of other students, that an arm's cells start from and are compared with."""
    keys = [one.key for c in job_of(wildcards).cells for one in c.needed]
    return [j.stamp("trained") for j in EVERY.values() if any(c.key in keys for c in j.cells)]


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
    for name in JOBS:
        shell(f"python -m distillbench.cli table {name} --partial {AS_PROFILE}")
        print(f"results/{name}.partial.md says what is missing", file=sys.stderr)
