"""A reviewer's archive: everything an audit's verdicts rest on, with checksums, and its verification.

Layout: the checkout's files as they are, `environment.json` (Python, packages, platform), `codecheck.yml` (what was run, what came out, in
the words of CODECHECK's manifest) and `SHA256SUMS`, a line `<hash>  <file>` for every other file. Times, owners and modes are
left out, so that the same checkout gives the same bytes.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import math
import os
import platform
import random
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from distillbench import config
from distillbench.audits import questions
from distillbench.audits.freezing import frozen, read_frozen
from distillbench.cells.cell import Cell
from distillbench.cells.disk import json_bytes, write_atomically
from distillbench.cells.provenance import git
from distillbench.cli import audit_pages
from distillbench.cli.evaluate import known_metrics
from distillbench.cli.render import published
from distillbench.config import Table
from distillbench.errors import UserError
from distillbench.registry import folders
from distillbench.tables import plan

SUMS, MANIFEST, ENVIRONMENT = "SHA256SUMS", "codecheck.yml", "environment.json"
LEFT_OUT = ("tests/", "perf/", ".ci/")
LARGEST = 1 << 30  # bytes that a bundle may unpack to
SPREADS = 4.0  # sd over seeds, within which a rerun on another processor has to come out


@dataclass(frozen=True)
class Finding:
    good: bool
    text: str


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def contents(name: str) -> dict[str, bytes]:
    """The bundle's files by name."""
    root = config.root()
    listed = [
        *git("ls-files").splitlines(),
        *git("ls-files", "--others", "--exclude-standard", "results").splitlines(),
    ]
    if not listed:
        raise UserError(
            f"{root}: a bundle needs git, which knows the files of a checkout: clone the repository"
        )
    files = {
        f: (root / f).read_bytes()
        for f in sorted(listed)
        if not f.startswith(LEFT_OUT) and (root / f).is_file()
    }
    page = f"results/{name}.md"
    if page not in files:
        raise UserError(f"{root / page}: no such file: run `snakemake --cores all {page}`")
    packages = {d.metadata["Name"]: d.version for d in distributions()}
    environment = {
        "python": platform.python_version(),
        "platform": platform.machine(),
        "packages": dict(sorted(packages.items())),
    }
    files[ENVIRONMENT] = json_bytes(environment)
    pages = [name] if (again := plan.table(name).reported_again) is None else [name, again]
    results = [
        f
        for f in files
        if any(f.startswith((f"results/{page}.", f"results/{page}/")) for page in pages)
    ]
    files[MANIFEST] = yaml.safe_dump(
        {
            "version": "https://codecheck.org.uk/spec/config/1.0/",
            "paper": {"title": "distillbench: " + plan.table(name).title},
            "manifest": [
                {
                    "file": f,
                    "comment": f"rendered from results/records by `distillbench table {name}`",
                }
                for f in results
            ],
            "source": {
                "commit": git("rev-parse", "HEAD"),
                "dirty": bool(git("status", "--porcelain")),
            },
            "summary": "Every file is hashed in SHA256SUMS. `distillbench verify` draws the verdicts again and renders the pages again.",
            "commands": [
                f"snakemake --cores all results/{name}.md",
                "distillbench verify BUNDLE --rerun 3",
            ],
            "audit": name,
        },
        sort_keys=False,
    ).encode()
    files[SUMS] = "".join(f"{sha256(data)}  {f}\n" for f, data in sorted(files.items())).encode()
    return files


def write(path: Path, name: str) -> tuple[str, int]:
    """Write the bundle of an audit; its SHA-256 and the number of its files."""
    files, raw = contents(name), io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for file, data in sorted(files.items()):
            about = tarfile.TarInfo(file)
            about.size = len(data)
            tar.addfile(about, io.BytesIO(data))
    packed = gzip.compress(raw.getvalue(), mtime=0)
    write_atomically(path, packed)
    return sha256(packed), len(files)


def read(path: Path) -> dict[str, bytes]:
    """The files of a bundle; UserError where it is no archive of plain files with relative names."""
    files: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:gz") as tar:
            total = 0
            for member in tar:
                total += member.size
                plain = (
                    PurePosixPath(member.name).as_posix() == member.name and "\0" not in member.name
                )
                if (
                    not member.isfile()
                    or not plain
                    or member.name.startswith("/")
                    or ".." in Path(member.name).parts
                    or member.name in files
                ):
                    raise UserError(
                        f"{path}: '{member.name}' is no plain file of its own with a relative name: not a bundle of ours"
                    )
                if total > LARGEST:
                    raise UserError(
                        f"{path}: unpacks to more than {LARGEST >> 20} MiB: not a bundle of ours"
                    )
                found = tar.extractfile(member)
                assert found is not None
                files[member.name] = found.read()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file: `distillbench bundle` writes one") from None
    except (tarfile.TarError, OSError, EOFError, zlib.error) as e:
        raise UserError(f"{path}: not a whole .tar.gz archive ({e}): fetch it again") from None
    for needed in (SUMS, MANIFEST):
        if needed not in files:
            raise UserError(f"{path}: no {needed} in it: not a bundle of ours")
    return files


def hashes(files: dict[str, bytes]) -> Iterator[Finding]:
    """A finding for every file that is not what SHA256SUMS says, or one that all are."""
    listed = {}
    for line in files[SUMS].decode(errors="replace").splitlines():
        digest, _, name = line.partition("  ")
        listed[name] = digest
    bad = 0
    for name in sorted(set(files) | set(listed) - {SUMS}):
        if name == SUMS:
            continue
        why = (
            "is missing"
            if name not in files
            else "is not in SHA256SUMS"
            if name not in listed
            else None
        )
        if why or sha256(files[name]) != listed[name]:
            bad += 1
            yield Finding(False, f"{name} {why or 'has other bytes than SHA256SUMS says'}")
    if not bad:
        yield Finding(
            True,
            f"{len(listed)} files have the hashes of SHA256SUMS, whose own is {sha256(files[SUMS])}",
        )


def verify(path: Path, rerun: int = 0, seed: int | None = None) -> Iterator[Finding]:
    """Everything that `distillbench verify` says, good and bad."""
    files = read(path)
    yield Finding(True, f"{path}: {len(files)} files, sha256 {sha256(path.read_bytes())}")
    yield from hashes(files)
    import matplotlib.pyplot  # noqa: F401 (its settings are read once: here, and not in the bundle)

    from eval.audit import page as audit_page  # noqa: F401 (from here, and not from the bundle)

    here = config.root()
    differing = sorted(
        f
        for f, data in files.items()
        if f.startswith(("eval/", "distillbench/"))
        and f.endswith(".py")
        and not _same(here / f, data)
    )
    if differing:
        yield Finding(
            True,
            f"note: verdicts are drawn by this checkout's code, which differs from the bundle's in {', '.join(differing)}",
        )
    with tempfile.TemporaryDirectory() as folder:
        for name, data in files.items():
            target = Path(folder, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
        with contextlib.chdir(folder):
            try:
                name = yaml.safe_load(files[MANIFEST])["audit"]
                table = plan.table(name)
                yield from verdicts_again(table)
                said = read_frozen(audit_pages.folder_of(table))
                records = published(table.name)
            except Exception as e:  # whatever a damaged bundle leads to
                yield Finding(False, f"its verdicts cannot be drawn again: {e}")
                return
    known = frozen(set(said), name)
    for commit, then in said.items():
        if commit not in known:
            yield Finding(
                True,
                f"note: commit {commit[:12]}, at which claims were frozen, is not known to git here: fetch it to have that checked",
            )
        else:
            word = "hold" if then == known[commit] else "do not hold"
            yield Finding(
                then == known[commit], f"claims and seeds {word} as frozen in commit {commit[:12]}"
            )
    drawn = random.Random(seed).sample(records, min(rerun, len(records)))
    for record in drawn:
        yield again(record.result, record.metrics, [r for r in records if r.arm == record.arm])


def _same(path: Path, data: bytes) -> bool:
    return path.is_file() and path.read_bytes() == data


def verdicts_again(table: Table) -> Iterator[Finding]:
    """Verdicts from the values per seed against those in the audit's JSON, and every page rendered again; in the bundle's folder."""
    found = [
        q.twin()
        for q in audit_pages.published_findings(
            table, questions.of_table(table, known_metrics), audit_pages.folder_of(table)
        )
    ]
    said = json.loads((config.root() / f"results/{table.name}.json").read_text())
    bad = 0
    for ours, theirs in zip(found, said, strict=False):
        if ours != theirs:
            bad += 1
            keys = [k for k in ours if k != "evidence" and ours[k] != theirs.get(k)]
            if (ours["id"], ours["benchmark"]) != (theirs.get("id"), theirs.get("benchmark")):
                keys = ["id"]
            words = (
                "; ".join(f"{k} {theirs.get(k)} there, {ours[k]} from its records" for k in keys)
                or "other evidence"
            )
            yield Finding(False, f"{ours['id']} on {ours['benchmark']}: {words}")
    if len(found) != len(said):
        yield Finding(
            False,
            f"results/{table.name}.json has {len(said)} findings, its claims make {len(found)}",
        )
    elif not bad:
        yield Finding(
            True,
            f"{len(found)} verdicts drawn again from the values per seed, all as in results/{table.name}.json",
        )
    differing = audit_pages.render(table, check=True)
    pages = (
        f"rendered again from the records: {', '.join(differing)} differ"
        if differing
        else "pages are as rendered from their records"
    )
    yield Finding(not differing, pages)


def again(result: dict[str, Any], metrics: dict[str, Any] | None, siblings: list[Any]) -> Finding:
    """One cell trained and evaluated anew with this checkout's code, in a folder of its own."""
    arm = result["method"] + (f"@{result['variant']}" if result["variant"] else "")
    label = f"{result['benchmark']}/{arm} seed {result['seed']}"
    try:
        cell = Cell(
            config.benchmark(result["benchmark"]),
            None if arm == "teacher" else folders.arm(arm),
            result["seed"],
        )
    except UserError as e:
        return Finding(False, f"{label}: cannot be run again: {e}")
    if cell.key != result["key"]:
        commit = result["provenance"]["commit"]
        return Finding(
            False,
            f"{label}: this checkout gives it key {cell.key}, not {result['key']}: check out commit {commit} and verify there",
        )
    here = config.root()
    with tempfile.TemporaryDirectory() as folder:
        for file in git("ls-files", "--cached", "--others", "--exclude-standard").splitlines():
            if not file.startswith(("results/", *LEFT_OUT)):
                Path(folder, file).parent.mkdir(parents=True, exist_ok=True)
                Path(folder, file).write_bytes((here / file).read_bytes())
        environment = os.environ | {"PYTHONPATH": str(here), "OMP_NUM_THREADS": "1"}
        words = [result["benchmark"], arm, "--seeds", str(result["seed"])]
        for stage in ("train", "evaluate"):
            done = subprocess.run(
                [sys.executable, "-m", "distillbench.cli", stage, *words],
                cwd=folder,
                env=environment,
                capture_output=True,
                text=True,
            )
            if done.returncode:
                return Finding(
                    False,
                    f"{label}: {stage} ended with code {done.returncode}: {done.stderr.strip().splitlines()[-1:]}",
                )
        where = Path(
            folder, "results/runs", result["benchmark"], arm, f"seed{result['seed']}-{cell.key}"
        )
        status = json.loads((where / "result.json").read_text())["status"]
        if status != result["status"] or metrics is None:
            return Finding(
                status == result["status"],
                f"{label}: run again it ended as {status}, as published {result['status']}",
            )
        new = json.loads((where / "metrics.json").read_text())
    if new == metrics:
        return Finding(True, f"{label}: run again, every metric has the same digits")
    return _near(label, result, metrics, new, siblings)


def _near(
    label: str,
    result: dict[str, Any],
    old: dict[str, Any],
    new: dict[str, Any],
    siblings: list[Any],
) -> Finding:
    """The same digits cannot be asked of another processor: then within the spread over seeds of the arm's main metric."""
    from distillbench.cells.provenance import hardware
    from eval import catalogue

    main = catalogue.main_metric(catalogue.family_of(old["rows"][0])).name
    logs = [math.log(r.rows[-1][main]) for r in siblings if r.rows]
    middle = sum(logs) / len(logs)
    spread = max(0.01, math.sqrt(sum((v - middle) ** 2 for v in logs) / max(1, len(logs) - 1)))
    a, b = old["rows"][-1][main], new["rows"][-1][main]
    words = f"{label}: run again, {main} {b:.4g} where {a:.4g} is published"
    if hardware() == result["provenance"]["hardware"]:
        return Finding(False, f"{words}, on the same processor")
    off = abs(math.log(b) - math.log(a)) / spread
    return Finding(off <= SPREADS, f"{words}: another processor, {off:.1f} sd of its seeds apart")
