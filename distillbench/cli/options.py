"""What commands share: arguments and options, the console, and the cells that arguments name."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from distillbench import config
from distillbench.cells.cell import Cell
from distillbench.cli.extractors import check_extractors
from distillbench.errors import UserError
from distillbench.registry import folders

out = Console(highlight=False)

BenchmarkName = Annotated[
    str, typer.Argument(help="name of a file in workflows/benchmarks, e.g. digits")
]
ArmName = Annotated[
    str,
    typer.Argument(
        help="method, method@variant, either with @x0.25 for that share of the budget; or 'teacher'"
    ),
]
TableName = Annotated[str, typer.Argument(help="name of a file in workflows/tables, e.g. table2")]
AuditName = Annotated[str, typer.Argument(help="an audit in workflows/tables")]
ProfileName = Annotated[
    str | None,
    typer.Option(
        "--profile", help="a Snakemake profile, e.g. slurm: its site.yaml may change benchmarks"
    ),
]
Seeds = Annotated[
    str | None,
    typer.Option(help="comma-separated, e.g. 0,1,2; all seeds of the benchmark if left out"),
]


def parse_seeds(text: str, example: str) -> list[int]:
    """Comma-separated whole numbers; UserError, with an example, where they are none."""
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise UserError(
            f"--seeds: '{text}' is not a comma-separated list of whole numbers, e.g. {example}"
        ) from None


def cells_of(benchmark: str, arm: str, seeds: str | None) -> list[Cell]:
    """The cells that the arguments of a command name; UserError on a mistake."""
    b = config.benchmark(benchmark)
    check_extractors([b])
    found = None if arm == "teacher" else folders.arm(arm)
    chosen = b.seeds if seeds is None else parse_seeds(seeds, "0,1,2")
    return [Cell(b, found, seed) for seed in chosen]


def known_benchmarks() -> list[str]:
    """Names of the benchmarks of this checkout."""
    return sorted(path.stem for path in (config.root() / "workflows/benchmarks").glob("*.yaml"))


def known_tables() -> list[str]:
    """Names of the tables of this checkout."""
    return sorted(path.stem for path in (config.root() / "workflows/tables").glob("*.yaml"))
