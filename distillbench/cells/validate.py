"""Does the method of a job import, and do its settings fit? Imports no torch until it has to."""

from __future__ import annotations

import sys

from distillbench import config
from distillbench.cells import isolated
from distillbench.cells.isolated import Died
from distillbench.cells.jobs import Job
from distillbench.registry import folders
from distillbench.registry.folders import Arm


def validate(jobs: list[Job]) -> list[str]:
    """Warnings about the methods of jobs, which are imported in another process.

    Raises UserError on a mistake in a file.
    """
    distilled = [job for job in jobs if job.cells[0].arm is not None]
    questions = [(job.benchmark, job.arm) for job in distilled]
    warnings = []
    for job, answer in zip(distilled, isolated.ask(__name__, questions)):
        arm = job.cells[0].arm
        assert arm is not None
        warning = does_not_import(arm, str(answer)) if isinstance(answer, Died) else answer
        if warning is not None:
            warnings.append(warning)
    return warnings


def validate_here(benchmark: config.Benchmark, arm: Arm) -> str | None:
    """Import a method and read its settings of a benchmark, in this process; a warning, or None.

    Raises UserError on a mistake in a file. A method folder that does not import is no user error:
    its row will say so, and so does the warning.
    """
    try:
        method = folders.load(arm.folder)
    # Whatever a foreign module does; Ctrl-C is noted elsewhere (`Pulse.interrupted`).
    except BaseException as e:
        return does_not_import(arm, f"{type(e).__name__}: {e}")
    folders.configuration(arm, benchmark, method)
    return None


def does_not_import(arm: Arm, why: str) -> str:
    """Warning text for a method whose module fails to import."""
    return f"{arm.folder.path / 'method.py'} does not import ({why}): its rows will say FAILED"


def reply(benchmark: str, arm: str) -> str | None:
    """`validate_here` of names, the answer to a question of `validate`."""
    return validate_here(config.benchmark(benchmark), folders.arm(arm))


if __name__ == "__main__":
    isolated.answer(sys.argv[1:], reply)
