"""`distillbench list`, `train` and `sample`: what can be run, running it, and looking at what came
out."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table as RichTable

from distillbench.cells.progress import reporter
from distillbench.cells.work import train_cells
from distillbench.cli.evaluate import samples_of
from distillbench.cli.options import (
    ArmName,
    BenchmarkName,
    Seeds,
    cells_of,
    known_benchmarks,
    known_tables,
    out,
)
from distillbench.errors import UserError
from distillbench.registry import folders

if TYPE_CHECKING:
    from torch import Tensor


def list_checkout() -> None:
    """Methods with their variants, benchmarks and tables of this checkout."""
    table = RichTable("method", "variants", "group", "fidelity", "paper", box=None)
    for method in folders.discover().values():
        about = method.file
        variants = ", ".join(about.variants) or "–"
        paper = f"{about.title}, {about.paper}"
        table.add_row(method.name, variants, about.group, about.fidelity, paper)
    out.print(table)
    out.print(f"benchmarks: {', '.join(known_benchmarks())}")
    out.print(f"tables: {', '.join(known_tables())}")


def train(benchmark: BenchmarkName, arm: ArmName, seeds: Seeds = None) -> None:
    """Train and sample the cells of an arm. Interrupted, the same command continues from the last
    checkpoint."""
    train_cells(cells_of(benchmark, arm, seeds))


def sample(
    benchmark: BenchmarkName,
    arm: ArmName,
    output: Annotated[
        Path,
        typer.Option(help=".png for a picture of images, .safetensors for the tensor `samples`"),
    ],
    seed: Annotated[int, typer.Option(help="seed of the cell")] = 0,
    nfe: Annotated[
        int | None, typer.Option(help="network evaluations; the method's headline NFE if left out")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="how many, labels in turn")] = 60,
) -> None:
    """Draw fresh samples from a finished cell into a file."""
    import torch

    from distillbench.cells.build import restore
    from distillbench.cells.checkpoint import write_tensors
    from distillbench.cells.sampling import sample as draw

    if output.suffix not in (".png", ".safetensors"):
        raise UserError(f"--output: '{output}' must end in .png or .safetensors")
    (cell,) = cells_of(benchmark, arm, str(seed))
    samples_of(cell)  # raises where the cell is not finished
    run = restore(cell)
    nfe = run.needs.headline_nfe if nfe is None else nfe
    samples = draw(run, nfe, count, reporter(cell.label), name="sample")
    if output.suffix == ".safetensors":
        tensors = {"samples": samples}
        if run.data.classes:
            tensors["labels"] = torch.arange(count) % run.data.classes
        write_tensors(output, tensors, cell=cell.key, nfe=nfe)
    elif samples.dim() == 4:
        save_picture(output, samples)
    else:
        raise UserError(
            f"--output: samples of {benchmark} are no images: write them to a .safetensors file"
        )
    print(f"{output}: {count} samples of {cell.label}", file=sys.stderr)


def save_picture(path: Path, images: Tensor) -> None:
    """Images [N,C,H,W], uint8 or floats in [-1, 1], as a .png with ten in a row."""
    from torchvision.utils import make_grid, save_image

    shown = (images + 1) / 2 if images.dtype.is_floating_point else images.float() / 255
    save_image(make_grid(shown, nrow=10, padding=1), path)
