"""`distillbench bundle`: a reviewer's archive with everything an audit's verdicts rest on.

Layout: the checkout's files as they are, `environment.json` (Python, packages, platform),
`codecheck.yml` (what was run, what came out, in the words of CODECHECK's manifest) and
`SHA256SUMS`, a line `<hash>  <file>` for every other file. Times, owners and modes are left out, so
that the same checkout gives the same bytes. `verify.py` checks one.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import platform
import tarfile
import zlib
from importlib.metadata import distributions
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import typer
import yaml

from distillbench import config
from distillbench.cells.disk import json_bytes, write_atomically
from distillbench.cells.provenance import git
from distillbench.cli.audit_pages import audit_table
from distillbench.cli.options import AuditName
from distillbench.config import Table
from distillbench.errors import UserError

SUMS = "SHA256SUMS"
MANIFEST = "codecheck.yml"
ENVIRONMENT = "environment.json"
LEFT_OUT = ("tests/", "perf/", ".ci/")
LARGEST = 1 << 30  # bytes that a bundle may unpack to


def bundle(
    output: Annotated[Path, typer.Option(help="the archive, .tar.gz")] = Path(
        "distillbench-audit.tar.gz"
    ),
    name: AuditName = "audit",
) -> None:
    """One archive for a reviewer: tables, audit, records, claims, configurations, code,
    environment, checksums, a manifest.

    Two bundles of one checkout are the same bytes. `distillbench verify BUNDLE` checks one.
    """
    digest, count = write(output, audit_table(name))
    print(f"{output}: {count} files, sha256 {digest}")


def sha256(data: bytes) -> str:
    """SHA-256 in hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def contents(table: Table) -> dict[str, bytes]:
    """The files of an audit's bundle by name.

    Raises UserError where there is no git to list them, or where the audit's page is missing.
    """
    root = config.root()
    files = checkout_files(root)
    page = f"results/{table.name}.md"
    if page not in files:
        raise UserError(f"{root / page}: no such file: run `snakemake --cores all {page}`")
    files[ENVIRONMENT] = json_bytes(environment())
    files[MANIFEST] = yaml.safe_dump(manifest(table, list(files)), sort_keys=False).encode()
    sums = [f"{sha256(data)}  {file}\n" for file, data in sorted(files.items())]
    files[SUMS] = "".join(sums).encode()
    return files


def checkout_files(root: Path) -> dict[str, bytes]:
    """What git tracks, and results that it does not track yet, by name."""
    listed = git("ls-files").splitlines()
    listed += git("ls-files", "--others", "--exclude-standard", "results").splitlines()
    if not listed:
        raise UserError(
            f"{root}: a bundle needs git, which knows the files of a checkout: clone the repository"
        )
    files = {}
    for file in sorted(listed):
        if not file.startswith(LEFT_OUT) and (root / file).is_file():
            files[file] = (root / file).read_bytes()
    return files


def environment() -> dict[str, Any]:
    """Python, its packages and the platform of this process."""
    packages = {package.metadata["Name"]: package.version for package in distributions()}
    return {
        "python": platform.python_version(),
        "platform": platform.machine(),
        "packages": dict(sorted(packages.items())),
    }


def manifest(table: Table, files: list[str]) -> dict[str, Any]:
    """CODECHECK's manifest: what was run, and which of the files came out."""
    outputs = []
    for file in files:
        if file.startswith((f"results/{table.name}.", f"results/{table.name}/")):
            comment = f"rendered from results/records by `distillbench table {table.name}`"
            outputs.append({"file": file, "comment": comment})
    return {
        "version": "https://codecheck.org.uk/spec/config/1.0/",
        "paper": {"title": "distillbench: " + table.title},
        "manifest": outputs,
        "source": {
            "commit": git("rev-parse", "HEAD"),
            "dirty": bool(git("status", "--porcelain")),
        },
        "summary": "Every file is hashed in SHA256SUMS. `distillbench verify` draws the verdicts "
        "again and renders the pages again.",
        "commands": [
            f"snakemake --cores all results/{table.name}.md",
            "distillbench verify BUNDLE --rerun 3",
        ],
        "audit": table.name,
    }


def write(path: Path, table: Table) -> tuple[str, int]:
    """Write the bundle of an audit; its SHA-256 and the number of its files."""
    files = contents(table)
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for file, data in sorted(files.items()):
            about = tarfile.TarInfo(file)
            about.size = len(data)
            tar.addfile(about, io.BytesIO(data))
    packed = gzip.compress(raw.getvalue(), mtime=0)
    write_atomically(path, packed)
    return sha256(packed), len(files)


def read(path: Path) -> dict[str, bytes]:
    """The files of a bundle; UserError where it is no archive of plain, relatively named files."""
    try:
        with tarfile.open(path, "r:gz") as tar:
            files = _members(path, tar)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file: `distillbench bundle` writes one") from None
    except (tarfile.TarError, OSError, EOFError, zlib.error) as e:
        raise UserError(f"{path}: not a whole .tar.gz archive ({e}): fetch it again") from None
    for needed in (SUMS, MANIFEST):
        if needed not in files:
            raise UserError(f"{path}: no {needed} in it: not a bundle of ours")
    return files


def _members(path: Path, tar: tarfile.TarFile) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    total = 0
    for member in tar:
        total += member.size
        if not _is_plain(member) or member.name in files:
            raise UserError(
                f"{path}: '{member.name}' is no plain file of its own with a relative name: "
                "not a bundle of ours"
            )
        if total > LARGEST:
            raise UserError(
                f"{path}: unpacks to more than {LARGEST >> 20} MiB: not a bundle of ours"
            )
        content = tar.extractfile(member)
        assert content is not None
        files[member.name] = content.read()
    return files


def _is_plain(member: tarfile.TarInfo) -> bool:
    """Whether a member is a file whose name stays inside the folder it is unpacked to."""
    name = member.name
    if not member.isfile() or "\0" in name or name.startswith("/"):
        return False
    return PurePosixPath(name).as_posix() == name and ".." not in Path(name).parts
