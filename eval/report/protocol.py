"""The measured tables of docs/protocol.md, which `python -m eval.report.protocol` writes anew.

Each stands between `<!-- its name -->` and `<!-- end -->`; the words around it stay. Three come
from the digits themselves, two from published records: the spread of training from those of the
audit and of table 2, the sampling error from table 2's repeated draws of one checkpoint. The same
code and records give the same bytes.

Repeated draws are results/records/table2/<benchmark>/<arm>/seed<k>/draws.json, of which are read

    nfe      network evaluations per sample
    rows     scores of each set of samples, drawn from noise of its own, as in metrics.json
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tabulate import tabulate
from torch import Tensor

from eval.catalogue import METRICS
from eval.features.extractors import load_extractor
from eval.features.train_digits_extractor import alternate, digits_u8
from eval.metrics.evaluate import Against, evaluate_images, fixed_rows, floor
from eval.metrics.fixed_rows import FAILURES, GENERATORS
from eval.report import records
from eval.report.records import Record
from eval.report.rows import Row, build_rows, summarise
from eval.report.table3 import SHARE

ROOT = Path(__file__).parents[2]
# As in workflows/benchmarks/digits.yaml.
BENCHMARK = "digits"
EXTRACTOR = "digits-gelu-64"
CROSS_EXTRACTOR = "digits-simclr-64"
SAMPLES = 20_000
SPLITS = 40
AUDIT = "audit"  # ten seeds of every method, at a share of the budget
TABLE = "table2"  # three seeds at the full budget, and repeated draws
TABLES = ("trivial generators", "in floors", "noise floor", "spread of training", "sampling error")
# Of image benchmarks and mixtures; what a table has no value of is left out.
COLUMNS = {metric.name: (metric.column, metric.scale, metric.digits) for metric in METRICS}
HIGHER = {metric.name for metric in METRICS if metric.direction == "higher"}
LEAST_SD = 1 / 896  # of a floor: one held-out image

Scored = dict[str, Any]  # a row of metrics.json: `name`, and a value or None per score
# (extractor, whether classes are halved each) of the columns of the noise floor.
KINDS = [
    (EXTRACTOR, True),
    (EXTRACTOR, False),
    (CROSS_EXTRACTOR, True),
    (CROSS_EXTRACTOR, False),
]


@dataclass(frozen=True)
class Digits:
    """A split of the digits: an `eval.metrics.evaluate.ImageData`.

    Images are uint8 [N, 1, 8, 8], labels int64 [N].
    """

    train: Tensor
    train_labels: Tensor
    reference: Tensor
    reference_labels: Tensor
    classes: int = 10

    @classmethod
    def split(cls, train: Tensor | None = None) -> Digits:
        """The digits split by a mask bool [1797] of the training half, the benchmark's if None."""
        images, labels = digits_u8()
        first = alternate(labels) if train is None else train
        return cls(images[first], labels[first], images[~first], labels[~first])


def random_half(labels: Tensor, rng: np.random.Generator, stratified: bool) -> Tensor:
    """A mask bool [N] of half of all rows, or of half of every class.

    Of classes of an odd number every other one has one row more than it leaves.
    """
    groups = [np.arange(len(labels))]
    if stratified:
        groups = [np.flatnonzero(labels == c) for c in labels.unique()]
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for i, group in enumerate(groups):
        count = (len(group) + i % 2) // 2
        chosen[rng.permutation(group)[:count]] = True
    return chosen


def scored_generators(count: int = SAMPLES, seed: int = 0) -> list[Scored]:
    """Scores of the trivial generators; the floor and a copy of the held-out half as they are."""
    data = Digits.split()
    against = Against.of(data, EXTRACTOR, CROSS_EXTRACTOR)
    rows = fixed_rows(data, against, count, seed, GENERATORS + FAILURES)
    copy = {"name": "copy"} | evaluate_images(data.reference, data.reference_labels, against)
    return [rows[0], copy, *rows[1:]]


def scored_halves(splits: int = SPLITS) -> list[list[Scored]]:
    """Scores of half of the digits against the rest, over random splits, per column of KINDS."""
    labels = digits_u8()[1]
    out = []
    for extractor, stratified in KINDS:
        column = []
        for seed in range(splits):
            half = random_half(labels, np.random.default_rng([seed, stratified]), stratified)
            data = Digits.split(half)
            column.append(floor(data, Against.of(data, extractor, None)))
        out.append(column)
    return out


def generators_table(rows: list[Scored], count: int = SAMPLES) -> str:
    """The rows of `scored_generators` as a table with its caption."""
    shown = shown_of(rows)
    lines = []
    for row in rows:
        values = [_value(row[m], m) for m in shown]
        lines.append([_words(row["name"]), *values])
    caption = (
        f"{count:,} images each, classes in turn; the floor (training half) and the copy (held-out "
        f"half) as they are. Features of {_named(EXTRACTOR)}, for the second FID of "
        f"{_named(CROSS_EXTRACTOR)}."
    )
    return _table(["generator", *_heads(shown)], lines) + f"\n\n{caption}"


def verdicts(rows: list[Scored], halves: list[list[Scored]]) -> str:
    """Sds of the floor (halves by class) by which each generator is worse than the floor's mean."""
    main = halves[KINDS.index((EXTRACTOR, True))]
    cross = halves[KINDS.index((CROSS_EXTRACTOR, True))]
    shown = shown_of(rows)
    lines = [[_words(row["name"])] for row in rows]
    for m in shown:
        values = [row["fid"] for row in cross]
        if m != "fid_cross":
            values = [row[m] for row in main]
        mean = float(np.mean(values))
        sd = max(float(np.std(values, ddof=1)), LEAST_SD)
        sign = -1 if m in HIGHER else 1
        for line, row in zip(lines, rows):
            line.append(_marked(round((row[m] - mean) / sd * sign)))
    head = ["generator"]
    for heading in _heads(shown):
        name = heading
        for arrow in ("↑", "↓", "→"):
            name = name.partition(f" {arrow}")[0]
        head.append(name)
    return _table(head, lines)


def _marked(worse: int) -> str:
    """Bold from 4 sds worse than the floor, slanted from 4 better, cut off beyond 99."""
    text = str(worse)
    if abs(worse) >= 100:
        text = ">99" if worse > 0 else "<-99"
    if worse > 3:
        return f"**{text}**"
    if worse < -3:
        return f"*{text}*"
    return text


def floor_table(halves: list[list[Scored]]) -> str:
    """The columns of `scored_halves` as a table, mean ± sd over halves."""
    lines = []
    for m in shown_of([column[0] for column in halves]):
        spreads = [_spread([row[m] for row in column], m) for column in halves]
        lines.append([COLUMNS[m][0], *spreads])
    head = ["score"]
    for extractor, stratified in KINDS:
        head.append(f"{extractor}, {'by class' if stratified else 'at random'}")
    caption = (
        f"Mean ± sd over {len(halves[0])} random halves, drawn within every class or from all "
        "digits."
    )
    return _table(head, lines) + f"\n\n{caption}"


def spread_of_training(sources: Sequence[list[Record]]) -> str:
    """sd / mean over training seeds of teachers, and of methods by default at their headline NFE.

    A line per arm of each source, that is, of each table's records on an image benchmark.
    """
    rows: list[Row] = []
    for source in sources:
        rows += filter(_has_spread, build_rows(source))
    if not rows:
        return "No arm with several seeds is published."
    rows.sort(key=_order)
    means = [{m: row.get(f"{m}_mean") for m in COLUMNS} for row in rows]
    shown = [m for m in shown_of(means) if m != "gap_closed"]
    lines = []
    for row in rows:
        share = "" if row["group"] == "teacher" else f"{_share(row):g}"
        spreads = [_percent(row.get(f"{m}_mean"), row.get(f"{m}_sd")) for m in shown]
        lines.append([row["method"], share, str(row["nfe"]), str(row["seeds"]), *spreads])
    head = ["arm", "of the budget", "NFE", "seeds", *_heads(shown)]
    return _table(head, lines) + "\n\nSample sd over seeds, in % of the mean."


def _has_spread(row: Row) -> bool:
    """Whether a row is of several seeds of a teacher, or of a method by default."""
    if row["group"] == "reference" or row.get("fid_sd") is None:
        return False
    by_default = row["variant"] is None or SHARE.fullmatch(row["variant"]) is not None
    return row["group"] == "teacher" or (row["headline"] and by_default)


def _order(row: Row) -> tuple[bool, str, float]:
    """Teachers first, then by method and budget."""
    return row["group"] != "teacher", row["method"], _share(row)


def _share(row: Row) -> float:
    """The share of the budget that the arm of a row was given."""
    return float(row["variant"][1:]) if row["variant"] else 1.0


def sampling_error(folder: Path) -> str:
    """sd / mean over repeated draws of one checkpoint, for every draws.json under `folder`."""
    paths = sorted(folder.glob("*/*/seed*/draws.json"))
    if not paths:
        return "No repeated draws are published."
    found = list(map(records.read_json, paths))
    shown = shown_of([row for draws in found for row in draws["rows"]])
    lines = []
    for path, draws in zip(paths, found):
        cell = path.parent
        rows = draws["rows"]
        line = [cell.parent.name, cell.name, str(draws["nfe"]), str(len(rows))]
        for m in shown:
            mean, sd = summarise(row.get(m) for row in rows)
            line.append(_percent(mean, sd))
        lines.append(line)
    caption = (
        "Sampling error of one checkpoint, not the spread of training: sample sd over draws, in % "
        "of the mean."
    )
    return _table(["arm", "checkpoint", "NFE", "draws", *_heads(shown)], lines) + f"\n\n{caption}"


def shown_of(rows: list[Scored]) -> list[str]:
    """The scores, in the order of tables, that some row has."""
    return [m for m in COLUMNS if any(row.get(m) is not None for row in rows)]


def fill(page: str, name: str, content: str) -> str:
    """The page with `content` between the marker of this name and the next end.

    Raises ValueError unless there is exactly one of the two.
    """
    start = f"<!-- {name} -->"
    end = "<!-- end -->"
    before, found, rest = page.partition(start)
    old, ended, after = rest.partition(end)
    if not (found and ended) or start in rest or "<!--" in old:
        raise ValueError(f"the page needs one '{start}', followed by '{end}'")
    return f"{before}{start}\n{content}\n{end}{after}"


def _heads(shown: Iterable[str]) -> list[str]:
    """Their headings in tables."""
    return [COLUMNS[m][0] for m in shown]


def _words(name: str) -> str:
    """The name of a generator as it is printed."""
    return name.replace("_", " ")


def _value(value: float | None, metric: str, more: int = 0) -> str:
    """A score with the digits that tables give it, and `more`; no minus before a zero."""
    if value is None:
        return "–"
    _, scale, digits = COLUMNS[metric]
    zero = f"{0:.{digits + more}f}"
    return f"{value * scale:.{digits + more}f}".replace(f"-{zero}", zero)


def _spread(values: list[float | None], metric: str) -> str:
    """mean ± sd, with a digit more than in tables."""
    mean, sd = summarise(values)
    if mean is None:
        return "–"
    return f"{_value(mean, metric, 1)} ± {_value(sd, metric, 1)}"


def _percent(mean: float | None, sd: float | None) -> str:
    """sd in % of the mean, with two digits; a dash where that says nothing."""
    if mean is None or sd is None or mean <= 0:
        return "–"
    return f"{100 * sd / mean:.2g}"


def _named(extractor: str) -> str:
    """An extractor with the first digits of its hash."""
    return f"{extractor} ({load_extractor(extractor).sha256[:12]})"


def _table(head: list[str], lines: list[list[str]]) -> str:
    """A table of Markdown."""
    return tabulate(lines, head, "github", disable_numparse=True)


def update(page: Path, folder: Path) -> None:
    """Measure everything, with the records of the tables in `folder`, and replace the page.

    All or nothing; ValueError where records or markers are missing.
    """
    sources = []
    for name in (AUDIT, TABLE):
        published = records.read(folder / name)
        if not published:
            raise ValueError(f"{folder / name}: no published records: take them from git")
        sources.append([r for r in published if r.result["benchmark"] == BENCHMARK])
    text = page.read_text(encoding="utf-8")
    for name in TABLES:
        fill(text, name, "")  # a page without markers is refused before it is measured
    rows = scored_generators()
    halves = scored_halves()
    contents = (
        generators_table(rows),
        verdicts(rows, halves),
        floor_table(halves),
        spread_of_training(sources),
        sampling_error(folder / TABLE),
    )
    for name, content in zip(TABLES, contents, strict=True):
        text = fill(text, name, content)
    with tempfile.NamedTemporaryFile("w", dir=page.parent, delete=False, encoding="utf-8") as file:
        file.write(text)
    os.chmod(file.name, 0o644)
    os.replace(file.name, page)


def main() -> None:
    """The command line, which takes no arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.report.protocol",
        description="Measure the tables of docs/protocol.md anew.",
    )
    parser.parse_args()
    torch.set_num_threads(1)
    try:
        update(ROOT / "docs/protocol.md", ROOT / "results/records")
    except (ValueError, OSError) as e:
        sys.exit(f"eval.report.protocol: {e}")


if __name__ == "__main__":
    main()
