"""`distillbench evaluate`: scores of an arm's samples, of repeated draws, and of samples made
elsewhere (`external.py`)."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distillbench import config
from distillbench.cells.cell import Cell
from distillbench.cells.disk import write_json
from distillbench.cells.progress import reporter
from distillbench.cli.external import External, score_external
from distillbench.cli.extractors import stored_images
from distillbench.cli.options import cells_of, known_benchmarks
from distillbench.errors import UserError, nearest

if TYPE_CHECKING:
    from torch import Tensor

HELP = """Score the samples of an arm, or samples made elsewhere.

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

    It must hold exactly what the benchmark evaluates (digits: 20000 grey images of 8x8). What
    differs is refused in one line that says how to mend it: nothing is resized, converted, dropped
    or reordered. Samples of mixtures come as .safetensors, float32.

    With --publish the scores become the row NAME of every table with this benchmark:
    results/external/BENCHMARK/NAME.json, to be committed. Numbers compare under one extractor only,
    and nothing is known of the samples' budget, data and teacher.

    \b
    distillbench evaluate samples/ --name theirs --who "A. Author" \\
      --where https://example.org --publish
    """


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
            help="of the arm: score so many independent sets of samples, for the sampling error "
            "(draws.json)",
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
    """The command; its help is HELP, which keeps the layout of its examples."""
    of_path = {
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
        for option, value in of_path.items():
            if value:
                raise UserError(
                    f"{option} belongs to `distillbench evaluate PATH`; '{target} {arm}' names an "
                    "arm: drop one of them"
                )
        evaluate_cells(cells_of(target, arm, seeds), draws)
        return
    path = Path(target)
    if not os.path.lexists(path):
        raise no_target(target)
    for option, number in {"--seeds": seeds, "--draws": draws}.items():
        if number is not None:
            raise UserError(
                f"{option} belongs to `distillbench evaluate BENCHMARK ARM`; '{target}' is a path: "
                "drop it"
            )
    samples = External(path, name, who, where, count)
    score_external(samples, config.benchmark(benchmark or "digits"), publish, overwrite, output)


def no_target(target: str) -> UserError:
    """What is wrong with a target that is no path, where no arm follows it."""
    known = known_benchmarks()
    if target in known:
        return UserError(
            f"evaluate {target}: an arm is missing after the benchmark: "
            f"`distillbench evaluate {target} teacher`, or "
            f"`distillbench evaluate PATH --benchmark {target}` for samples"
        )
    return UserError(
        f"evaluate {target}: neither a path (no such file or folder) nor a benchmark followed by "
        f"an arm ({nearest(target, known)})"
    )


def known_metrics(benchmark: str) -> tuple[str, ...]:
    """What claims may name on a benchmark; UserError where there is none of that name."""
    from eval import catalogue

    mixture = config.benchmark(benchmark).data.kind == "mixture"
    return catalogue.known_names("mixtures" if mixture else "images")


def is_evaluated(cell: Cell) -> bool:
    """Whether a cell's metrics are there, and of the current evaluation."""
    from eval.metrics import key

    return key.is_evaluated(cell.metrics, cell.benchmark.extractor, cell.benchmark.cross_extractor)


def has_ended(cell: Cell) -> bool:
    """Whether nothing is left to do for a cell: evaluated, or failed and so nothing to evaluate."""
    result = cell.result()
    return result is not None and (result["status"] != "done" or is_evaluated(cell))


def samples_of(cell: Cell) -> tuple[dict[int, Tensor], Tensor | None]:
    """Stored samples of a finished cell by NFE, in the order its method declares, and a teacher's
    reference set.

    Raises UserError where the cell is not trained, or has failed.
    """
    from distillbench.cells.checkpoint import read_tensors
    from distillbench.cells.sampling import REFERENCE

    result = cell.result()
    if result is None or result["status"] != "done":
        why = "is not trained" if result is None else f"ended as {result['status']}"
        words = f"{cell.benchmark.name} {cell.arm_name} --seeds {cell.seed}"
        raise UserError(f"{cell.label} {why}: run `distillbench train {words}`")
    stored, _ = read_tensors(cell.folder / "samples.safetensors")
    samples = {nfe: stored[f"nfe{nfe}"] for nfe in result["nfe"]}
    return samples, stored.get(REFERENCE)


def evaluate_cells(cells: list[Cell], draws: int | None) -> None:
    """Write metrics.json of cells that have none of this evaluation; with `draws` draws.json."""
    for cell in cells:
        result = cell.result()
        if result is not None and result["status"] != "done":
            print(f"{cell.label}: {result['status']}, nothing to evaluate", file=sys.stderr)
        elif draws is None:
            if not is_evaluated(cell):
                write_json(cell.metrics, metrics_of(cell))
                print(f"{cell.label}: evaluated", file=sys.stderr)
        else:
            path = cell.folder / "draws.json"
            if not is_drawn(path, cell, draws):
                write_json(path, draws_of(cell, draws))
                print(f"{cell.label}: {path}", file=sys.stderr)


def is_drawn(path: Path, cell: Cell, draws: int) -> bool:
    """Whether a draws.json is there, of the current evaluation and of so many draws."""
    from eval.metrics import key

    if not key.is_evaluated(path, cell.benchmark.extractor, cell.benchmark.cross_extractor):
        return False
    return json.loads(path.read_text(encoding="utf-8"))["draws"] == draws


def metrics_of(cell: Cell) -> dict[str, Any]:
    """The content of metrics.json, made by `eval/metrics/evaluate.py`.

    Its numbers repeat byte for byte, so it holds neither times nor paths.
    """
    import torch

    from distillbench.data import kinds
    from distillbench.data.images import Images
    from distillbench.seeds import Rng
    from eval.metrics import evaluate

    torch.set_num_threads(1)
    b = cell.benchmark
    data = kinds.load(b.data)
    samples, _ = samples_of(cell)
    report = reporter(cell.label)
    report("evaluating", 0, 1)
    if isinstance(data, Images):
        assert b.extractor is not None
        teacher, reference_set = samples_of(cell.teacher)
        assert reference_set is not None
        found = evaluate.image_metrics(
            stored_images(data),
            b.extractor,
            b.cross_extractor,
            samples,
            teacher,
            reference_set,
            cell.seed,
            is_teacher=cell.arm is None,
            cache=config.root() / "results/runs/references",
        )
    else:
        rng = Rng(cell.seed, "exact samples")
        exact, _ = data.draw(rng, b.sampling.count)
        second_exact, _ = data.draw(rng, b.sampling.count)
        found = evaluate.mixture_metrics(
            samples, exact, second_exact, data.means, data.sigma, data.weights
        )
    report("evaluating", 1, 1)
    return {"format": 1, "key": cell.key} | found


def draws_of(cell: Cell, count: int) -> dict[str, Any]:
    """The content of draws.json: scores of `count` independent sets of samples of one checkpoint at
    its headline NFE.

    Their spread is the sampling error of that checkpoint, not the spread of training.
    """
    import torch

    from distillbench.cells.build import restore
    from distillbench.cells.sampling import sample as draw
    from distillbench.data.images import Images
    from eval.metrics import evaluate

    torch.set_num_threads(1)
    _, reference_set = samples_of(cell.teacher)
    samples_of(cell)  # raises where the cell is not finished
    run = restore(cell)
    b = cell.benchmark
    nfe = run.needs.headline_nfe
    if not isinstance(run.data, Images) or b.extractor is None or reference_set is None:
        raise UserError(f"--draws: {b.name} has no images: drop it")
    report = reporter(cell.label)
    sets = []
    for k in range(count):
        sets.append(draw(run, nfe, b.sampling.count, report, name=f"draw {k}"))
    found = evaluate.repeated_draws(
        stored_images(run.data), b.extractor, b.cross_extractor, sets, reference_set
    )
    return {"format": 1, "key": cell.key, "nfe": nfe, "draws": count} | found
