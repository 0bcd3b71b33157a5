"""Five claims of the papers from Snakemake to the page, on small mixtures.

Then an edited claim, and a bundle with ten ways to tamper with it.
"""

from __future__ import annotations

import gzip
import io
import json
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT, Checkout

# one worker, and so one run of the audit, for all of them
pytestmark = pytest.mark.xdist_group("audit")

FIVE = {"FF-L1", "TVM-T13", "TVM-T16a", "TVM-T16b", "MF-8"}
RING = """
name: {name}
family: gaussians
data: {{kind: mixture, layout: ring, sigma: 0.15, weights: [1, 2, 3]}}
network: {{width: 32, depth: 1}}
teacher: {{updates: 60, batch: 32, lr: 1.0e-3, heun_steps: 4}}
budget: {{flops: 2.0e+9}}
sampling: {{count: 500}}
seeds: [0]
timeout_s: 3600
"""
AUDIT = """
name: audit
title: Small audit
kind: audit
benchmarks: [gaussians-ring-small, gaussians-ring]
methods: [freeflow, meanflow, tvm]
seeds: [10, 11, 12, 13, 14]
"""


def git(folder: Path, *words: str) -> str:
    words = (
        "git",
        "-c",
        "user.name=a",
        "-c",
        "user.email=a@b",
        "-c",
        "commit.gpgsign=false",
        *words,
    )
    return subprocess.run(
        words, cwd=folder, check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.fixture(scope="module")
def audited(tmp_path_factory) -> tuple[Checkout, str]:
    """A checkout under git whose audit of the five claims has run, and what Snakemake said."""
    folder = tmp_path_factory.mktemp("audit") / "checkout"
    folder.mkdir()
    made = Checkout(folder)
    shutil.copytree(
        ROOT / "mechanisms", folder / "mechanisms", ignore=shutil.ignore_patterns("__pycache__")
    )
    for path in (folder / "methods").glob("*/claims.yaml"):
        found = yaml.safe_load(path.read_text())
        found["claims"] = [c for c in found["claims"] if c["id"] in FIVE]
        for claim in found["claims"]:
            claim["trials"].pop("digits", None)
        path.write_text(yaml.safe_dump(found, sort_keys=False))
    for name in ("gaussians-ring", "gaussians-ring-small"):
        made.write(f"workflows/benchmarks/{name}.yaml", RING.format(name=name))
    made.write("workflows/tables/audit.yaml", AUDIT)
    made.write(".gitignore", "results/runs\n.snakemake\n__pycache__\n*.tar.gz\n")
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "claims")
    plan = made.run("distillbench", "plan", "audit")
    assert (
        "audit: 5 claims, 5 questions; 20 of 20 cells to train" in plan.stdout
        and "3 measurements of mechanisms" in plan.stdout
    ), plan
    done = made.snakemake("results/audit.md")
    assert done.returncode == 0, done.stderr
    return made, done.stderr


def test_five_claims_end_to_end(audited):
    made, _ = audited
    found = json.loads((made.folder / "results/audit.json").read_text())
    assert {q["id"] for q in found} == FIVE
    assert all(
        q["verdict"] in ("SUPPORTED", "CONTRADICTED", "REVERSED_AT_SCALE", "INCONCLUSIVE")
        for q in found
    ), found
    assert all(q["seeds_a"] == (3 if q["id"] == "MF-8" else 5) for q in found)
    head = git(made.folder, "rev-parse", "HEAD")
    assert all(q["evidence"]["commits"] == [head] for q in found)
    page = (made.folder / "results/audit.md").read_text()
    assert "distillbench audit --claim FF-L1 --benchmark gaussians-ring-small" in page
    assert made.run("distillbench", "table", "audit", "--check").returncode == 0
    again = made.snakemake("results/audit.md")
    assert again.returncode == 0 and "Nothing to be done" in again.stderr + again.stdout


def test_one_claim_by_its_printed_command(audited):
    made, _ = audited
    done = made.run(
        "distillbench", "audit", "audit", "--claim", "FF-L1", "--benchmark", "gaussians-ring-small"
    )
    (said,) = (
        q
        for q in json.loads((made.folder / "results/audit.json").read_text())
        if q["id"] == "FF-L1"
    )
    assert done.returncode == 0, done.stderr
    values = " ".join(f"{v:.3g}" for v in said["evidence"]["values"]["meanflow"])
    assert values in done.stdout and done.stdout.startswith("FF-L1: ")
    for words in (("--claim", "FF-L9"), ("--method", "meanfow"), ("--benchmark", "ring")):
        bad = made.run("distillbench", "audit", *words)
        assert bad.returncode == 2 and "no claim of" in bad.stderr and "Traceback" not in bad.stderr


def test_a_margin_edited_after_the_runs_shows_until_the_claim_runs_on_fresh_seeds(audited):
    made, _ = audited
    path = made.folder / "methods/tvm/claims.yaml"
    before = path.read_text()
    found = yaml.safe_load(before)
    for claim in found["claims"]:
        if claim["id"] == "TVM-T13":
            claim["trials"]["gaussians-ring-small"]["margin"] = 0.01
    try:
        path.write_text(yaml.safe_dump(found, sort_keys=False))
        made.run("distillbench", "table", "audit")
        verdicts = {
            q["id"]: q["verdict"]
            for q in json.loads((made.folder / "results/audit.json").read_text())
        }
        assert verdicts["TVM-T13"] == "EDITED" and "EDITED" not in {
            v for k, v in verdicts.items() if k != "TVM-T13"
        }
        assert "changed after its runs" in (made.folder / "results/audit.md").read_text()
    finally:
        path.write_text(before)
        made.run("distillbench", "table", "audit")


def repack(path: Path, target: Path, file: str, change) -> None:
    """The bundle with one file changed; None takes it out."""
    out = io.BytesIO()
    with tarfile.open(path) as old, tarfile.open(fileobj=out, mode="w") as new:
        for member in old:
            data = old.extractfile(member).read()
            if member.name == file:
                data = change(data)
                if data is None:
                    continue
            about = tarfile.TarInfo(member.name)
            about.size = len(data)
            new.addfile(about, io.BytesIO(data))
    target.write_bytes(gzip.compress(out.getvalue(), mtime=0))


def one_byte(data: bytes) -> bytes:
    i = len(data) // 2
    return data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :]


def test_bundle_and_verify(audited):
    made, _ = audited
    done = made.run("distillbench", "bundle", "--output", "a.tar.gz")
    assert done.returncode == 0, done.stderr
    assert made.run("distillbench", "bundle", "--output", "b.tar.gz").returncode == 0
    path = made.folder / "a.tar.gz"
    assert path.read_bytes() == (made.folder / "b.tar.gz").read_bytes()
    good = made.run("distillbench", "verify", "a.tar.gz", "--rerun", "1", "--seed", "1")
    assert good.returncode == 0, good.stdout + good.stderr
    assert (
        "5 verdicts drawn again" in good.stdout
        and "run again, every metric has the same digits" in good.stdout
    )
    cell = "results/records/audit/gaussians-ring-small/tvm/seed10"
    tampered = [
        ("results/audit.md", one_byte),
        ("results/audit.json", one_byte),
        ("results/audit.csv", one_byte),
        ("results/audit/tvm.png", one_byte),
        (f"{cell}/metrics.json", one_byte),
        (f"{cell}/result.json", one_byte),
        ("methods/freeflow/claims.yaml", one_byte),
        ("results/records/audit/frozen.json", one_byte),
        ("codecheck.yml", one_byte),
        ("environment.json", one_byte),
        ("SHA256SUMS", one_byte),
        ("methods/tvm/method.py", lambda data: None),
    ]
    for file, change in tampered:
        repack(path, made.folder / "bad.tar.gz", file, change)
        bad = made.run("distillbench", "verify", "bad.tar.gz")
        assert bad.returncode in (1, 2) and "Traceback" not in bad.stderr, (
            file,
            bad.stdout,
            bad.stderr,
        )
        if file != "SHA256SUMS":
            assert f"FAILED  {file} " in bad.stdout, (file, bad.stdout)


def test_a_forger_who_hashes_again_is_found_by_the_verdicts(audited):
    """A metric and its line of SHA256SUMS changed together give values with another verdict."""
    import hashlib

    made, _ = audited
    assert made.run("distillbench", "bundle", "--output", "a.tar.gz").returncode == 0
    file = "results/records/audit/gaussians-ring-small/meanflow/seed10/metrics.json"
    with tarfile.open(made.folder / "a.tar.gz") as tar:
        data = tar.extractfile(file).read()
    found = json.loads(data)
    for row in found["rows"]:
        row["sliced_w2"] *= 3
    forged = json.dumps(found).encode()
    repack(made.folder / "a.tar.gz", made.folder / "half.tar.gz", file, lambda _: forged)
    old, new = (hashlib.sha256(d).hexdigest().encode() for d in (data, forged))
    repack(
        made.folder / "half.tar.gz",
        made.folder / "bad.tar.gz",
        "SHA256SUMS",
        lambda sums: sums.replace(old, new),
    )
    bad = made.run("distillbench", "verify", "bad.tar.gz")
    assert (
        bad.returncode == 1
        and "FAILED  FF-L1 on gaussians-ring-small: " in bad.stdout
        and "rendered again" in bad.stdout
    )


def test_what_is_no_bundle_is_one_line(audited):
    made, _ = audited
    made.write("text.tar.gz", "no archive")
    for name, words in (
        ("gone.tar.gz", "no such file"),
        ("text.tar.gz", "not a whole .tar.gz archive"),
    ):
        done = made.run("distillbench", "verify", name)
        assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as tar:
        about = tarfile.TarInfo("../outside")
        tar.addfile(about, io.BytesIO())
    (made.folder / "evil.tar.gz").write_bytes(gzip.compress(raw.getvalue()))
    done = made.run("distillbench", "verify", "evil.tar.gz")
    assert done.returncode == 2 and "'../outside' is no plain file" in done.stderr
