"""The command line `distillbench`: thin over plan, train and eval; the only module that may import eval."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table as RichTable

from distillbench import config, plan, progress, registry
from distillbench.cell import Cell, lock, write_atomically, write_json
from distillbench.dispatch import ONE_THREAD
from distillbench.errors import UserError
from distillbench.progress import reporter

if TYPE_CHECKING:
    from torch import Tensor

app = typer.Typer(
    help="""Train, sample and evaluate distillation methods under one protocol.

    A cell is (benchmark, method[@variant], seed). `make table2` or `snakemake --cores all results/table2.md` runs every
    cell of a table; the commands below run one arm by hand, in the same folders: what is there is not computed again.

    distillbench list                           methods, benchmarks and tables

    distillbench plan table2                    what would run, and what it may cost

    distillbench train digits dmd --seeds 0     train (its teacher first, if need be) and sample

    distillbench evaluate digits dmd --seeds 0  metrics of these samples

    distillbench sample digits dmd --seed 0 --nfe 1 --output dmd.png
    """,
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None,
)  # fmt: skip
out = Console(highlight=False)
INTERRUPTED = 130

BenchmarkName = Annotated[str, typer.Argument(help="name of a file in workflows/benchmarks, e.g. digits")]
ArmName = Annotated[str, typer.Argument(help="method, method@variant, or 'teacher'")]
TableName = Annotated[str, typer.Argument(help="name of a file in workflows/tables, e.g. table2")]
Seeds = Annotated[str | None, typer.Option(help="comma-separated, e.g. 0,1,2; all seeds of the benchmark if left out")]


def check_extractors(benchmarks: list[config.Benchmark]) -> None:
    """UserError on a benchmark whose extractor eval does not have."""
    from eval.records import known_extractor

    for b in benchmarks:
        try:
            if b.extractor is not None:
                known_extractor(b.extractor)
        except ValueError as e:
            raise UserError(f"workflows/benchmarks/{b.name}.yaml: key 'extractor': {e}") from None


def cells_of(benchmark: str, arm: str, seeds: str | None) -> list[Cell]:
    """The cells that the arguments of a command name; UserError on a mistake."""
    b = config.benchmark(benchmark)
    check_extractors([b])
    found = None if arm == "teacher" else registry.arm(arm)
    try:
        chosen = b.seeds if seeds is None else [int(s) for s in seeds.split(",")]
    except ValueError:
        raise UserError(f"--seeds: '{seeds}' is not a comma-separated list of whole numbers, e.g. 0,1,2") from None
    return [Cell(b, found, s) for s in chosen]


@app.command("list")
def list_() -> None:
    """Methods with their variants, benchmarks and tables of this checkout."""
    table = RichTable("method", "variants", "group", "fidelity", "paper", box=None)
    for m in registry.discover().values():
        table.add_row(m.name, ", ".join(m.file.variants) or "–", m.file.group, m.file.fidelity, f"{m.file.title}, {m.file.paper}")
    out.print(table)
    for what, folder in (("benchmarks", "workflows/benchmarks"), ("tables", "workflows/tables")):
        out.print(f"{what}: {', '.join(sorted(p.stem for p in (config.root() / folder).glob('*.yaml')))}")


@app.command()
def train(benchmark: BenchmarkName, arm: ArmName, seeds: Seeds = None) -> None:
    """Train and sample the cells of an arm. Interrupted, the same command continues from the last checkpoint."""
    from distillbench.train import run_cell

    cells = cells_of(benchmark, arm, seeds)
    if cells[0].arm is not None:
        for warning in plan.validate([plan.Job(tuple(cells))]):
            print(f"distillbench: {warning}", file=sys.stderr)
    for cell in cells:
        for one in (cell,) if cell.arm is None else (cell.teacher, cell):
            with one.locked():
                record, ran = one.result(), False
                if record is not None and record["status"] != "done":
                    print(f"{one.label}: {record['status']} before; to try again delete {one.folder}", file=sys.stderr)
                if record is None:
                    record, ran = run_cell(one, reporter(one.label)), True
            if ran:
                text = record["status"] if record["status"] == "done" else f"{record['status'].upper()}: {record['reason']}"
                print(f"{one.label}: {text} in {record['cost']['seconds']:g} s", file=sys.stderr)
            if record["status"] != "done" and one is not cell:
                raise UserError(f"{one.label} ended as {record['status']} ({record['reason']}): its students have nothing to start from")


def samples_of(cell: Cell) -> tuple[dict[int, Tensor], Tensor | None]:
    """The stored samples of a finished cell by NFE, in the order its method declares, and a teacher's reference set."""
    from distillbench.checkpoint import read_tensors
    from distillbench.train import REFERENCE

    result = cell.result()
    if result is None or result["status"] != "done":
        why = "is not trained" if result is None else f"ended as {result['status']}"
        raise UserError(f"{cell.label} {why}: run `distillbench train {cell.benchmark.name} {cell.arm_name} --seeds {cell.seed}`")
    stored, _ = read_tensors(cell.folder / "samples.safetensors")
    return {n: stored[f"nfe{n}"] for n in result["nfe"]}, stored.get(REFERENCE)


@app.command()
def evaluate(benchmark: BenchmarkName, arm: ArmName, seeds: Seeds = None) -> None:
    """Metrics of the samples of an arm (or of the teacher), written to metrics.json beside them."""
    from eval.records import is_evaluated

    for cell in cells_of(benchmark, arm, seeds):
        result = cell.result()
        if result is not None and result["status"] != "done":
            print(f"{cell.label}: {result['status']}, nothing to evaluate", file=sys.stderr)
        elif not is_evaluated(cell.metrics, cell.benchmark.extractor):
            write_json(cell.metrics, metrics_of(cell))
            print(f"{cell.label}: evaluated", file=sys.stderr)


def metrics_of(cell: Cell) -> dict[str, Any]:
    """The content of metrics.json: numbers that repeat byte for byte, so neither times nor paths."""
    import hashlib
    from importlib.metadata import version

    import torch

    from distillbench import data as data_sets
    from distillbench.seeds import Rng
    from eval import evaluate as evaluation
    from eval.extractors import load_extractor
    from eval.records import evaluation_key

    torch.set_num_threads(1)
    b, data = cell.benchmark, data_sets.load(cell.benchmark.data)
    samples, _ = samples_of(cell)
    about: dict[str, Any] = {"key": evaluation_key(b.extractor), "samples": b.sampling.count, "torch_fidelity": version("torch-fidelity")}
    report = reporter(cell.label)
    report("evaluating", 0, 1)
    if isinstance(data, data_sets.Images):
        assert b.extractor is not None
        train, reference = data_sets.to_bytes(data.train), data_sets.to_bytes(data.reference)
        about |= {"extractor": b.extractor, "extractor_sha256": load_extractor(b.extractor).sha256, "reference": len(reference)}
        about["reference_sha256"] = hashlib.sha256(reference.numpy().tobytes()).hexdigest()
        _, teacher = samples_of(cell.teacher)
        assert teacher is not None
        found = evaluation.image_metrics(samples, b.extractor, reference, train, teacher)
        if cell.arm is None:
            found["fixed"] = evaluation.image_fixed_rows(b.extractor, train, data.train_labels, reference, b.sampling.count, cell.seed)
    else:
        rng = Rng(cell.seed, "exact samples")
        exact, again = (data.draw(rng, b.sampling.count)[0] for _ in range(2))
        found = evaluation.mixture_metrics(samples, exact, again, data.means, data.sigma, data.weights)
    report("evaluating", 1, 1)
    return {"format": 1, "key": cell.key, "evaluation": about} | found


@app.command()
def sample(
    benchmark: BenchmarkName,
    arm: ArmName,
    output: Annotated[Path, typer.Option(help=".png for a picture of images, .safetensors for the tensor `samples`")],
    seed: Annotated[int, typer.Option(help="seed of the cell")] = 0,
    nfe: Annotated[int | None, typer.Option(help="network evaluations; the method's headline NFE if left out")] = None,
    count: Annotated[int, typer.Option(min=1, help="how many, labels in turn")] = 60,
) -> None:
    """Draw fresh samples from a finished cell into a file."""
    from distillbench.checkpoint import write_tensors
    from distillbench.train import restore
    from distillbench.train import sample as draw

    if output.suffix not in (".png", ".safetensors"):
        raise UserError(f"--output: '{output}' must end in .png or .safetensors")
    (cell,) = cells_of(benchmark, arm, str(seed))
    samples_of(cell)  # says so if it is not there
    run = restore(cell)
    nfe = run.needs.headline_nfe if nfe is None else nfe
    x = draw(run, nfe, count, reporter(cell.label), name="sample")
    if output.suffix == ".safetensors":
        write_tensors(output, {"samples": x}, cell=cell.key, nfe=nfe)
    else:
        if x.dim() != 4:
            raise UserError(f"--output: samples of {benchmark} are no images: write them to a .safetensors file")
        from torchvision.utils import make_grid, save_image

        image = x.float() / 255 if x.dtype.is_floating_point is False else (x + 1) / 2
        save_image(make_grid(image, nrow=10, padding=1), output)
    print(f"{output}: {count} samples of {cell.label}", file=sys.stderr)


@app.command()
def status(table: TableName = "table2") -> None:
    """How far every cell of a table is."""
    from eval.records import is_evaluated

    view = RichTable("cell", "status", "evaluated", "seconds", box=None)
    view.add_column("folder", overflow="fold")
    for job in plan.jobs(config.table(table)):
        for cell in job.cells:
            result = cell.result()
            if result is None:
                words = ("started" if (cell.folder / "config.yaml").is_file() else "to do", "", "")
            else:
                reason = f": {result['reason']}" if result["reason"] else ""
                done = "yes" if is_evaluated(cell.metrics, cell.benchmark.extractor) else ""
                words = (result["status"] + reason, done, f"{result['cost']['seconds']:g}")
            view.add_row(cell.label, *words, str(cell.folder.relative_to(config.root())))
    out.print(view)


@app.command("plan")
def plan_(table: TableName = "table2") -> None:
    """What a table still needs, and a check of every file it will read."""
    jobs = plan.jobs(config.table(table))
    check_extractors([j.cells[0].benchmark for j in jobs])
    todo = [j for j in jobs if not all(plan.is_trained(c) for c in j.cells)]
    for warning in plan.validate(todo):
        print(f"distillbench: {warning}", file=sys.stderr)
    if not todo:
        out.print(f"{table}: every cell is there; `snakemake --cores all results/{table}.md` has at most to evaluate and render")
    for j in todo:
        missing = [c for c in j.cells if not plan.is_trained(c)]
        b = missing[0].benchmark
        cost = f"{b.teacher.updates} updates" if missing[0].arm is None else f"{b.budget.flops / 1e12:g} TFLOP"
        out.print(f"{j.benchmark}/{j.arm}: seeds {', '.join(str(c.seed) for c in missing)}, {cost} each")


@app.command("table")
def table_(
    name: TableName,
    check: Annotated[
        bool, typer.Option("--check", help="compare the files there with the published records; exit 1 if they differ")
    ] = False,
    render: Annotated[bool, typer.Option("--render", help="render from the published records; look at no cell")] = False,
) -> None:
    """Publish the records of a table's cells to results/records and render the table from them."""
    import yaml

    from eval import figures, records, tables

    table, results = config.table(name), config.root() / "results"
    folder = results / "records" / name
    if not (check or render):
        cells = [c for j in plan.jobs(table) for c in j.cells]
        missing = next((c for c in cells if c.result() is None), None)
        if missing:
            raise UserError(f"{missing.label} is not trained: run `snakemake --cores all results/{name}.md`")
        with lock(results / "runs" / f"{name}.lock"):
            same, total = records.publish(folder, [(c.folder, c.labels()) for c in cells])
        print(f"{name}: {same} of {total} cells have exactly the metrics published before", file=sys.stderr)
    reported = yaml.safe_load((config.root() / table.reported).read_text()) if table.reported else None
    found, differing = records.read(folder), []
    if not found:
        raise UserError(f"{folder}: no published records: run `snakemake --cores all results/{name}.md`")

    def write(path: Path, data: bytes) -> None:
        if not check:
            write_atomically(path, data)
        elif not path.is_file() or path.read_bytes() != data:
            differing.append(path.name)

    tables.write(name, table.title, found, reported, results, write)
    write(results / f"{name}.png", figures.picture(found))
    if check:
        print(
            f"results/{name}: " + (f"differ from their records: {', '.join(differing)}" if differing else "as rendered from their records")
        )
        raise typer.Exit(1 if differing else 0)
    print(f"results/{name}.md written", file=sys.stderr)


@app.command(hidden=True)
def schema() -> None:
    """Write the JSON schemas that editors check benchmark, table and method files with."""
    for path, model in config.SCHEMAS.items():
        write_json(config.root() / path, model.model_json_schema())


def main() -> None:
    """Entry point: a UserError is one line and exit code 2."""
    for name in ONE_THREAD:  # before torch is imported
        os.environ.setdefault(name, "1")
    try:
        app()
    except UserError as e:
        print(f"distillbench: {e}", file=sys.stderr)
        sys.exit(2)
    except SystemExit as e:
        if e.code == INTERRUPTED:  # typer's answer to Ctrl-C
            print("\ndistillbench: interrupted; the same command continues", file=sys.stderr)
        raise
    finally:
        progress.stop()


if __name__ == "__main__":
    main()
