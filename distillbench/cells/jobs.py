"""Jobs: the cells that share a process per stage, and the stamps that Snakemake orders them by.

Records are never outputs of a workflow rule (Snakemake deletes outputs before a rerun). A rule's
output is a stamp beside the cells; `sync` makes a stamp exist exactly when the records it stands
for exist, so the records alone decide. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from distillbench.cells.cell import KEY_DIGITS, Cell
from distillbench.cells.disk import make_folder, writing
from distillbench.config import root
from distillbench.hashing import canonical, digest
from distillbench.registry.folders import Arm


@dataclass(frozen=True)
class Job:
    """Seeds of one arm on one benchmark that share a process, so that torch is imported once."""

    cells: tuple[Cell, ...]

    @property
    def benchmark(self) -> str:
        """Name of the benchmark of all its cells."""
        return self.cells[0].benchmark.name

    @property
    def arm(self) -> str:
        """Name of the arm of all its cells, or 'teacher'."""
        return self.cells[0].arm_name

    @property
    def keys(self) -> str:
        """A hash of the cells' keys."""
        return digest(canonical([cell.key for cell in self.cells]))[:KEY_DIGITS]

    @property
    def seeds(self) -> str:
        """The seeds as the command line takes them: '0,1,2'."""
        return ",".join(str(cell.seed) for cell in self.cells)

    def stamp(self, stage: str) -> str:
        """results/runs/<benchmark>/<arm>/<keys>.<stage>, relative to the root."""
        return f"results/runs/{self.benchmark}/{self.arm}/{self.keys}.{stage}"

    def sync(self, stage: str, fresh: Callable[[Cell], bool]) -> bool:
        """Make the stamp agree with the records; returns whether all of them are there."""
        path = root() / self.stamp(stage)
        complete = all(fresh(cell) for cell in self.cells)
        with writing(path):
            if complete and not path.exists():
                make_folder(path.parent)
                path.touch()
            elif not complete:
                path.unlink(missing_ok=True)
        return complete


def is_trained(cell: Cell) -> bool:
    """Whether its record exists; nothing else decides."""
    return cell.result() is not None


def start_arms(found: list[Arm]) -> list[Arm]:
    """Arms that others start from and that are not among them.

    A student is shown beside what it started from.
    """
    names = {arm.name for arm in found}
    starts: dict[str, Arm] = {}
    for arm in found:
        if arm.start is not None and arm.start.name not in names:
            starts[arm.start.name] = arm.start
    return list(starts.values())
