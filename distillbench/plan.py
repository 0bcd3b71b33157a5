"""What a table needs: its arms and cells, which of them are fresh, and the stamps Snakemake orders by. Imports no torch.

Records are never outputs of a workflow rule (Snakemake deletes outputs before a rerun). A rule's output is a stamp beside
the cells; `sync` makes a stamp exist exactly when the records it stands for exist, so the records alone decide.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from distillbench import config, registry
from distillbench.cell import Cell, make_folder, write_atomically
from distillbench.config import Table, canonical, digest, root

Evaluated = Callable[[Cell], bool]


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
    return cell.record.is_file()


def arms(table: Table) -> list[registry.Arm]:
    """The arms of a table: its methods in their default variant, then its variants."""
    names = sorted(registry.discover()) if table.methods == "all" else table.methods
    return [registry.arm(name) for name in [*names, *table.variants]]


def jobs(table: Table) -> list[Job]:
    """Every benchmark's teachers, a job each (students wait for them), and its arms, all seeds in a job."""
    out = []
    for b in map(config.benchmark, table.benchmarks):
        out += [Job((Cell(b, None, seed),)) for seed in b.seeds]
        out += [Job(tuple(Cell(b, arm, seed) for seed in b.seeds)) for arm in arms(table)]
    return out


def validate(todo: list[Job]) -> list[str]:
    """Check the configuration of every arm that will run (imports torch); UserError on a mistake in a file.

    A method folder that does not import is no user error: its row will say so. Returns one warning for each of these.
    """
    from distillbench.train import TimedOut, time_limit

    warnings = []
    for j in todo:
        arm = j.cells[0].arm
        if arm is None:
            continue
        try:
            with time_limit(60):
                method = registry.load(arm.folder)
        except (Exception, SystemExit, TimedOut) as e:  # whatever a foreign module does
            warnings.append(f"{arm.folder.path / 'method.py'} does not import ({type(e).__name__}: {e}): its rows will say FAILED")
            continue
        registry.configuration(arm, j.cells[0].benchmark, method)
    return warnings
