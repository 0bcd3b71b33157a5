"""`distillbench verify`: is a bundle (`bundle.py`) whole, and do its verdicts follow from its
records?"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from distillbench import config
from distillbench.audits import questions
from distillbench.audits.freezing import Frozen, frozen, read_frozen
from distillbench.cells.cell import Cell
from distillbench.cells.provenance import git, hardware
from distillbench.cli import audit_pages
from distillbench.cli.bundle import LEFT_OUT, MANIFEST, SUMS, read, sha256
from distillbench.cli.evaluate import known_metrics
from distillbench.cli.options import out
from distillbench.cli.render import published
from distillbench.config import Table
from distillbench.errors import UserError
from distillbench.registry import folders
from distillbench.tables import contents

if TYPE_CHECKING:
    from eval.report.records import Record

SPREADS = 4.0  # sd over seeds, within which a rerun on another processor has to come out
LEAST_SPREAD = 0.01  # of the logarithms over seeds


@dataclass(frozen=True)
class VerificationLine:
    """One line of the report: something that holds, or does not."""

    good: bool
    text: str


def verify(
    bundle: Annotated[Path, typer.Argument(help="an archive that `distillbench bundle` wrote")],
    rerun: Annotated[
        int,
        typer.Option(
            min=0,
            help="train so many cells of it again, drawn at random, and compare their metrics",
        ),
    ] = 0,
    seed: Annotated[int | None, typer.Option(help="of that draw; random if left out")] = None,
) -> None:
    """Hash every file of a bundle, draw its verdicts again from the values per seed, render its
    pages again; exit code 1 if one differs.

    Nothing of the bundle is executed: verdicts and reruns use the code of this checkout, and say so
    where it is not the bundle's.
    """
    failed = 0
    for line in verification(bundle, rerun, seed):
        word = "ok    " if line.good else "FAILED"
        out.print(f"{word}  {line.text}", soft_wrap=True, markup=False)
        failed += not line.good
    if failed:
        raise typer.Exit(1)


def verification(path: Path, rerun: int = 0, seed: int | None = None) -> Iterator[VerificationLine]:
    """Every line of the report."""
    files = read(path)
    digest = sha256(path.read_bytes())
    yield VerificationLine(True, f"{path}: {len(files)} files, sha256 {digest}")
    yield from hashes(files)
    yield from other_code(files)
    with tempfile.TemporaryDirectory() as folder:
        unpack(files, Path(folder))
        with contextlib.chdir(folder):
            try:
                name = yaml.safe_load(files[MANIFEST])["audit"]
                table = contents.table(name)
                yield from redrawn_verdicts(table)
                yield rerendered_pages(table)
                claims = read_frozen(audit_pages.folder_of(table))
                records = published(table.name)
            except Exception as e:  # whatever a damaged bundle leads to
                yield VerificationLine(False, f"its verdicts cannot be drawn again: {e}")
                return
    yield from claims_in_git(claims, name)
    for record in random.Random(seed).sample(records, min(rerun, len(records))):
        siblings = [other for other in records if other.arm == record.arm]
        yield trained_anew(record, siblings)


def hashes(files: dict[str, bytes]) -> Iterator[VerificationLine]:
    """A line for every file that is not what SHA256SUMS says, or one that all are."""
    listed = {}
    for line in files[SUMS].decode(errors="replace").splitlines():
        digest, _, name = line.partition("  ")
        listed[name] = digest
    good = True
    for name in sorted({*files, *listed} - {SUMS}):
        why = None
        if name not in files:
            why = "is missing"
        elif name not in listed:
            why = "is not in SHA256SUMS"
        elif sha256(files[name]) != listed[name]:
            why = "has other bytes than SHA256SUMS says"
        if why is not None:
            good = False
            yield VerificationLine(False, f"{name} {why}")
    if good:
        words = f"{len(listed)} files have the hashes of SHA256SUMS"
        yield VerificationLine(True, f"{words}, whose own is {sha256(files[SUMS])}")


def other_code(files: dict[str, bytes]) -> Iterator[VerificationLine]:
    """A note where this checkout's code, by which verdicts are drawn, is not the bundle's."""
    import matplotlib.pyplot  # noqa: F401 (its settings are read once: here, and not in the bundle)

    from eval.audit import page  # noqa: F401 (from here, and not from the bundle)

    root = config.root()
    differing = []
    for name, data in sorted(files.items()):
        if name.startswith(("eval/", "distillbench/")) and name.endswith(".py"):
            own = root / name
            if not own.is_file() or own.read_bytes() != data:
                differing.append(name)
    if differing:
        yield VerificationLine(
            True,
            "note: verdicts are drawn by this checkout's code, which differs from the bundle's in "
            f"{', '.join(differing)}",
        )


def unpack(files: dict[str, bytes], folder: Path) -> None:
    """Write the files of a bundle into a folder."""
    for name, data in files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)


def redrawn_verdicts(table: Table) -> Iterator[VerificationLine]:
    """Lines on verdicts from the values per seed against those in the audit's JSON.

    The bundle's folder is the working directory.
    """
    asked = questions.of_table(table, known_metrics)
    found = audit_pages.published_findings(table, asked, audit_pages.folder_of(table))
    ours = [finding.twin() for finding in found]
    file = f"results/{table.name}.json"
    theirs = json.loads((config.root() / file).read_text(encoding="utf-8"))
    good = True
    for own, there in zip(ours, theirs, strict=False):
        if own != there:
            good = False
            place = f"{own['id']} on {own['benchmark']}"
            yield VerificationLine(False, f"{place}: {difference(own, there)}")
    if len(ours) != len(theirs):
        yield VerificationLine(
            False, f"{file} has {len(theirs)} findings, its claims make {len(ours)}"
        )
    elif good:
        words = f"{len(ours)} verdicts drawn again from the values per seed"
        yield VerificationLine(True, f"{words}, all as in {file}")


def difference(own: dict[str, Any], there: dict[str, Any]) -> str:
    """In what two findings differ, the one drawn again and the one in the audit's JSON."""
    keys = [key for key in own if key != "evidence" and own[key] != there.get(key)]
    if own["id"] != there.get("id") or own["benchmark"] != there.get("benchmark"):
        keys = ["id"]
    words = [f"{key} {there.get(key)} there, {own[key]} from its records" for key in keys]
    return "; ".join(words) or "other evidence"


def rerendered_pages(table: Table) -> VerificationLine:
    """Whether an audit's pages are as rendered from the records, in the working directory."""
    differing = audit_pages.render(table, check=True)
    if differing:
        words = f"rendered again from the records: {', '.join(differing)} differ"
        return VerificationLine(False, words)
    return VerificationLine(True, "pages are as rendered from their records")


def claims_in_git(claims: Frozen, name: str) -> Iterator[VerificationLine]:
    """Whether claims and seeds of the audit `name` are those that its commits hold, as far as git
    knows these here."""
    known = frozen(set(claims), name)
    for commit, said in claims.items():
        if commit not in known:
            yield VerificationLine(
                True,
                f"note: commit {commit[:12]}, at which claims were frozen, is not known to git "
                "here: fetch it to have that checked",
            )
        else:
            holds = said == known[commit]
            word = "hold" if holds else "do not hold"
            yield VerificationLine(
                holds, f"claims and seeds {word} as frozen in commit {commit[:12]}"
            )


def trained_anew(record: Record, siblings: list[Record]) -> VerificationLine:
    """One cell trained and evaluated with this checkout's code, in a folder of its own.

    siblings: the records of its arm, whose spread over seeds another processor is granted.
    """
    result = record.result
    label = f"{result['benchmark']}/{record.arm} seed {result['seed']}"
    try:
        arm = None if record.arm == "teacher" else folders.arm(record.arm)
        cell = Cell(config.benchmark(result["benchmark"]), arm, result["seed"])
    except UserError as e:
        return VerificationLine(False, f"{label}: cannot be run again: {e}")
    if cell.key != result["key"]:
        commit = result["provenance"]["commit"]
        return VerificationLine(
            False,
            f"{label}: this checkout gives it key {cell.key}, not {result['key']}: "
            f"check out commit {commit} and verify there",
        )
    with tempfile.TemporaryDirectory() as folder:
        copy_code(Path(folder))
        for stage in ("train", "evaluate"):
            done = run_stage(stage, cell, Path(folder))
            if done.returncode:
                last = done.stderr.strip().splitlines()[-1:]
                return VerificationLine(
                    False, f"{label}: {stage} ended with code {done.returncode}: {last}"
                )
        own = Path(folder) / cell.folder.relative_to(config.root())
        status = json.loads((own / "result.json").read_text(encoding="utf-8"))["status"]
        if status != result["status"] or record.metrics is None:
            return VerificationLine(
                status == result["status"],
                f"{label}: run again it ended as {status}, as published {result['status']}",
            )
        metrics = json.loads((own / "metrics.json").read_text(encoding="utf-8"))
    if metrics == record.metrics:
        return VerificationLine(True, f"{label}: run again, every metric has the same digits")
    return within_spread(label, record, metrics, siblings)


def copy_code(folder: Path) -> None:
    """Copy this checkout into a folder, without results and what a bundle leaves out."""
    root = config.root()
    for file in git("ls-files", "--cached", "--others", "--exclude-standard").splitlines():
        if not file.startswith(("results/", *LEFT_OUT)):
            target = folder / file
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((root / file).read_bytes())


def run_stage(stage: str, cell: Cell, folder: Path) -> subprocess.CompletedProcess[str]:
    """`distillbench train` or `evaluate` of one cell, in the checkout at `folder`."""
    words = [cell.benchmark.name, cell.arm_name, "--seeds", str(cell.seed)]
    return subprocess.run(
        [sys.executable, "-m", "distillbench.cli", stage, *words],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(config.root()), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def within_spread(
    label: str, record: Record, metrics: dict[str, Any], siblings: list[Record]
) -> VerificationLine:
    """Whether other metrics than the published ones are within the spread over seeds of the arm's
    main metric: the same digits cannot be asked of another processor."""
    from eval import catalogue

    published_row = record.rows[-1]
    name = catalogue.main_metric(catalogue.family_of(published_row)).name
    published_value = published_row[name]
    value = metrics["rows"][-1][name]
    words = f"{label}: run again, {name} {value:.4g} where {published_value:.4g} is published"
    if hardware() == record.result["provenance"]["hardware"]:
        return VerificationLine(False, f"{words}, on the same processor")
    logs = [math.log(sibling.rows[-1][name]) for sibling in siblings if sibling.rows]
    spread = LEAST_SPREAD
    if len(logs) > 1:
        spread = max(spread, statistics.stdev(logs))
    distance = abs(math.log(value) - math.log(published_value)) / spread
    return VerificationLine(
        distance <= SPREADS,
        f"{words}: another processor, {distance:.1f} sd of its seeds apart",
    )
