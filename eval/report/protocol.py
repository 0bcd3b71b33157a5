"""Measures the tables inside docs/protocol.md and writes them there: `python -m eval.protocol [TABLE]`.

Each stands between `<!-- its name -->` and `<!-- end -->`; the words around it are left as they are. Three come from the digits
themselves, two from the records of TABLE (with several seeds) under results/records. The same code and records give the same
bytes.

Repeated draws of one checkpoint are results/records/<TABLE>/<benchmark>/<arm>/seed<k>/draws.json, of which are read

    nfe      network evaluations per sample
    rows     scores of each set of samples, drawn from noise of its own, as in the rows of metrics.json
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterable
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
from eval.report.rows import build_rows, summarise

ROOT = Path(__file__).parents[2]
EXTRACTOR, CROSS_EXTRACTOR = (
    "digits-gelu-64",
    "digits-simclr-64",
)  # as in workflows/benchmarks/digits.yaml
SAMPLES, SPLITS = 20_000, 40
# of image benchmarks and mixtures; what a table has no value of is left out
COLUMNS = {m.name: (m.column, m.scale, m.digits) for m in METRICS}
TABLES = ("trivial generators", "in floors", "noise floor", "spread of training", "sampling error")
Scored = dict[str, Any]
KINDS = [
    (e, stratified) for e in (EXTRACTOR, CROSS_EXTRACTOR) for stratified in (True, False)
]  # of random halves
HIGHER = {m.name for m in METRICS if m.direction == "higher"}  # is better
LEAST_SD = 1 / 896  # of a floor: one held-out image


@dataclass(frozen=True)
class Digits:
    """A split of the digits: an `eval.evaluate.ImageData`."""

    train: Tensor
    train_labels: Tensor
    reference: Tensor
    reference_labels: Tensor
    classes: int = 10

    @classmethod
    def split(cls, train: Tensor | None = None) -> Digits:
        """By a mask bool [1797] of the training half; that of the benchmark if left out."""
        images, labels = digits_u8()
        first = alternate(labels) if train is None else train
        return cls(images[first], labels[first], images[~first], labels[~first])


def random_half(labels: Tensor, rng: np.random.Generator, stratified: bool) -> Tensor:
    """bool [N]: half of all rows, or half of every class."""
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    groups = (
        [np.flatnonzero(labels == c) for c in labels.unique()]
        if stratified
        else [np.arange(len(labels))]
    )
    for i, group in enumerate(groups):
        chosen[rng.permutation(group)[: (len(group) + i % 2) // 2]] = (
            True  # odd numbers: one more here, one less there
        )
    return chosen


def scored_generators(count: int = SAMPLES, seed: int = 0) -> list[Scored]:
    """Every trivial generator under every score; the floor and the copy of the held-out half as they are."""
    data = Digits.split()
    against = Against.of(data, EXTRACTOR, CROSS_EXTRACTOR)
    rows = fixed_rows(data, against, count, seed, GENERATORS + FAILURES)
    return [
        rows[0],
        {"name": "copy", **evaluate_images(data.reference, data.reference_labels, against)},
        *rows[1:],
    ]


def scored_halves(splits: int = SPLITS) -> list[list[Scored]]:
    """What one half of the digits scores against the other, over random splits; a list per column of `KINDS`."""
    labels, out = digits_u8()[1], []
    for extractor, stratified in KINDS:
        halves = (
            random_half(labels, np.random.default_rng([seed, stratified]), stratified)
            for seed in range(splits)
        )
        out.append(
            [floor(data, Against.of(data, extractor, None)) for data in map(Digits.split, halves)]
        )
    return out


def generators_table(rows: list[Scored], count: int = SAMPLES) -> str:
    """The rows of `scored_generators`."""
    shown = shown_of(rows)
    lines = [[_words(row["name"]), *(_value(row[m], m) for m in shown)] for row in rows]
    caption = (
        f"{count:,} images each, classes in turn; the floor (training half) and the copy (held-out half) as they are. Features of "
        f"{_named(EXTRACTOR)}, for the second FID of {_named(CROSS_EXTRACTOR)}."
    )
    return _table(["generator", *_heads(shown)], lines) + f"\n\n{caption}"


def verdicts(rows: list[Scored], halves: list[list[Scored]]) -> str:
    """How many sds of the floor (halves by class) each generator is worse than the floor's mean, per score."""
    main, cross = (halves[KINDS.index((e, True))] for e in (EXTRACTOR, CROSS_EXTRACTOR))
    shown, lines = shown_of(rows), [[_words(row["name"])] for row in rows]
    for m in shown:
        found = [row["fid"] for row in cross] if m == "fid_cross" else [row[m] for row in main]
        mean, sd = float(np.mean(found)), max(float(np.std(found, ddof=1)), LEAST_SD)
        for line, row in zip(lines, rows):
            worse = round((row[m] - mean) / sd * (-1 if m in HIGHER else 1))
            text = str(worse) if abs(worse) < 100 else ">99" if worse > 0 else "<-99"
            line.append(f"**{text}**" if worse > 3 else f"*{text}*" if worse < -3 else text)
    return _table(
        ["generator", *(COLUMNS[m][0].split(" ↑")[0].split(" ↓")[0].split(" →")[0] for m in shown)],
        lines,
    )


def floor_table(halves: list[list[Scored]]) -> str:
    """The columns of `scored_halves`."""
    shown = shown_of([column[0] for column in halves])
    lines = [
        [COLUMNS[m][0], *(_spread([row[m] for row in column], m) for column in halves)]
        for m in shown
    ]
    head = [
        "score",
        *(
            f"{extractor}, {'by class' if stratified else 'at random'}"
            for extractor, stratified in KINDS
        ),
    ]
    return (
        _table(head, lines)
        + f"\n\nMean ± sd over {len(halves[0])} random halves, drawn within every class or from all digits."
    )


def spread_of_training(published: list[Record]) -> str:
    """sd / mean over training seeds, per arm and NFE of image benchmarks."""
    rows = [
        r
        for r in build_rows(published)
        if r["group"] != "reference" and r.get("fid_sd") is not None
    ]
    if not rows:
        return "No arm with several seeds is published."
    means = [{m: r.get(f"{m}_mean") for m in COLUMNS} for r in rows]
    shown = [m for m in shown_of(means) if m != "gap_closed"]
    names = [f"{r['method']}{'@' + r['variant'] if r['variant'] else ''}" for r in rows]
    lines = [
        [
            name,
            str(r["nfe"]),
            str(r["seeds"]),
            *(_percent(r.get(f"{m}_mean"), r.get(f"{m}_sd")) for m in shown),
        ]
        for name, r in zip(names, rows)
    ]
    return (
        _table(["arm", "NFE", "seeds", *_heads(shown)], lines)
        + "\n\nSample sd over seeds, in % of the mean."
    )


def sampling_error(folder: Path) -> str:
    """sd / mean over repeated draws of one checkpoint, for every draws.json under `folder`."""
    found = [
        (path.parent, json.loads(path.read_text()))
        for path in sorted(folder.glob("*/*/seed*/draws.json"))
    ]
    if not found:
        return "No repeated draws are published."
    shown = shown_of([row for _, draws in found for row in draws["rows"]])
    lines = []
    for cell, draws in found:
        over = {m: summarise(row.get(m) for row in draws["rows"]) for m in shown}
        lines.append(
            [
                cell.parent.name,
                cell.name,
                str(draws["nfe"]),
                str(len(draws["rows"])),
                *(_percent(*over[m]) for m in shown),
            ]
        )
    caption = "Sampling error of one checkpoint, not the spread of training: sample sd over draws, in % of the mean."
    return _table(["arm", "checkpoint", "NFE", "draws", *_heads(shown)], lines) + f"\n\n{caption}"


def shown_of(rows: list[Scored]) -> list[str]:
    """The scores, in the order of tables, that some row has."""
    return [m for m in COLUMNS if any(row.get(m) is not None for row in rows)]


def fill(page: str, name: str, content: str) -> str:
    """The page with `content` between the marker of this name and the next end; ValueError unless there is exactly one."""
    start, end = f"<!-- {name} -->", "<!-- end -->"
    before, found, rest = page.partition(start)
    old, ended, after = rest.partition(end)
    if not (found and ended) or start in rest or "<!--" in old:
        raise ValueError(f"the page needs one '{start}', followed by '{end}'")
    return f"{before}{start}\n{content}\n{end}{after}"


def _heads(shown: Iterable[str]) -> list[str]:
    return [COLUMNS[m][0] for m in shown]


def _words(name: str) -> str:
    return name.replace("_", " ")


def _value(value: float | None, metric: str, more: int = 0) -> str:
    _, scale, digits = COLUMNS[metric]
    zero = f"{0:.{digits + more}f}"
    return "–" if value is None else f"{value * scale:.{digits + more}f}".replace(f"-{zero}", zero)


def _spread(values: list[float | None], metric: str) -> str:
    mean, sd = summarise(values)
    return "–" if mean is None else f"{_value(mean, metric, 1)} ± {_value(sd, metric, 1)}"


def _percent(mean: float | None, sd: float | None) -> str:
    return "–" if mean is None or sd is None or mean <= 0 else f"{100 * sd / mean:.2g}"


def _named(extractor: str) -> str:
    return f"{extractor} ({load_extractor(extractor).sha256[:12]})"


def _table(head: list[str], lines: list[list[str]]) -> str:
    return tabulate(lines, head, "github", disable_numparse=True)


def update(page: Path, folder: Path) -> None:
    """Measure everything and replace the page, all or nothing; ValueError where records or markers are missing."""
    published = records.read(folder)
    if not published:
        raise ValueError(
            f"{folder}: no published records: name a table that has them, `python -m eval.protocol TABLE`"
        )
    text = page.read_text()
    for name in TABLES:
        fill(text, name, "")  # a page without markers is refused before it is measured
    rows, halves = scored_generators(), scored_halves()
    contents = (
        generators_table(rows),
        verdicts(rows, halves),
        floor_table(halves),
        spread_of_training(published),
        sampling_error(folder),
    )
    for name, content in zip(TABLES, contents, strict=True):
        text = fill(text, name, content)
    with tempfile.NamedTemporaryFile("w", dir=page.parent, delete=False) as file:
        file.write(text)
    os.chmod(file.name, 0o644)
    os.replace(file.name, page)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m eval.protocol", description="Measure the tables of docs/protocol.md anew."
    )
    parser.add_argument(
        "table",
        nargs="?",
        default="pilot",
        help="a published table with several seeds (default: pilot)",
    )
    torch.set_num_threads(1)
    try:
        update(ROOT / "docs/protocol.md", ROOT / "results/records" / parser.parse_args().table)
    except (ValueError, OSError) as e:
        sys.exit(f"eval.protocol: {e}")


if __name__ == "__main__":
    main()
