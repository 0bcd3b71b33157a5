"""What the command line does with samples: score those of an arm, of repeated draws, and those made elsewhere.

Beside `cli.py` the only module that may import eval.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table as RichTable

from distillbench import config, progress
from distillbench.cell import Cell, make_folder, write_atomically, write_json
from distillbench.errors import UserError
from distillbench.progress import reporter

if TYPE_CHECKING:
    from torch import Tensor

    from distillbench.data import Images
    from eval.records import Record

out = Console(highlight=False)


def check_extractors(benchmarks: list[config.Benchmark]) -> None:
    """UserError on a benchmark with an extractor that eval does not have, or whose weights are not there."""
    from eval.records import weight_file

    for b in benchmarks:
        for key, name in (("extractor", b.extractor), ("cross_extractor", b.cross_extractor)):
            try:
                if name is not None:
                    weight_file(name)
            except ValueError as e:
                raise UserError(f"workflows/benchmarks/{b.name}.yaml: key '{key}': {e}") from None


def known_metrics(benchmark: str) -> tuple[str, ...]:
    """What claims may name on a benchmark; UserError where there is none of that name."""
    from eval import rows

    if config.benchmark(benchmark).data.kind == "mixture":
        return rows.MIXTURES
    return tuple(m for m in (*rows.IMAGES, *rows.DERIVED) if m not in ("kid", "gap_closed"))  # those may be negative


def is_evaluated(cell: Cell) -> bool:
    """Its metrics are there, and of the current evaluation."""
    from eval import records

    return records.is_evaluated(cell.metrics, cell.benchmark.extractor, cell.benchmark.cross_extractor)


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


def stored_images(data: Images) -> Images:
    """A data set's images as they are evaluated: bytes."""
    from distillbench.data import to_bytes

    return dataclasses.replace(data, train=to_bytes(data.train), reference=to_bytes(data.reference))


def metrics_of(cell: Cell) -> dict[str, Any]:
    """The content of metrics.json: numbers that repeat byte for byte, so neither times nor paths. `eval/evaluate.py` makes them."""
    import torch

    from distillbench import data as data_sets
    from distillbench.seeds import Rng
    from eval import evaluate as evaluation

    torch.set_num_threads(1)
    b, data = cell.benchmark, data_sets.load(cell.benchmark.data)
    samples, _ = samples_of(cell)
    report = reporter(cell.label)
    report("evaluating", 0, 1)
    if isinstance(data, data_sets.Images):
        assert b.extractor is not None
        teacher, again = samples_of(cell.teacher)
        assert again is not None
        found = evaluation.image_metrics(
            stored_images(data), b.extractor, b.cross_extractor, samples, teacher, again, cell.seed,
            is_teacher=cell.arm is None, cache=config.root() / "results/runs/references",
        )  # fmt: skip
    else:
        rng = Rng(cell.seed, "exact samples")
        exact, again = (data.draw(rng, b.sampling.count)[0] for _ in range(2))
        found = evaluation.mixture_metrics(samples, exact, again, data.means, data.sigma, data.weights)
    report("evaluating", 1, 1)
    return {"format": 1, "key": cell.key} | found


def check_method(target: str) -> bool:
    """Print what `distillbench check` finds, stage by stage; whether nothing was found."""
    import time

    import torch

    from distillbench import check, registry
    from eval.mixtures import sliced_wasserstein

    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a check runs on the CPU
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    if "@" in target:
        raise UserError(f"check {target}: a method is checked with all of its variants: leave @{target.partition('@')[2]} out")
    if "/" in target or (Path(target) / "method.py").is_file():
        path = Path(target).resolve()
        if not (path / "method.py").is_file():
            raise UserError(f"check {target}: no method.py there: name a method, or the folder that holds one")
        folder = registry.read_folder(path)
    else:
        folder = registry.arm(target).folder
    start, bad = time.monotonic(), 0
    for about, findings in check.run(folder, sliced_wasserstein, known_metrics, reporter(f"check {folder.name}")):
        out.print(f"{'FAILED' if findings else 'ok    '}  {about}", soft_wrap=True, markup=False)
        for finding in findings:
            out.print(f"  {finding}", soft_wrap=True, markup=False)
        bad += len(findings)
    verdict = f"{bad} finding{'s' if bad > 1 else ''}" if bad else "keeps the contract"
    out.print(f"{folder.name}: {verdict}, {time.monotonic() - start:.0f} s", soft_wrap=True)
    return not bad


def evaluate_cells(cells: list[Cell], draws: int | None) -> None:
    """metrics.json of cells that have none of this evaluation; with `draws` draws.json instead."""
    from eval.records import is_evaluated

    for cell in cells:
        result, b = cell.result(), cell.benchmark
        path = cell.metrics if draws is None else cell.folder / "draws.json"
        if result is not None and result["status"] != "done":
            print(f"{cell.label}: {result['status']}, nothing to evaluate", file=sys.stderr)
        elif not is_evaluated(path, b.extractor, b.cross_extractor) or (draws and json.loads(path.read_text())["draws"] != draws):
            write_json(path, metrics_of(cell) if draws is None else draws_of(cell, draws))
            print(f"{cell.label}: {'evaluated' if draws is None else path}", file=sys.stderr)


def draws_of(cell: Cell, count: int) -> dict[str, Any]:
    """The content of draws.json: scores of `count` independent sets of samples of one checkpoint at its headline NFE.

    Their spread is the sampling error of that checkpoint, not the spread of training.
    """
    import torch

    from distillbench import data as data_sets
    from distillbench.build import restore
    from distillbench.train import sample as draw
    from eval import evaluate as evaluation

    torch.set_num_threads(1)
    _, again = samples_of(cell.teacher)
    samples_of(cell)  # says so if it is not there
    run, b, report = restore(cell), cell.benchmark, reporter(cell.label)
    nfe = run.needs.headline_nfe
    if not isinstance(run.data, data_sets.Images) or b.extractor is None or again is None:
        raise UserError(f"--draws: {b.name} has no images: drop it")
    sets = [draw(run, nfe, b.sampling.count, report, name=f"draw {k}") for k in range(count)]
    found = evaluation.repeated_draws(stored_images(run.data), b.extractor, b.cross_extractor, sets, again)
    return {"format": 1, "key": cell.key, "nfe": nfe, "draws": count} | found


def evaluate_path(
    path: Path, b: config.Benchmark, name: str | None, who: str | None, where: str | None, count: int | None,
    publish: bool, overwrite: bool, output: Path | None,
) -> None:  # fmt: skip
    """Score samples made elsewhere: print, write to `output`, publish. Whatever is wrong is said before anything is scored."""
    import torch

    from distillbench import data as data_sets
    from distillbench.seeds import Rng
    from eval import external
    from eval.samples import read_points, read_samples

    torch.set_num_threads(1)
    if publish and (name is None or who is None or where is None):
        raise UserError("--publish needs --name, --who and --where: a table says whose samples a row is of")
    if overwrite and not publish:
        raise UserError("--overwrite belongs to --publish: add it or drop this")
    if output is not None and (output.suffix != ".json" or not output.parent.is_dir()):
        raise UserError(f"--output: '{output}' must end in .json, in a folder that exists")
    check_extractors([b])
    name = name or path.absolute().stem
    target = config.root() / "results/external" / b.name / f"{name}.json"
    data, wanted, report = data_sets.load(b.data), count or b.sampling.count, reporter(name)
    try:
        external.check_words(name, who, where)
        if isinstance(data, data_sets.Mixture):
            samples = read_points(path, data.shape, wanted)
        else:
            assert b.extractor is not None
            external.check_count(wanted, len(data.reference))
            brightest = int(stored_images(data).reference.max())
            samples = read_samples(path, data.shape, wanted, data.classes, brightest, len(data.reference), report)
            external.check_order(samples, b.extractor)
        if publish and not overwrite:
            external.check_replaces(target, who, where, samples)
    except ValueError as e:
        raise UserError(str(e)) from None
    report("scoring", 0, 1)
    if isinstance(data, data_sets.Mixture):
        rng = Rng(b.seeds[0], "exact samples")
        exact, again = (data.draw(rng, wanted)[0] for _ in range(2))
        found = external.external_mixture_metrics(samples, exact, again, data.means, data.sigma, data.weights, b.data.fingerprint())
    else:
        assert b.extractor is not None
        found = external.external_metrics(samples, stored_images(data), b.extractor, b.cross_extractor)
    report("scoring", 1, 1)
    record = external.make_record(name, b.name, who, where, samples, found)
    progress.stop()
    print_external(record, b)
    if output is not None:
        write_json(output, record)
        print(f"{output} written", file=sys.stderr)
    if publish:
        make_folder(target.parent)
        write_json(target, record)
        tables = sorted(p.stem for p in (config.root() / "workflows/tables").glob("*.yaml"))
        there = [t for t in tables if b.name in config.table(t).benchmarks and published(t)]
        then = "".join(f"; `distillbench table {t} --render` shows it" for t in there)
        print(f"{target.relative_to(config.root())} written{then}", file=sys.stderr)


def published(table: str) -> list[Record]:
    """The published records of a table; UserError names a damaged one."""
    from eval import records

    try:
        return records.read(config.root() / "results/records" / table)
    except ValueError as e:
        raise UserError(str(e)) from None


def written(check: bool) -> tuple[Callable[[Path, bytes], None], list[str]]:
    """A writer of files, and the names of those that differed from what was there; with `check` nothing is written.

    Otherwise every file is, also an equal one: its time tells Snakemake that it is up to date.
    """
    differing: list[str] = []

    def write(path: Path, data: bytes) -> None:
        if not path.is_file() or path.read_bytes() != data:
            differing.append(path.name)
        if not check:
            make_folder(path.parent)
            write_atomically(path, data)

    return write, differing


def recorded_anatomies(records: list[Record], more: list[tuple[str, str]]) -> dict[tuple[str, str], dict[str, Any]]:
    """`anatomy` of the arms of these records that this checkout has, and of `more`, by (benchmark, arm)."""
    from distillbench import registry
    from distillbench.anatomy import anatomies

    wanted = set(more)
    for benchmark, arm in {(r.result["benchmark"], r.arm) for r in records if r.result["group"] != "teacher"}:
        with contextlib.suppress(UserError):
            wanted.add((benchmark, registry.arm(arm).name))
    return anatomies(sorted(wanted))


def of_benchmarks(records: list[Record], benchmarks: list[str]) -> list[Record]:
    """Those on one of the benchmarks."""
    return [r for r in records if r.result["benchmark"] in benchmarks]


def verdict(what: str, differing: list[str], check: bool) -> bool:
    """Say what `written` found; whether a check failed."""
    if check:
        out.print(f"{what}: " + (f"differ from their records: {', '.join(differing)}" if differing else "as rendered from their records"))
    else:
        print(f"{what} written", file=sys.stderr)
    return check and bool(differing)


def render_costs(table: config.Table, check: bool) -> list[str]:
    """A table of `kind: costs` from published records and the methods' folders; the names of files that differ from those there.

    Costs from the records of its first source, time to quality from those of the last; where that has none the first stands in,
    so that the full budget is shown. UserError where the first has none.
    """
    from eval import costs, image_scale

    write, differing = written(check)
    first, last = table.sources[0], table.sources[-1]
    found, budgets = (of_benchmarks(published(name), table.benchmarks) for name in (first, last))
    if not found:
        raise UserError(f"results/records/{first}: no published records: run `snakemake --cores all results/{first}.md`")
    sources = (first, last if budgets else first)
    anatomy, appendix = recorded_anatomies(found, []), image_scale.section(config.root() / "perf/gpu.json")
    costs.write(table.name, table.title, found, budgets or found, anatomy, sources, appendix, config.root() / "results", write)
    return differing


def render_pages(check: bool) -> list[str]:
    """docs/methods from the methods' folders and published records; the names of files that differ from those there.

    Pages are of methods in this checkout, metered costs and needs those on the benchmarks of the first table.
    """
    from distillbench import registry
    from eval import costs, method_pages
    from eval.curves import read_curves
    from eval.rows import build_rows

    write, differing = written(check)
    root, rows, curves = config.root(), [], {}
    for name in method_pages.TABLES:
        rows += [r | {"table": name} for r in build_rows(published(name))]
        try:
            curves[name] = read_curves(root / "results/records" / name)
        except ValueError as e:
            raise UserError(str(e)) from None
    benchmark, found = method_pages.BENCHMARK, of_benchmarks(published(method_pages.TABLES[0]), [method_pages.BENCHMARK])
    folders = {n: f for n, f in sorted(registry.discover().items()) if f.path.parent == root / "methods"}
    anatomy = recorded_anatomies(found, [(benchmark, name) for name in folders])
    sources = []
    for name, folder in folders.items():
        readme = folder.path / "README.md"
        tests = sorted(p.name for p in [*(root / "tests").glob(f"test_{name}.py"), *(root / "tests").glob(f"test_{name}_*.py")])
        text = readme.read_text() if readme.is_file() else ""
        sources.append(
            method_pages.Source(name, folder.file.model_dump(), text, folder.claims.model_dump(), tests, anatomy[benchmark, name])
        )
    method_pages.write(sources, rows, costs.cost_rows(found, anatomy), curves, root / "docs/methods", write)
    left = [p.name for p in sorted((root / "docs/methods").glob("*.md")) if p.stem not in (*folders, "index")]
    return differing + [f"{name} (of no method: delete it)" for name in left]


def print_external(record: dict[str, Any], b: config.Benchmark) -> None:
    """The scores, beside the fixed rows and the teacher of a published table of this evaluation; no heading is ever cut."""
    from eval import rows, tables

    names = sorted(p.name for p in (config.root() / "results/records").glob("*"))
    there = [[r for r in published(name) if r.result["benchmark"] == b.name] for name in names]
    current = [p for p in there if p and rows.differs(record, rows.protocol(p)[b.name]) is None]
    head, lines = tables.beside(current[0] if current else [], record, b.sampling.count)
    wrapped = lambda words, width: textwrap.fill(words, width, break_long_words=False)  # eight columns in a terminal's 80
    view = RichTable(box=None, pad_edge=False)
    for i, words in enumerate(head):
        view.add_column(wrapped(words, 9), justify="right" if i else "left", overflow="fold", style="bold" if i == 1 else None)
    for line in lines:
        view.add_row(wrapped(line[0], 14), *line[1:])
    out.print(view)
    about = record["evaluation"]
    words = f"{record['name']}: {record['count']} samples" + (
        "" if record["labels_sha256"] or "extractor" not in about else ", without labels"
    )
    if record["count"] != b.sampling.count:
        words += f" ({b.name} takes {b.sampling.count}: not comparable)"
    out.print(f"{words}, sha256 {record['samples_sha256']}", soft_wrap=True)
    if "extractor" in about:
        both = {about["extractor"]: about["extractor_sha256"][:12] + tables.unpublished(about)}
        if about["cross_extractor"]:
            both[about["cross_extractor"]] = about["cross_extractor_sha256"][:12]
        out.print(f"extractor {', second '.join(map(' '.join, both.items()))}, evaluation {about['key']}", soft_wrap=True)
    if not current and any(there):
        why = "published rows are of another evaluation or other data, so not beside"
        out.print(f"{why}: `snakemake --cores all results/TABLE.md` renews them", soft_wrap=True)
