"""What the command line does with samples: score those of an arm, of repeated draws, and those made elsewhere.

Beside `cli.py` the only module that may import eval.
"""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table as RichTable

from distillbench import config
from distillbench.cells import progress
from distillbench.cells.disk import make_folder, write_json
from distillbench.cells.progress import reporter
from distillbench.config import Benchmark
from distillbench.errors import UserError

if TYPE_CHECKING:
    pass
from distillbench.cli.evaluate import check_extractors, out, stored_images
from distillbench.cli.render import published


def evaluate_path(
    path: Path,
    b: Benchmark,
    name: str | None,
    who: str | None,
    where: str | None,
    count: int | None,
    publish: bool,
    overwrite: bool,
    output: Path | None,
) -> None:
    """Score samples made elsewhere: print, write to `output`, publish. Whatever is wrong is said before anything is scored."""
    import torch

    from distillbench.data import kinds
    from distillbench.data.mixture import Mixture
    from distillbench.seeds import Rng
    from eval.report import external
    from eval.samples import read_points, read_samples

    torch.set_num_threads(1)
    if publish and (name is None or who is None or where is None):
        raise UserError(
            "--publish needs --name, --who and --where: a table says whose samples a row is of"
        )
    if overwrite and not publish:
        raise UserError("--overwrite belongs to --publish: add it or drop this")
    if output is not None and (output.suffix != ".json" or not output.parent.is_dir()):
        raise UserError(f"--output: '{output}' must end in .json, in a folder that exists")
    check_extractors([b])
    name = name or path.absolute().stem
    target = config.root() / "results/external" / b.name / f"{name}.json"
    data, wanted, report = kinds.load(b.data), count or b.sampling.count, reporter(name)
    try:
        external.check_words(name, who, where)
        if isinstance(data, Mixture):
            samples = read_points(path, data.shape, wanted)
        else:
            assert b.extractor is not None
            external.check_count(wanted, len(data.reference))
            brightest = int(stored_images(data).reference.max())
            samples = read_samples(
                path, data.shape, wanted, data.classes, brightest, len(data.reference), report
            )
            external.check_order(samples, b.extractor)
        if publish and not overwrite:
            external.check_replaces(target, who, where, samples)
    except ValueError as e:
        raise UserError(str(e)) from None
    report("scoring", 0, 1)
    if isinstance(data, Mixture):
        rng = Rng(b.seeds[0], "exact samples")
        exact, again = (data.draw(rng, wanted)[0] for _ in range(2))
        found = external.external_mixture_metrics(
            samples, exact, again, data.means, data.sigma, data.weights, b.data.fingerprint()
        )
    else:
        assert b.extractor is not None
        found = external.external_metrics(
            samples, stored_images(data), b.extractor, b.cross_extractor
        )
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


def print_external(record: dict[str, Any], b: Benchmark) -> None:
    """The scores, beside the fixed rows and the teacher of a published table of this evaluation; no heading is ever cut."""
    from eval.report import rows, tables

    names = sorted(p.name for p in (config.root() / "results/records").glob("*"))
    there = [[r for r in published(name) if r.result["benchmark"] == b.name] for name in names]
    current = [p for p in there if p and rows.differs(record, rows.protocol(p)[b.name]) is None]
    head, lines = tables.beside(current[0] if current else [], record, b.sampling.count)
    wrapped = lambda words, width: textwrap.fill(
        words, width, break_long_words=False
    )  # eight columns in a terminal's 80
    view = RichTable(box=None, pad_edge=False)
    for i, words in enumerate(head):
        view.add_column(
            wrapped(words, 9),
            justify="right" if i else "left",
            overflow="fold",
            style="bold" if i == 1 else None,
        )
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
        out.print(
            f"extractor {', second '.join(map(' '.join, both.items()))}, evaluation {about['key']}",
            soft_wrap=True,
        )
    if not current and any(there):
        why = "published rows are of another evaluation or other data, so not beside"
        out.print(f"{why}: `snakemake --cores all results/TABLE.md` renews them", soft_wrap=True)
