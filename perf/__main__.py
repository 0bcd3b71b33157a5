"""python -m perf [--large]: measures evaluation and training step as ratios within one run and writes perf/results.md."""

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
ROWS, LARGE = 10_000, 50_000
ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}


def step(name: str, folder: str, rows: int) -> dict[str, float]:
    """One step of perf.evaluation in a process of its own."""
    command = [sys.executable, "-m", "perf.evaluation", name, folder, str(rows)]
    done = subprocess.run(
        command, env=os.environ | ONE_THREAD, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout)


def evaluation(large: bool) -> str:
    with tempfile.TemporaryDirectory() as folder:
        step("features", folder, ROWS)
        took, used = step("speed", folder, ROWS), step("memory", folder, ROWS)
        row = f"| {ROWS:,} x 2048 | {memory_cells(used)} |"
        if large:
            step("features", folder, LARGE)
            row += f"\n| {LARGE:,} x 2048 | {memory_cells(step('memory', folder, LARGE))} |"
    base = took["theirs"]
    parts = ", ".join(
        f"{name} {took[key] / base:.2f}"
        for name, key in (("FID", "fid"), ("KID", "kid"), ("IS", "is"), ("PRC", "prc"))
    )
    return f"""## Evaluation

{ROWS:,} generated against {ROWS:,} held-out rows of 2048 features, power-law spectrum. torch-fidelity: FID, KID (100 subsets of
1000), IS and precision/recall by its functions on features, its defaults. Ours: FID, KID of all pairs, IS, precision, recall,
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


def memory_cells(used: dict[str, float]) -> str:
    above = (used["peak"] - used["loaded"], used["peak"] - used["imports"], used["peak"])
    return " | ".join([*(f"{value:.2f}" for value in above), f"{used['seconds']:.0f}"])


def training_step() -> str:
    rows = "\n".join(
        f"| {name} | {flops:.2f} | {time:.2f} |" for name, flops, time in meanflow_update.measure()
    )
    return f"""## Training step

One MeanFlow update on the digits network, batch {meanflow_update.B}, interleaved with its alternatives, medians of
{meanflow_update.ROUNDS}.

| update | FLOPs / forward | time / flow matching |
|---|---|---|
{rows}
"""


def machine() -> str:
    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], capture_output=True, text=True, cwd=RESULTS.parent
        ).stdout.strip()

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
        platform.processor(),
    )
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "torch-fidelity", "numpy"))
    commit = git("rev-parse", "--short", "HEAD") or "unknown"
    dirty = "-dirty" if git("status", "--porcelain", "--untracked-files=no") else ""
    return (
        f"{model}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start; one thread.\n"
        f"Python {platform.python_version()}, {packages}. Commit {commit}{dirty}, {date.today()}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m perf", description=__doc__)
    parser.add_argument("--large", action="store_true", help=f"also {LARGE:,} rows: minutes, 2 GB")
    arguments = parser.parse_args()
    where = machine()
    text = f"# Measured speed and memory\n\nBy `make bench` on {where}\n\n{evaluation(arguments.large)}\n{training_step()}"
    with tempfile.NamedTemporaryFile("w", dir=RESULTS.parent, delete=False) as file:
        file.write(text)
    os.chmod(file.name, 0o644)
    os.replace(file.name, RESULTS)
    print(text)


if __name__ == "__main__":
    main()
