"""python -m perf [--large]: ratios of evaluation and training step, written to perf/results.md.

Both sides of a ratio are measured within one run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path

from perf import meanflow_update

RESULTS = Path(__file__).with_name("results.md")
ROWS = 10_000
LARGE = 50_000
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
PARTS = {"FID": "fid", "KID": "kid", "IS": "is", "PRC": "prc"}  # of torch-fidelity's time


def step(name: str, folder: str, rows: int) -> dict[str, float]:
    """One step of perf.evaluation in a process of its own."""
    command = [sys.executable, "-m", "perf.evaluation", name, folder, str(rows)]
    done = subprocess.run(
        command, env=os.environ | ONE_THREAD, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout)


def evaluation(large: bool) -> str:
    """The section on evaluation, measured now; with `large` also on LARGE rows."""
    with tempfile.TemporaryDirectory() as folder:
        step("features", folder, ROWS)
        took = step("speed", folder, ROWS)
        row = memory_row(ROWS, step("memory", folder, ROWS))
        if large:
            step("features", folder, LARGE)
            row += "\n" + memory_row(LARGE, step("memory", folder, LARGE))
    base = took["theirs"]
    parts = ", ".join(f"{name} {took[key] / base:.2f}" for name, key in PARTS.items())
    return f"""## Evaluation

{ROWS:,} generated against {ROWS:,} held-out rows of 2048 features, power-law spectrum. \
torch-fidelity: FID, KID (100 subsets of
1000), IS and precision/recall by its functions on features, its defaults. Ours: FID, KID of all \
pairs, IS, precision, recall,
density, coverage, C2ST.

| scores | time / torch-fidelity | seconds |
|---|---|---|
| torch-fidelity ({parts}) | 1.00 | {base:.1f} |
| ours | {took["ours"] / base:.2f} | {took["ours"]:.1f} |
| ours, reference seen before | {took["ours_known"] / base:.2f} | {took["ours_known"]:.1f} |

Digits, 20,000 x 64 against 896 x 64, all scores on features: {took["digits"]:.1f} s.

| both sets | above imports and features, GB | above imports, GB | in all, GB | seconds |
|---|---|---|---|---|
{row}
"""


def memory_row(rows: int, used: dict[str, float]) -> str:
    """A line of the table of memory."""
    peak = used["peak"]
    above = f"{peak - used['loaded']:.2f} | {peak - used['imports']:.2f} | {peak:.2f}"
    return f"| {rows:,} x 2048 | {above} | {used['seconds']:.0f} |"


def training_step() -> str:
    """The section on the training step, measured now."""
    rows = []
    for name, flops, time in meanflow_update.measure():
        rows.append(f"| {name} | {flops:.2f} | {time:.2f} |")
    table = "\n".join(rows)
    return f"""## Training step

One MeanFlow update on the digits network, batch {meanflow_update.B}, interleaved with its \
alternatives, medians of
{meanflow_update.ROUNDS}.

| update | FLOPs / forward | time / flow matching |
|---|---|---|
{table}
"""


def git(*words: str) -> str:
    """What a git command prints in this checkout; empty where it fails."""
    done = subprocess.run(["git", *words], capture_output=True, text=True, cwd=RESULTS.parent)
    return done.stdout.strip()


def processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def machine() -> str:
    """Two lines on processor, load, versions and commit."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "torch-fidelity", "numpy"))
    commit = git("rev-parse", "--short", "HEAD") or "unknown"
    dirty = "-dirty" if git("status", "--porcelain", "--untracked-files=no") else ""
    load = os.getloadavg()[0]
    return (
        f"{processor()}, {os.cpu_count()} cores, load {load:.1f} at the start; one thread.\n"
        f"Python {platform.python_version()}, {packages}. Commit {commit}{dirty}, {date.today()}."
    )


def main() -> None:
    """Measure, write perf/results.md, print it."""
    parser = argparse.ArgumentParser(prog="python -m perf", description=__doc__)
    parser.add_argument("--large", action="store_true", help=f"also {LARGE:,} rows: minutes, 2 GB")
    arguments = parser.parse_args()
    head = f"# Measured speed and memory\n\nBy `make bench` on {machine()}"
    text = f"{head}\n\n{evaluation(arguments.large)}\n{training_step()}"
    with tempfile.NamedTemporaryFile("w", dir=RESULTS.parent, delete=False) as file:
        file.write(text)
    os.chmod(file.name, 0o644)
    os.replace(file.name, RESULTS)
    print(text)


if __name__ == "__main__":
    main()
