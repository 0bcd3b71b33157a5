"""The command line `distillbench`: its commands, each with the function behind it, and the entry
point.

Modules of this folder, and the Snakefile, are the only ones that import both `distillbench` and
`eval`; they do so inside functions, so that `distillbench --help` and the workflow import no torch.
"""

from __future__ import annotations

import os
import sys

import typer

from distillbench.cells import progress
from distillbench.cells.environment import ONE_THREAD
from distillbench.cells.progress import say
from distillbench.cells.supervisor import INTERRUPTED
from distillbench.cli import (
    audit,
    bundle,
    check,
    evaluate,
    new,
    publish,
    status,
    train,
    tune,
    verify,
)
from distillbench.errors import UserError

app = typer.Typer(
    help="""Train, sample and evaluate distillation methods under one protocol.

    A cell is (benchmark, method[@variant], seed). `make table2` or
    `snakemake --cores all results/table2.md` runs every cell of a table; the commands below run one
    arm by hand, in the same folders: what is there is not computed again.

    distillbench list                           methods, benchmarks and tables

    distillbench plan table2                    what would run, and what it may cost

    distillbench status table2                  how far every cell is

    distillbench logs digits/dmd/0              what happened in a cell

    distillbench cancel table2                  end its SLURM jobs

    distillbench train digits dmd --seeds 0     train (its teacher first, if need be) and sample

    distillbench evaluate digits dmd --seeds 0  metrics of these samples

    distillbench evaluate PATH                  metrics of samples made elsewhere; trains nothing

    distillbench sample digits dmd --seed 0 --nfe 1 --output dmd.png

    distillbench new my_method                  a small working method to start from

    distillbench check my_method                does it keep the contract?

    distillbench audit --claim FF-C3a           is a paper's claim true here?

    distillbench bundle, verify                 an archive for a reviewer, and its check
    """,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

app.command("list")(train.list_checkout)
app.command("train")(train.train)
app.command("new")(new.new)
app.command("check")(check.check)
app.command("tune")(tune.tune)
app.command("evaluate", help=evaluate.HELP)(evaluate.evaluate)
app.command("sample")(train.sample)
app.command("status")(status.status)
app.command("logs")(status.logs)
app.command("plan")(status.show_plan)
app.command("cancel")(status.cancel)
app.command("table")(publish.table)
app.command("pages")(publish.pages)
app.command("schema", hidden=True)(publish.schema)
app.command("rekey")(publish.rekey)
app.command("audit")(audit.audit)
app.command("measure")(audit.measure)
app.command("bundle")(bundle.bundle)
app.command("verify")(verify.verify)


def main() -> None:
    """Entry point: a UserError is one line and exit code 2."""
    for name in ONE_THREAD:  # before torch is imported
        os.environ.setdefault(name, "1")
    try:
        app()
    except UserError as e:
        say(f"distillbench: {e}")
        sys.exit(2)
    except SystemExit as e:
        if e.code == INTERRUPTED:  # typer's answer to Ctrl-C
            say("\ndistillbench: interrupted; the same command continues")
        raise
    finally:
        progress.stop()


if __name__ == "__main__":
    main()
