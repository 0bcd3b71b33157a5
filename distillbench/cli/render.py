"""What the command line does with samples: score those of an arm, of repeated draws, and those made elsewhere.

Beside `cli.py` the only module that may import eval.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distillbench import config
from distillbench.cells.disk import make_folder, write_atomically
from distillbench.config import Table
from distillbench.errors import UserError

if TYPE_CHECKING:
    from eval.report.records import Record
from distillbench.cli.evaluate import out


def published(table: str) -> list[Record]:
    """The published records of a table; UserError names a damaged one."""
    from eval.report import records

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


def recorded_anatomies(
    records: list[Record], more: list[tuple[str, str]]
) -> dict[tuple[str, str], dict[str, Any]]:
    """`anatomy` of the arms of these records that this checkout has, and of `more`, by (benchmark, arm)."""
    from distillbench.conformance.anatomies import anatomies
    from distillbench.registry import folders

    wanted = set(more)
    for benchmark, arm in {
        (r.result["benchmark"], r.arm) for r in records if r.result["group"] != "teacher"
    }:
        with contextlib.suppress(UserError):
            wanted.add((benchmark, folders.arm(arm).name))
    return anatomies(sorted(wanted))


def of_benchmarks(records: list[Record], benchmarks: list[str]) -> list[Record]:
    """Those on one of the benchmarks."""
    return [r for r in records if r.result["benchmark"] in benchmarks]


def verdict(what: str, differing: list[str], check: bool) -> bool:
    """Say what `written` found; whether a check failed."""
    if check:
        out.print(
            f"{what}: "
            + (
                f"differ from their records: {', '.join(differing)}"
                if differing
                else "as rendered from their records"
            )
        )
    else:
        print(f"{what} written", file=sys.stderr)
    return check and bool(differing)


def render_costs(table: Table, check: bool) -> list[str]:
    """A table of `kind: costs` from published records and the methods' folders; the names of files that differ from those there.

    Costs from the records of its first source, time to quality from those of the last; where that has none the first stands in,
    so that the full budget is shown. UserError where the first has none.
    """
    from eval.report import costs, gpu

    write, differing = written(check)
    first, last = table.sources[0], table.sources[-1]
    found, budgets = (of_benchmarks(published(name), table.benchmarks) for name in (first, last))
    if not found:
        raise UserError(
            f"results/records/{first}: no published records: run `snakemake --cores all results/{first}.md`"
        )
    sources = (first, last if budgets else first)
    anatomy, appendix = recorded_anatomies(found, []), gpu.section(config.root() / "perf/gpu.json")
    costs.write(
        table.name,
        table.title,
        found,
        budgets or found,
        anatomy,
        sources,
        appendix,
        config.root() / "results",
        write,
    )
    return differing


def render_pages(check: bool) -> list[str]:
    """docs/methods from the methods' folders and published records; the names of files that differ from those there.

    Pages are of methods in this checkout, metered costs and needs those on the benchmarks of the first table.
    """
    from distillbench.registry import folders
    from eval.report import costs, method_pages
    from eval.report.curves import read_curves
    from eval.report.method_pages import BENCHMARK, TABLES, Source
    from eval.report.rows import build_rows

    write, differing = written(check)
    root, rows, curves = config.root(), [], {}
    for name in TABLES:
        rows += [r | {"table": name} for r in build_rows(published(name))]
        try:
            curves[name] = read_curves(root / "results/records" / name)
        except ValueError as e:
            raise UserError(str(e)) from None
    benchmark, found = BENCHMARK, of_benchmarks(published(TABLES[0]), [BENCHMARK])
    methods = {
        n: f for n, f in sorted(folders.discover().items()) if f.path.parent == root / "methods"
    }
    anatomy = recorded_anatomies(found, [(benchmark, name) for name in methods])
    sources = []
    for name, folder in methods.items():
        readme = folder.path / "README.md"
        tests = sorted(
            p.name
            for p in [
                *(root / "tests").glob(f"test_{name}.py"),
                *(root / "tests").glob(f"test_{name}_*.py"),
            ]
        )
        text = readme.read_text() if readme.is_file() else ""
        sources.append(
            Source(
                name,
                folder.file.model_dump(),
                text,
                folder.claims.model_dump(),
                tests,
                anatomy[benchmark, name],
            )
        )
    method_pages.write(
        sources, rows, costs.cost_rows(found, anatomy), curves, root / "docs/methods", write
    )
    left = [
        p.name
        for p in sorted((root / "docs/methods").glob("*.md"))
        if p.stem not in (*methods, "index")
    ]
    return differing + [f"{name} (of no method: delete it)" for name in left]
