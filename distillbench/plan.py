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
import time
from collections.abc import Callable
from dataclasses import dataclass

from distillbench import config, registry, resources
from distillbench.cell import Cell, make_folder, write_atomically, writing
from distillbench.config import Table, canonical, digest, root
from distillbench.errors import UserError, nearest

IMPORT_SECONDS = 60  # a module that takes longer to import does not import


@dataclass(frozen=True)
class Job:
    """The seeds of one arm on one benchmark that share a process per stage, so that torch is imported once."""

    cells: tuple[Cell, ...]

    @property
    def benchmark(self) -> str:
        return self.cells[0].benchmark.name

    @property
    def arm(self) -> str:
        return self.cells[0].arm_name

    @property
    def keys(self) -> str:
        """A hash of the cells' keys."""
        return digest(canonical([c.key for c in self.cells]))[:12]

    @property
    def seeds(self) -> str:
        return ",".join(str(c.seed) for c in self.cells)

    def stamp(self, stage: str) -> str:
        """results/runs/<benchmark>/<arm>/<keys>.<stage>, relative to the root."""
        return f"results/runs/{self.benchmark}/{self.arm}/{self.keys}.{stage}"

    def sync(self, stage: str, fresh: Callable[[Cell], bool]) -> bool:
        """Make the stamp agree with the records; returns whether all of them are there."""
        path, complete = root() / self.stamp(stage), all(fresh(c) for c in self.cells)
        with writing(path):
            if complete and not path.exists():
                make_folder(path.parent)
                path.touch()
            elif not complete:
                path.unlink(missing_ok=True)
        return complete


def note_cells(table: Table, wanted: list[Job], complete: bool) -> None:
    """results/runs/<table>.cells lists the table's stamps; renewed while cells are missing, so that Snakemake sees work.

    Without it a table newer than its remaining inputs would count as up to date when a cell's record is deleted.
    """
    path, text = root() / f"results/runs/{table.name}.cells", "".join(f"{j.stamp('evaluated')}\n" for j in wanted)
    if not complete or not path.is_file() or not path.read_text().startswith(text):
        make_folder(path.parent)
        write_atomically(path, f"{text}{time.time_ns()}\n".encode())  # new content, or Snakemake ignores the new time


def is_trained(cell: Cell) -> bool:
    """The record exists; nothing else decides."""
    return cell.result() is not None


def arms(table: Table) -> list[registry.Arm]:
    """The arms of a table: its methods in their default variant, its variants, what these start from; UserError where `compare`
    names another."""
    found = list(map(registry.arm, [*(sorted(registry.discover()) if table.methods == "all" else table.methods), *table.variants]))
    found += start_arms(found)
    names = [arm.name for arm in found]
    for name in (name for pair in table.compare for name in pair if name not in names):
        raise UserError(f"workflows/tables/{table.name}.yaml: key 'compare': '{name}' is no arm of this table, {nearest(name, names)}")
    return found


def table(name: str, profile: str | None = None) -> Table:
    """The table called `name`, on the benchmarks that the site file of a profile gives it, if it does."""
    found = config.table(name)
    if profile and (benchmarks := resources.site(profile).benchmarks.get(name)):
        return found.model_copy(update={"benchmarks": benchmarks})
    return found


def jobs(table: Table) -> list[Job]:
    """Every benchmark's teachers, a job each (students wait for them), and its arms, as many seeds in a job as its resources say."""
    if table.kind == "audit":
        from distillbench import audits  # which stands on this module

        assert table.seeds is not None
        return audits.jobs(audits.questions(table), table.seeds)
    out = []
    for b in map(config.benchmark, table.benchmarks):
        seeds = table.seeds or b.seeds
        out += [Job((Cell(b, None, seed),)) for seed in seeds]
        for arm in arms(table):
            n = resources.of(b.name, arm.name).seeds or len(seeds)
            out += [Job(tuple(Cell(b, arm, seed) for seed in seeds[i : i + n])) for i in range(0, len(seeds), n)]
    return out


def start_arms(found: list[registry.Arm]) -> list[registry.Arm]:
    """The arms that others start from and that are not among them: a student is shown beside what it started from."""
    starts = {start.name: start for arm in found if (start := arm.start) is not None}
    return [start for name, start in starts.items() if name not in [arm.name for arm in found]]


def check(job: Job) -> str | None:
    """Import the method of a job and check its configuration (imports torch); UserError on a mistake in a file.

    A method folder that does not import is no user error: its row will say so, and so does the warning returned.
    """
    cell = job.cells[0]
    if cell.arm is None:
        return None
    try:
        method = registry.load(cell.arm.folder)
    except BaseException as e:  # whatever a foreign module does; Ctrl-C is noted elsewhere (`Pulse.interrupted`)
        return does_not_import(job, f"{type(e).__name__}: {e}")
    registry.configuration(cell.arm, cell.benchmark, method)
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
        command = [sys.executable, "-m", "distillbench.plan", *(word for j in todo for word in (j.benchmark, j.arm))]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        answers = [json.loads(line) for line in done.stdout.splitlines()]
        for answer in answers:
            if "error" in answer:
                raise UserError(answer["error"])
            warnings += [answer["warning"]] if answer["warning"] else []
        if len(answers) < len(todo):
            warnings.append(does_not_import(todo[len(answers)], f"its process ended with code {done.returncode}"))
        todo = todo[len(answers) + 1 :]
    return warnings


def main(words: list[str]) -> None:
    """`python -m distillbench.plan <benchmark> <arm> ...`: one line of JSON for each pair, the end of `validate`."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a module prints is no answer
    for name, arm in zip(words[::2], words[1::2]):
        faulthandler.dump_traceback_later(IMPORT_SECONDS, exit=True)
        try:
            line = {"warning": check(Job((Cell(config.benchmark(name), registry.arm(arm), 0),)))}
        except UserError as e:
            line = {"error": str(e)}
        print(json.dumps(line), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
