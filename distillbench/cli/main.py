"""The command line `distillbench`: thin over plan, train and eval. It and `scoring.py` alone may import eval."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table as RichTable

from distillbench import config
from distillbench.cells import progress, validate
from distillbench.cells.cell import Cell
from distillbench.cells.environment import ONE_THREAD
from distillbench.cells.jobs import is_trained
from distillbench.cells.progress import reporter, say
from distillbench.cells.supervisor import INTERRUPTED
from distillbench.cells.work import train_cells
from distillbench.cli import audit as cli_audit
from distillbench.cli import publish as cli_publish
from distillbench.cli.evaluate import (
    check_extractors,
    evaluate_cells,
    is_evaluated,
    known_metrics,
    samples_of,
)
from distillbench.cli.external import evaluate_path
from distillbench.errors import UserError, nearest
from distillbench.registry import folders
from distillbench.tables import plan

app = typer.Typer(
    help="""Train, sample and evaluate distillation methods under one protocol.

    A cell is (benchmark, method[@variant], seed). `make table2` or `snakemake --cores all results/table2.md` runs every
    cell of a table; the commands below run one arm by hand, in the same folders: what is there is not computed again.

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


def cells_of(benchmark: str, arm: str, seeds: str | None) -> list[Cell]:
    """The cells that the arguments of a command name; UserError on a mistake."""
    b = config.benchmark(benchmark)
    check_extractors([b])
    found = None if arm == "teacher" else folders.arm(arm)
    try:
        chosen = b.seeds if seeds is None else [int(s) for s in seeds.split(",")]
    except ValueError:
        raise UserError(
            f"--seeds: '{seeds}' is not a comma-separated list of whole numbers, e.g. 0,1,2"
        ) from None
    return [Cell(b, found, s) for s in chosen]


@app.command("list")
def list_() -> None:
    """Methods with their variants, benchmarks and tables of this checkout."""
    table = RichTable("method", "variants", "group", "fidelity", "paper", box=None)
    for m in folders.discover().values():
        table.add_row(
            m.name,
            ", ".join(m.file.variants) or "–",
            m.file.group,
            m.file.fidelity,
            f"{m.file.title}, {m.file.paper}",
        )
    out.print(table)
    for what, folder in (("benchmarks", "workflows/benchmarks"), ("tables", "workflows/tables")):
        out.print(
            f"{what}: {', '.join(sorted(p.stem for p in (config.root() / folder).glob('*.yaml')))}"
        )


@app.command()
def train(benchmark: BenchmarkName, arm: ArmName, seeds: Seeds = None) -> None:
    """Train and sample the cells of an arm. Interrupted, the same command continues from the last checkpoint."""
    train_cells(cells_of(benchmark, arm, seeds))


@app.command()
def new(
    target: Annotated[str, typer.Argument(help="name of the method, or a path that ends in it")],
) -> None:
    """Write a method that works, with places marked for your idea: methods/NAME, or the folder at a path.

    docs/adding-a-method.md walks through the rest.
    """
    from distillbench.cli.new import write_folder

    path, name = write_folder(target)
    print(
        f"{path} written: look for YOUR IDEA in method.py, then `distillbench check {name if '/' not in target else path}`"
    )
    if name not in folders.discover():
        print(
            f"for the tables to find it, add it to distillbench.yaml: method_paths: [{os.path.relpath(path, config.root())}]"
        )


@app.command()
def check(
    target: Annotated[str, typer.Argument(help="a method's name, or the path of its folder")],
) -> None:
    """Does a method keep the contract? A line for each promise that it breaks; exit code 1 if there is one.

    Files: imports, the README's equation table, claims, settings on every benchmark. Runs: every arm trains a cycle and samples
    at every NFE it declares, on images and on a mixture; then 200 steps on the mixture, where cost, streams of random numbers,
    the use of what `needs` declares, the teacher, progress towards it, a repeated and a resumed run are looked at. Less than a
    minute on one core.
    """
    from distillbench.cli.check import check_method

    if not check_method(target):
        raise typer.Exit(1)


@app.command()
def tune(
    method: Annotated[str, typer.Argument(help="a method whose config.yaml has a `search`")],
    show: Annotated[bool, typer.Option("--show", help="list the trials; run nothing")] = False,
) -> None:
    """Try the settings that a method's `search` declares, where no table looks; every trial stays in its tuning.json.

    At most 12 trials: all combinations, or the settings as they are and 11 combinations drawn by the method's name. They run on
    digits-tuning: one half of the training half teaches, the other is compared with, under the extractor of the cross-check
    column and on a seed of their own. The best by FID at the headline NFE is named; writing it into config.yaml is up to you.
    Interrupted, the same command continues.
    """
    from distillbench.cli import tune

    if "@" in method:
        raise UserError(
            f"tune {method}: settings are those of a method: leave @{method.partition('@')[2]} out"
        )
    folder = folders.arm(method).folder
    tune.show(folder) if show else tune.run(folder)


@app.command(
    help="""Score the samples of an arm, or samples made elsewhere.

    \b
    distillbench evaluate digits dmd --seeds 0    a trained arm: metrics.json beside its samples
    distillbench evaluate PATH                    released samples: nothing is trained

    PATH is one of

    \b
    - a folder of .png, .jpg or .webp in the order of their names, 2 before
      10; or of class folders 0, 1, ..., whose images are taken in turn
    - .npz: arr_0 uint8 [N,H,W,C] and, optionally, arr_1 [N], the classes asked
      for (the layout of ADM's batches)
    - .safetensors: samples uint8 [N,C,H,W] and, optionally, labels [N]; what
      `distillbench sample` writes

    It must hold exactly what the benchmark evaluates (digits: 20000 grey images of 8x8). What differs is refused in one line that
    says how to mend it: nothing is resized, converted, dropped or reordered. Samples of mixtures come as .safetensors, float32.

    With --publish the scores become the row NAME of every table with this benchmark: results/external/BENCHMARK/NAME.json, to be
    committed. Numbers compare under one extractor only, and nothing is known of the samples' budget, data and teacher.

    \b
    distillbench evaluate samples/ --name theirs --who "A. Author" \\
      --where https://example.org --publish
    """
)
def evaluate(
    target: Annotated[
        str, typer.Argument(help="name of a benchmark, before an arm; or a path, alone")
    ],
    arm: Annotated[str | None, typer.Argument(help="method, method@variant, or 'teacher'")] = None,
    seeds: Annotated[
        str | None,
        typer.Option(help="of the arm: comma-separated; all seeds of the benchmark if left out"),
    ] = None,
    draws: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="of the arm: score so many independent sets of samples, for the sampling error (draws.json)",
        ),
    ] = None,
    benchmark: Annotated[
        str | None,
        typer.Option(help="what the samples at PATH are scored against; digits if left out"),
    ] = None,
    count: Annotated[
        int | None,
        typer.Option(
            min=1, help="accept another number of samples; the row is marked not comparable"
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="of the row; the name of the file if left out")
    ] = None,
    who: Annotated[str | None, typer.Option(help="who made the samples")] = None,
    where: Annotated[str | None, typer.Option(help="where they come from: URL or paper")] = None,
    publish: Annotated[
        bool,
        typer.Option(
            "--publish", help="write the record that tables show; needs --name, --who, --where"
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="replace a record of other samples")
    ] = False,
    output: Annotated[
        Path | None, typer.Option(help="write the record to this .json; printed only if left out")
    ] = None,
) -> None:
    given = {
        "--benchmark": benchmark,
        "--count": count,
        "--name": name,
        "--who": who,
        "--where": where,
        "--publish": publish,
        "--overwrite": overwrite,
        "--output": output,
    }
    if arm is not None:
        for option, value in given.items():
            if value:
                raise UserError(
                    f"{option} belongs to `distillbench evaluate PATH`; '{target} {arm}' names an arm: drop one of them"
                )
        return evaluate_cells(cells_of(target, arm, seeds), draws)
    known = sorted(p.stem for p in (config.root() / "workflows/benchmarks").glob("*.yaml"))
    path = Path(target)
    if not os.path.lexists(path):
        if target in known:
            ways = f"`distillbench evaluate {target} teacher`, or `distillbench evaluate PATH --benchmark {target}` for samples"
            raise UserError(f"evaluate {target}: an arm is missing after the benchmark: {ways}")
        raise UserError(
            f"evaluate {target}: neither a path (no such file or folder) nor a benchmark followed by an arm ({nearest(target, known)})"
        )
    for option, value in {"--seeds": seeds, "--draws": draws}.items():
        if value is not None:
            raise UserError(
                f"{option} belongs to `distillbench evaluate BENCHMARK ARM`; '{target}' is a path: drop it"
            )
    evaluate_path(
        path,
        config.benchmark(benchmark or "digits"),
        name,
        who,
        where,
        count,
        publish,
        overwrite,
        output,
    )


@app.command()
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
    from distillbench.cells.build import restore
    from distillbench.cells.checkpoint import write_tensors
    from distillbench.cells.sampling import sample as draw

    if output.suffix not in (".png", ".safetensors"):
        raise UserError(f"--output: '{output}' must end in .png or .safetensors")
    (cell,) = cells_of(benchmark, arm, str(seed))
    samples_of(cell)  # says so if it is not there
    run = restore(cell)
    nfe = run.needs.headline_nfe if nfe is None else nfe
    x = draw(run, nfe, count, reporter(cell.label), name="sample")
    if output.suffix == ".safetensors":
        import torch

        labels = {"labels": torch.arange(count) % run.data.classes} if run.data.classes else {}
        write_tensors(output, {"samples": x, **labels}, cell=cell.key, nfe=nfe)
    else:
        if x.dim() != 4:
            raise UserError(
                f"--output: samples of {benchmark} are no images: write them to a .safetensors file"
            )
        from torchvision.utils import make_grid, save_image

        image = x.float() / 255 if x.dtype.is_floating_point is False else (x + 1) / 2
        save_image(make_grid(image, nrow=10, padding=1), output)
    print(f"{output}: {count} samples of {cell.label}", file=sys.stderr)


@app.command()
def status(
    table: TableName = "table2",
    long: Annotated[
        bool,
        typer.Option("--long", help="a line for each cell, with its reason, seconds and folder"),
    ] = False,
    profile: ProfileName = None,
) -> None:
    """How far every cell of a table is: rows are methods, columns are seeds.

    done: trained and evaluated. trained: not evaluated yet. 41% 35 s left: running now. interrupted at 41%: the same command
    as before continues it. waiting: for its teacher or start. to do: can start. queued (Priority): in SLURM's queue. lost: by the
    cluster; the same command tries again. FAILED, DIVERGED, OOM, TIMEOUT, HUNG, OVER BUDGET, REFUSED: it has a record that says
    why; see `distillbench logs`.
    """
    from distillbench.tables import overview

    jobs = plan.jobs(plan.table(table, profile), known_metrics)
    if not long:
        out.print(overview.matrix(jobs, is_evaluated))
    for line in overview.details(jobs, is_evaluated) if long else []:
        out.print(line, soft_wrap=True, markup=False)


@app.command()
def logs(
    cell: Annotated[
        str,
        typer.Argument(
            help="benchmark/method[@variant]/seed, e.g. digits/dmd/0, or a cell's folder"
        ),
    ],
) -> None:
    """What happened in a cell: status and reason, starts and deaths, last steps, traceback, files.

    distillbench logs digits/dmd/0

    distillbench logs digits/dmd@no-regression/seed0

    distillbench logs results/runs/digits/teacher/seed0-0123456789ab
    """
    from distillbench.tables import overview

    out.print(overview.story(overview.find(cell)), soft_wrap=True)


@app.command("plan")
def plan_(table: TableName = "table2", profile: ProfileName = None) -> None:
    """What a table still needs, and a check of every file it will read; with --profile slurm also what would be asked of the cluster."""
    from distillbench.tables import overview

    jobs = plan.jobs(plan.table(table, profile), known_metrics)
    check_extractors([j.cells[0].benchmark for j in jobs])
    todo = [j for j in jobs if not all(is_trained(c) for c in j.cells)]
    for warning in validate.validate(todo):
        print(f"distillbench: {warning}", file=sys.stderr)
    if not todo:
        how = f"--profile {profile}" if profile else "--cores all"
        out.print(
            f"{table}: every cell is there; `snakemake {how} results/{table}.md` has at most to evaluate and render"
        )
    for line in overview.forecast(todo, is_trained, profile):
        out.print(line, soft_wrap=True, markup=False)
    if plan.table(table).kind == "audit":
        from distillbench.cli import audit_pages

        out.print(
            "\n".join(audit_pages.cost(plan.table(table, profile), jobs)),
            soft_wrap=True,
            markup=False,
        )


@app.command()
def cancel(table: TableName = "table2", profile: ProfileName = "slurm") -> None:
    """End the SLURM jobs of a table's cells; their launchers do not try again. The same snakemake command continues them later."""
    from distillbench.cluster import control

    numbers = control.cancel(plan.jobs(plan.table(table, profile), known_metrics))
    print(
        f"cancelled: jobs {', '.join(numbers)}" if numbers else "none of its jobs is in the queue"
    )


for part in (cli_publish, cli_audit):
    app.registered_commands += part.app.registered_commands


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
