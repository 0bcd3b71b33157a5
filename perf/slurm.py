"""python -m perf.slurm [--cells 1000] [--jobs 24]: what the launchers cost on a real cluster.

Writes perf/slurm.md. Needs what tests/slurm/cluster.py needs, and with accounting slurmdbd and
mariadb-server. A dummy cell is `distillbench list`, about a second, sent through the workflow's own
path: Snakemake with the profile, a launcher, submitit, SLURM. 20 minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from distillbench.cluster.messages import OUTCOME, STARTED, read
from perf.__main__ import machine
from tests.conftest import Checkout
from tests.slurm.cluster import Cluster

REQUEST: dict[str, Any] = {
    "nodes": 1,
    "ranks": 1,
    "gpus": 0,
    "cpus": 1,
    "memory_gb": 1,
    "minutes": 10,
    "time_limits": 1,
    "tries": 1,
    "backoff_s": 0,
    "sbatch": {},
}
AT_ONCE = 6
DISPATCH = "distillbench.cluster.dispatch"
COMMANDS = ("sbatch", "squeue", "scancel", "scontrol", "sacct", "srun")
SNAKEFILE = """
rule all:
    input: expand("results/runs/dummy/arm/{{i}}.trained", i=range({cells}))

rule train:
    output: touch("results/runs/dummy/arm/{{i}}.trained")
    resources: dispatch="local", request={request!r}
    shell:
        "exec python -m distillbench.cluster.dispatch"
        " {{resources.dispatch}} {{output}} {{resources.request:q}} list"
"""


def checkout(folder: Path, cluster: Cluster) -> Checkout:
    """A checkout at `folder` whose commands reach the cluster."""
    folder.mkdir()
    made = Checkout(folder)
    made.environment |= {
        "SLURM_CONF": cluster.environment["SLURM_CONF"],
        "PATH": f"{made.environment['PATH']}:/usr/sbin",
    }
    (folder / "results/runs").mkdir(parents=True, exist_ok=True)
    return made


def noticed(site: Checkout, cluster: Cluster, dies: bool, index: int) -> float:
    """Seconds from a job's end, or from the kill of all its processes, to its launcher's end."""
    end = "dies" if dies else "ends"
    stamp = site.folder / f"results/runs/dummy/{end}/{index}.trained"
    dispatch = [sys.executable, "-m", DISPATCH, "slurm"]
    command = [*dispatch, str(stamp), json.dumps(REQUEST), "list"]
    process = subprocess.Popen(
        command, cwd=site.folder, env=site.environment, stderr=subprocess.PIPE, text=True
    )
    folder = Path(f"{stamp}.slurm")
    if dies:
        number = read(folder / STARTED).get("job")
        while number is None:
            time.sleep(0.05)
            number = read(folder / STARTED).get("job")
        cluster.run("scancel", "--signal=KILL", "--full", number)
        ended = time.time()
    _, errors = process.communicate(timeout=300)
    assert process.returncode == (1 if dies else 0), errors
    now = time.time()
    if not dies:
        ended = read(folder / OUTCOME)["time"]
    return now - ended


def notice(folder: Path, jobs: int) -> str:
    """Rows of how soon launchers know, with and without accounting."""
    rows = []
    for accounting in (False, True):
        cluster = Cluster(folder / f"cluster{accounting:d}", accounting=accounting)
        try:
            site = checkout(folder / f"notice{accounting:d}", cluster)
            for dies in (False, True):
                with ThreadPoolExecutor(AT_ONCE) as pool:
                    seconds = list(pool.map(partial(noticed, site, cluster, dies), range(jobs)))
                end = "killed" if dies else "done"
                kept = "with" if accounting else "without"
                times = f"{statistics.median(seconds):.1f} | {max(seconds):.1f}"
                rows.append(f"| {end} | {kept} | {jobs} | {times} |")
        finally:
            cluster.stop()
    return "\n".join(rows)


class Memory(threading.Thread):
    """The largest sum over Snakemake and the launchers, in MB.

    resident: of all pages; proportional: with shared pages counted once; processes: how many.
    """

    def __init__(self, folder: Path):
        super().__init__(daemon=True)
        self.folder = folder
        self.ended = threading.Event()
        self.processes = 0
        self.resident = 0.0
        self.proportional = 0.0

    def run(self) -> None:
        """Look every two seconds until `ended`."""
        while not self.ended.wait(2):
            resident = 0.0
            proportional = 0.0
            count = 0
            for process in psutil.process_iter(["cmdline"]):
                words = " ".join(process.info["cmdline"] or [])
                if f"{DISPATCH} slurm" not in words and "snakemake" not in words:
                    continue
                try:
                    if process.cwd() != str(self.folder):
                        continue
                    memory = process.memory_full_info()
                except psutil.Error:
                    continue
                resident += memory.rss / 1e6
                proportional += memory.pss / 1e6
                count += 1
            if resident > self.resident:
                self.processes = count
                self.resident = resident
                self.proportional = proportional


def count_commands(site: Checkout, folder: Path) -> None:
    """Put a wrapper before each of SLURM's commands that writes a line for every call."""
    for name in COMMANDS:
        script = f'#!/bin/sh\necho >> {folder}/{name}.count\nexec {shutil.which(name)} "$@"\n'
        site.write(f"bin/{name}", script).chmod(0o755)
    site.environment["PATH"] = f"{site.folder}/bin:{site.environment['PATH']}"


def calls(folder: Path, name: str) -> int:
    """How often one of SLURM's commands was called."""
    path = folder / f"{name}.count"
    return path.read_text(encoding="utf-8").count("\n") if path.exists() else 0


def complaints(log: str) -> str:
    """What launchers said besides their submissions."""
    lines = []
    for line in log.splitlines():
        if line.startswith(("list: ", "distillbench: ")) and "submitted" not in line:
            lines.append(line)
    return "\n".join(lines)


def scale(folder: Path, cells: int) -> str:
    """Many dummy cells through the workflow's path: time, memory, SLURM's commands."""
    cluster = Cluster(folder / "cluster", cpus=4)
    try:
        site = checkout(folder / "scale", cluster)
        request = json.dumps(REQUEST | {"tries": 3, "backoff_s": 5})
        site.write("Snakefile", SNAKEFILE.format(cells=cells, request=request))
        count_commands(site, folder)
        memory = Memory(site.folder)
        memory.start()
        began = time.monotonic()
        log = site.folder / "log"
        command = ["snakemake", "--profile", "slurm"]
        with open(log, "w", encoding="utf-8") as f:
            done = subprocess.run(
                command, cwd=site.folder, env=site.environment, stdout=f, stderr=f
            )
        seconds = time.monotonic() - began
        memory.ended.set()
        text = log.read_text(encoding="utf-8")
        collected = len(list(site.folder.glob("results/runs/dummy/arm/*.trained")))
        submitted = len(set(re.findall(r"job (\d+) submitted", text)))
        assert done.returncode == 0 and collected == cells <= submitted, (
            f"{collected} of {cells}, {submitted} submitted\n{complaints(text)[:5000]}"
        )
        counts = {name: calls(folder, name) for name in COMMANDS}
    finally:
        cluster.stop()
    reasons = Counter(re.findall(r"job \d+ lost: (\w+(?: \(\w+\))?)", text))
    lost = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    issued = ", ".join(f"{name} {count:,}" for name, count in counts.items() if count)
    each = seconds / max(counts["squeue"], 1)
    return f"""{collected:,} cells collected from {submitted:,} jobs in {seconds:.0f} s, \
{seconds / cells:.2f} s each;
{submitted - cells} were submitted again{": " if lost else "."}{lost}

SLURM's commands, from the login node and the jobs: {issued}; squeue once in {each:.1f} s.

Largest memory of Snakemake and the launchers that wait, {memory.processes} processes: \
{memory.resident:,.0f} MB resident,
{memory.proportional:,.0f} MB with shared pages counted once."""


def main() -> None:
    """Measure and write perf/slurm.md."""
    parser = argparse.ArgumentParser(prog="python -m perf.slurm", description=__doc__)
    parser.add_argument("--cells", type=int, default=1000)
    parser.add_argument(
        "--jobs", type=int, default=24, help="per kind of end, with and without accounting"
    )
    chosen = parser.parse_args()
    where = machine()
    with tempfile.TemporaryDirectory() as name:
        rows = notice(Path(name), chosen.jobs)
        print(rows, flush=True)
        cells = scale(Path(name), chosen.cells)
    version = subprocess.run(["slurmctld", "-V"], capture_output=True, text=True).stdout.strip()
    page = f"""# What the launchers cost on a cluster

By `python -m perf.slurm`, the cluster's two nodes on this one machine; {version}.
{where}

## How soon an end is noticed

Seconds from a job's end to the end of its launcher; {AT_ONCE} at a time. `killed`: all its \
processes at once, so that it leaves no outcome.

| job | accounting | jobs | median | largest |
|---|---|---|---|---|
{rows}

## Many short cells

{cells}
"""
    Path(__file__).with_name("slurm.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
