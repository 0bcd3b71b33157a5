"""Pages rendered from published records: a table of costs, and docs/methods. `publish.py` has the
commands."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distillbench import config
from distillbench.cells.disk import make_folder, write_atomically
from distillbench.cli.options import out
from distillbench.config import Table
from distillbench.errors import UserError
from distillbench.registry import folders
from distillbench.registry.folders import MethodFolder

if TYPE_CHECKING:
    from eval.report.method_pages import Source
    from eval.report.records import Record


def published(table: str) -> list[Record]:
    """The published records of a table; UserError names a damaged one."""
    from eval.report import records

    try:
        return records.read(config.root() / "results/records" / table)
    except ValueError as e:
        raise UserError(str(e)) from None


def no_records(folder: Path | str, table: str) -> UserError:
    """The error where a table has no published records in `folder`."""
    return UserError(
        f"{folder}: no published records: run `snakemake --cores all results/{table}.md`"
    )


class PageWriter:
    """A writer of files that remembers which of them differed from what was there.

    With `check` it writes none. Otherwise it writes every file, also an equal one, whose time tells
    Snakemake that it is up to date.
    """

    def __init__(self, check: bool):
        self.check = check
        self.differing: list[str] = []  # names of files

    def write(self, path: Path, data: bytes) -> None:
        """Write `data`, or only compare it."""
        if not path.is_file() or path.read_bytes() != data:
            self.differing.append(path.name)
        if not self.check:
            make_folder(path.parent)
            write_atomically(path, data)


def say_rendered(what: str, differing: list[str], check: bool) -> bool:
    """Say that pages were written, or which a check found to differ; whether a check failed."""
    if not check:
        print(f"{what} written", file=sys.stderr)
        return False
    if differing:
        out.print(f"{what}: differ from their records: {', '.join(differing)}")
        return True
    out.print(f"{what}: as rendered from their records")
    return False


def recorded_anatomies(
    records: list[Record], more: list[tuple[str, str]]
) -> dict[tuple[str, str], dict[str, Any]]:
    """`anatomy` by (benchmark, arm): of `more`, and of records' arms that this checkout has."""
    from distillbench.conformance.anatomies import anatomies

    students = [record for record in records if record.result["group"] != "teacher"]
    wanted = set(more)
    for benchmark, arm in {(record.result["benchmark"], record.arm) for record in students}:
        with contextlib.suppress(UserError):
            wanted.add((benchmark, folders.arm(arm).name))
    return anatomies(sorted(wanted))


def of_benchmarks(records: list[Record], benchmarks: list[str]) -> list[Record]:
    """Records on one of the benchmarks."""
    return [record for record in records if record.result["benchmark"] in benchmarks]


def render_costs(table: Table, check: bool) -> list[str]:
    """Render a table of `kind: costs` from published records and the methods' folders.

    Costs are from the records of its first source, time to quality from those of the last; where
    that has none the first stands in, so that the full budget is shown. Returns the names of files
    that differed; UserError where the first source has no records.
    """
    from eval.report import costs, gpu

    writer = PageWriter(check)
    first = table.sources[0]
    last = table.sources[-1]
    records = of_benchmarks(published(first), table.benchmarks)
    budgets = of_benchmarks(published(last), table.benchmarks)
    if not records:
        raise no_records(f"results/records/{first}", first)
    costs.write(
        table.name,
        table.title,
        records,
        budgets or records,
        recorded_anatomies(records, []),
        (first, last if budgets else first),
        gpu.section(config.root() / "perf/gpu.json"),
        config.root() / "results",
        writer.write,
    )
    return writer.differing


def render_pages(check: bool) -> list[str]:
    """Render docs/methods from the methods' folders and published records.

    Pages are of methods in this checkout, metered costs and needs those on the benchmarks of the
    first table. Returns the names of files that differed, and of pages of no method.
    """
    from eval.report import costs, method_pages
    from eval.report.curves import read_curves
    from eval.report.method_pages import BENCHMARK, TABLES
    from eval.report.rows import build_rows

    root = config.root()
    writer = PageWriter(check)
    rows = []
    curves = {}
    for table in TABLES:
        rows += [row | {"table": table} for row in build_rows(published(table))]
        try:
            curves[table] = read_curves(root / "results/records" / table)
        except ValueError as e:
            raise UserError(str(e)) from None
    records = of_benchmarks(published(TABLES[0]), [BENCHMARK])
    methods = {}
    for name, folder in sorted(folders.discover().items()):
        if folder.path.parent == root / "methods":
            methods[name] = folder
    anatomy = recorded_anatomies(records, [(BENCHMARK, name) for name in methods])
    sources = [source(folder, anatomy[BENCHMARK, name]) for name, folder in methods.items()]
    pages = root / "docs/methods"
    method_pages.write(
        sources, rows, costs.cost_rows(records, anatomy), curves, pages, writer.write
    )
    of_no_method = []
    for page in sorted(pages.glob("*.md")):
        if page.stem not in methods and page.stem != "index":
            of_no_method.append(f"{page.name} (of no method: delete it)")
    return writer.differing + of_no_method


def source(folder: MethodFolder, anatomy: dict[str, Any]) -> Source:
    """What a method's page is made of, besides records."""
    from eval.report.method_pages import Source

    tests = config.root() / "tests"
    own_tests = [*tests.glob(f"test_{folder.name}.py"), *tests.glob(f"test_{folder.name}_*.py")]
    readme = folder.path / "README.md"
    return Source(
        name=folder.name,
        about=folder.file.model_dump(),
        readme=readme.read_text(encoding="utf-8") if readme.is_file() else "",
        claims=folder.claims.model_dump(),
        tests=sorted(path.name for path in own_tests),
        anatomy=anatomy,
    )
