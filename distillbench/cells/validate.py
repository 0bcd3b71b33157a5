"""What a table needs: its arms and cells, which of them are fresh, and the stamps Snakemake orders by. Imports no torch.

Records are never outputs of a workflow rule (Snakemake deletes outputs before a rerun). A rule's output is a stamp beside
the cells; `sync` makes a stamp exist exactly when the records it stands for exist, so the records alone decide.
"""

from __future__ import annotations

import faulthandler
import json
import os
import subprocess
import sys

from distillbench import config
from distillbench.cells.cell import Cell
from distillbench.cells.jobs import Job
from distillbench.errors import UserError
from distillbench.registry import folders

IMPORT_SECONDS = 60  # a module that takes longer to import does not import


def check(job: Job) -> str | None:
    """Import the method of a job and check its configuration (imports torch); UserError on a mistake in a file.

    A method folder that does not import is no user error: its row will say so, and so does the warning returned.
    """
    cell = job.cells[0]
    if cell.arm is None:
        return None
    try:
        method = folders.load(cell.arm.folder)
    except (
        BaseException
    ) as e:  # whatever a foreign module does; Ctrl-C is noted elsewhere (`Pulse.interrupted`)
        return does_not_import(job, f"{type(e).__name__}: {e}")
    folders.configuration(cell.arm, cell.benchmark, method)
    return None


def does_not_import(job: Job, why: str) -> str:
    """A warning."""
    arm = job.cells[0].arm
    assert arm is not None
    return f"{arm.folder.path / 'method.py'} does not import ({why}): its rows will say FAILED"


def validate(todo: list[Job]) -> list[str]:
    """`check` every job, in another process: a foreign module may do anything to its own. Returns the warnings."""
    todo, warnings = [j for j in todo if j.cells[0].arm is not None], []
    while todo:
        command = [
            sys.executable,
            "-m",
            "distillbench.cells.validate",
            *(word for j in todo for word in (j.benchmark, j.arm)),
        ]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        answers = [json.loads(line) for line in done.stdout.splitlines()]
        for answer in answers:
            if "error" in answer:
                raise UserError(answer["error"])
            warnings += [answer["warning"]] if answer["warning"] else []
        if len(answers) < len(todo):
            warnings.append(
                does_not_import(
                    todo[len(answers)], f"its process ended with code {done.returncode}"
                )
            )
        todo = todo[len(answers) + 1 :]
    return warnings


def main(words: list[str]) -> None:
    """`python -m distillbench.plan <benchmark> <arm> ...`: one line of JSON for each pair, the end of `validate`."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a module prints is no answer
    for name, arm in zip(words[::2], words[1::2]):
        faulthandler.dump_traceback_later(IMPORT_SECONDS, exit=True)
        try:
            line = {"warning": check(Job((Cell(config.benchmark(name), folders.arm(arm), 0),)))}
        except UserError as e:
            line = {"error": str(e)}
        print(json.dumps(line), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
