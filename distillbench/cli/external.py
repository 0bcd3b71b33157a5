"""Samples made elsewhere, for `distillbench evaluate PATH`: read, scored, shown beside published
rows, published themselves."""

from __future__ import annotations

import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table as RichTable

from distillbench import config
from distillbench.cells import progress
from distillbench.cells.disk import make_folder, write_json
from distillbench.cells.progress import Report, reporter
from distillbench.cli.extractors import check_extractors, stored_images
from distillbench.cli.options import known_tables, out
from distillbench.cli.render import published
from distillbench.config import Benchmark
from distillbench.errors import UserError

if TYPE_CHECKING:
    from distillbench.data.images import Images
    from distillbench.data.mixture import Mixture
    from eval.report.records import Record
    from eval.samples import Samples


@dataclass(frozen=True)
class External:
    """Samples made elsewhere, as the command line describes them."""

    path: Path
    name: str | None  # of the row; of the file if left out
    who: str | None
    where: str | None
    count: int | None  # the benchmark's if left out

    @property
    def label(self) -> str:
        """Name of the row."""
        return self.name or self.path.absolute().stem


def score_external(
    external: External, b: Benchmark, publish: bool, overwrite: bool, output: Path | None
) -> None:
    """Score samples made elsewhere: print the scores, write them to `output`, publish them.

    Raises UserError, on whatever is wrong, before anything is scored.
    """
    import torch

    from distillbench.data import kinds
    from eval.report.external import make_record

    torch.set_num_threads(1)
    check_options(external, publish, overwrite, output)
    check_extractors([b])
    target = config.root() / "results/external" / b.name / f"{external.label}.json"
    data = kinds.load(b.data)
    report = reporter(external.label)
    samples = read_samples(external, b, data, report, target if publish and not overwrite else None)
    report("scoring", 0, 1)
    found = scores(samples, b, data)
    report("scoring", 1, 1)
    record = make_record(external.label, b.name, external.who, external.where, samples, found)
    progress.stop()
    print_record(record, b)
    if output is not None:
        write_json(output, record)
        print(f"{output} written", file=sys.stderr)
    if publish:
        make_folder(target.parent)
        write_json(target, record)
        shown = "".join(f"; `distillbench table {name} --render` shows it" for name in tables_of(b))
        print(f"{target.relative_to(config.root())} written{shown}", file=sys.stderr)


def check_options(external: External, publish: bool, overwrite: bool, output: Path | None) -> None:
    """UserError on options that do not go together."""
    if publish and None in (external.name, external.who, external.where):
        raise UserError(
            "--publish needs --name, --who and --where: a table says whose samples a row is of"
        )
    if overwrite and not publish:
        raise UserError("--overwrite belongs to --publish: add it or drop this")
    if output is not None and (output.suffix != ".json" or not output.parent.is_dir()):
        raise UserError(f"--output: '{output}' must end in .json, in a folder that exists")


def read_samples(
    external: External,
    b: Benchmark,
    data: Images | Mixture,
    report: Report,
    target: Path | None,
) -> Samples:
    """The samples, as many and in the form that the benchmark evaluates; UserError where they
    differ.

    target: where their record will be published, unless it may replace any that is there.
    """
    from distillbench.data.images import Images
    from eval import samples as readers
    from eval.report.external import check_count, check_order, check_replaces, check_words

    wanted = external.count or b.sampling.count
    try:
        check_words(external.label, external.who, external.where)
        if isinstance(data, Images):
            assert b.extractor is not None
            held_out = len(data.reference)
            check_count(wanted, held_out)
            brightest = int(stored_images(data).reference.max())
            samples = readers.read_samples(
                external.path, data.shape, wanted, data.classes, brightest, held_out, report
            )
            check_order(samples, b.extractor)
        else:
            samples = readers.read_points(external.path, data.shape, wanted)
        if target is not None:
            check_replaces(target, external.who, external.where, samples)
    except ValueError as e:
        raise UserError(str(e)) from None
    return samples


def scores(samples: Samples, b: Benchmark, data: Images | Mixture) -> dict[str, Any]:
    """`evaluation` and `row` of the record of samples."""
    from distillbench.data.images import Images
    from distillbench.seeds import Rng
    from eval.report.external import external_metrics, external_mixture_metrics

    if isinstance(data, Images):
        assert b.extractor is not None
        return external_metrics(samples, stored_images(data), b.extractor, b.cross_extractor)
    rng = Rng(b.seeds[0], "exact samples")
    count = len(samples.images)
    exact, _ = data.draw(rng, count)
    second_exact, _ = data.draw(rng, count)
    fingerprint = b.data.fingerprint()
    return external_mixture_metrics(
        samples, exact, second_exact, data.means, data.sigma, data.weights, fingerprint
    )


def tables_of(b: Benchmark) -> list[str]:
    """Published tables with this benchmark."""
    return [
        name
        for name in known_tables()
        if b.name in config.table(name).benchmarks and published(name)
    ]


def print_record(record: dict[str, Any], b: Benchmark) -> None:
    """Print the scores beside the fixed rows and the teacher of a published table of this
    evaluation, and what was scored by which extractors."""
    from eval.report import rows, tables

    published_rows = []  # of this benchmark, by table
    for folder in sorted((config.root() / "results/records").glob("*")):
        own = [r for r in published(folder.name) if r.result["benchmark"] == b.name]
        if own:
            published_rows.append(own)
    comparable = []
    for own in published_rows:
        if rows.differs(record, rows.protocol(own)[b.name]) is None:
            comparable.append(own)
    # The fixed rows are scored with a teacher, and an audit publishes none.
    beside = max(comparable, key=teachers_in, default=[])
    head, lines = tables.beside(beside, record, b.sampling.count)
    out.print(score_table(head, lines))
    out.print(samples_line(record, b), soft_wrap=True)
    about = record["evaluation"]
    if "extractor" in about:
        used = f"{about['extractor']} {about['extractor_sha256'][:12]}{tables.unpublished(about)}"
        if about["cross_extractor"]:
            used += f", second {about['cross_extractor']} {about['cross_extractor_sha256'][:12]}"
        out.print(f"extractor {used}, evaluation {about['key']}", soft_wrap=True)
    if published_rows and not comparable:
        why = "published rows are of another evaluation or other data, so not beside"
        out.print(f"{why}: `snakemake --cores all results/TABLE.md` renews them", soft_wrap=True)


def teachers_in(published_rows: list[Record]) -> int:
    """Number of teachers, one a seed, among published records."""
    return sum(record.group == "teacher" for record in published_rows)


def score_table(head: list[str], lines: list[list[str]]) -> RichTable:
    """A table of eight columns for a terminal of 80: headings are wrapped, none is cut."""

    def wrapped(words: str, width: int) -> str:
        return textwrap.fill(words, width, break_long_words=False)

    view = RichTable(box=None, pad_edge=False)
    metric, first, *others = [wrapped(words, 9) for words in head]
    view.add_column(metric, justify="left", overflow="fold")
    view.add_column(first, justify="right", overflow="fold", style="bold")
    for name in others:
        view.add_column(name, justify="right", overflow="fold")
    for metric, *values in lines:
        view.add_row(wrapped(metric, 14), *values)
    return view


def samples_line(record: dict[str, Any], b: Benchmark) -> str:
    """Which samples were scored: name, number, hash, and whether the number is the benchmark's."""
    words = f"{record['name']}: {record['count']} samples"
    if "extractor" in record["evaluation"] and not record["labels_sha256"]:
        words += ", without labels"
    if record["count"] != b.sampling.count:
        words += f" ({b.name} takes {b.sampling.count}: not comparable)"
    return f"{words}, sha256 {record['samples_sha256']}"
