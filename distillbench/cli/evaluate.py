"""What the command line does with samples: score those of an arm, of repeated draws, and those made elsewhere.

Beside `cli.py` the only module that may import eval.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import TYPE_CHECKING, Any

from rich.console import Console

from distillbench import config
from distillbench.cells.cell import Cell
from distillbench.cells.disk import write_json
from distillbench.cells.progress import reporter
from distillbench.config import Benchmark
from distillbench.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from distillbench.data.images import Images

out = Console(highlight=False)


def check_extractors(benchmarks: list[Benchmark]) -> None:
    """UserError on a benchmark with an extractor that eval does not have, or whose weights are not there."""
    from eval.features.weights import weight_file

    for b in benchmarks:
        for key, name in (("extractor", b.extractor), ("cross_extractor", b.cross_extractor)):
            try:
                if name is not None:
                    weight_file(name)
            except ValueError as e:
                raise UserError(f"workflows/benchmarks/{b.name}.yaml: key '{key}': {e}") from None


def known_metrics(benchmark: str) -> tuple[str, ...]:
    """What claims may name on a benchmark; UserError where there is none of that name."""
    from eval import catalogue

    mixture = config.benchmark(benchmark).data.kind == "mixture"
    return catalogue.known_names("mixtures" if mixture else "images")


def is_evaluated(cell: Cell) -> bool:
    """Its metrics are there, and of the current evaluation."""
    from eval.metrics import key

    return key.is_evaluated(cell.metrics, cell.benchmark.extractor, cell.benchmark.cross_extractor)


def samples_of(cell: Cell) -> tuple[dict[int, Tensor], Tensor | None]:
    """The stored samples of a finished cell by NFE, in the order its method declares, and a teacher's reference set."""
    from distillbench.cells.checkpoint import read_tensors
    from distillbench.cells.sampling import REFERENCE

    result = cell.result()
    if result is None or result["status"] != "done":
        why = "is not trained" if result is None else f"ended as {result['status']}"
        raise UserError(
            f"{cell.label} {why}: run `distillbench train {cell.benchmark.name} {cell.arm_name} --seeds {cell.seed}`"
        )
    stored, _ = read_tensors(cell.folder / "samples.safetensors")
    return {n: stored[f"nfe{n}"] for n in result["nfe"]}, stored.get(REFERENCE)


def stored_images(data: Images) -> Images:
    """A data set's images as they are evaluated: bytes."""
    from distillbench.data.images import to_bytes

    return dataclasses.replace(data, train=to_bytes(data.train), reference=to_bytes(data.reference))


def metrics_of(cell: Cell) -> dict[str, Any]:
    """The content of metrics.json: numbers that repeat byte for byte, so neither times nor paths. `eval/evaluate.py` makes them."""
    import torch

    from distillbench.data import kinds
    from distillbench.data.images import Images
    from distillbench.seeds import Rng
    from eval.metrics import evaluate

    torch.set_num_threads(1)
    b, data = cell.benchmark, kinds.load(cell.benchmark.data)
    samples, _ = samples_of(cell)
    report = reporter(cell.label)
    report("evaluating", 0, 1)
    if isinstance(data, Images):
        assert b.extractor is not None
        teacher, again = samples_of(cell.teacher)
        assert again is not None
        found = evaluate.image_metrics(
            stored_images(data),
            b.extractor,
            b.cross_extractor,
            samples,
            teacher,
            again,
            cell.seed,
            is_teacher=cell.arm is None,
            cache=config.root() / "results/runs/references",
        )
    else:
        rng = Rng(cell.seed, "exact samples")
        exact, again = (data.draw(rng, b.sampling.count)[0] for _ in range(2))
        found = evaluate.mixture_metrics(
            samples, exact, again, data.means, data.sigma, data.weights
        )
    report("evaluating", 1, 1)
    return {"format": 1, "key": cell.key} | found


def evaluate_cells(cells: list[Cell], draws: int | None) -> None:
    """metrics.json of cells that have none of this evaluation; with `draws` draws.json instead."""
    from eval.metrics.key import is_evaluated

    for cell in cells:
        result, b = cell.result(), cell.benchmark
        path = cell.metrics if draws is None else cell.folder / "draws.json"
        if result is not None and result["status"] != "done":
            print(f"{cell.label}: {result['status']}, nothing to evaluate", file=sys.stderr)
        elif not is_evaluated(path, b.extractor, b.cross_extractor) or (
            draws and json.loads(path.read_text())["draws"] != draws
        ):
            write_json(path, metrics_of(cell) if draws is None else draws_of(cell, draws))
            print(f"{cell.label}: {'evaluated' if draws is None else path}", file=sys.stderr)


def draws_of(cell: Cell, count: int) -> dict[str, Any]:
    """The content of draws.json: scores of `count` independent sets of samples of one checkpoint at its headline NFE.

    Their spread is the sampling error of that checkpoint, not the spread of training.
    """
    import torch

    from distillbench.cells.build import restore
    from distillbench.cells.sampling import sample as draw
    from distillbench.data.images import Images
    from eval.metrics import evaluate

    torch.set_num_threads(1)
    _, again = samples_of(cell.teacher)
    samples_of(cell)  # says so if it is not there
    run, b, report = restore(cell), cell.benchmark, reporter(cell.label)
    nfe = run.needs.headline_nfe
    if not isinstance(run.data, Images) or b.extractor is None or again is None:
        raise UserError(f"--draws: {b.name} has no images: drop it")
    sets = [draw(run, nfe, b.sampling.count, report, name=f"draw {k}") for k in range(count)]
    found = evaluate.repeated_draws(
        stored_images(run.data), b.extractor, b.cross_extractor, sets, again
    )
    return {"format": 1, "key": cell.key, "nfe": nfe, "draws": count} | found
