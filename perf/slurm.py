"""python -m perf.slurm [--cells 1000] [--jobs 24]: what the launchers cost on a real cluster; writes perf/slurm.md.

Needs what tests/slurm/cluster.py needs, and with accounting slurmdbd and mariadb-server. A dummy cell is `distillbench list`, about a
second, sent through the workflow's own path: Snakemake with the profile, a launcher, submitit, SLURM. 20 minutes on two cores.
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

import psutil

from distillbench.cluster.messages import OUTCOME, STARTED, read
from perf.__main__ import machine
from tests.conftest import Checkout
from tests.slurm.cluster import Cluster

REQUEST = {
    "nodes": 1,
    "ranks": 1,
    "gpus": 0,
    "cpus": 1,
    "memory_gb": 1,
    "minutes": 10,
    "time_limits": 1,
}
REQUEST |= {"tries": 1, "backoff_s": 0, "sbatch": {}}
AT_ONCE = 6
COMMANDS = ("sbatch", "squeue", "scancel", "scontrol", "sacct", "srun")
SNAKEFILE = """
rule all:
    input: expand("results/runs/dummy/arm/{{i}}.trained", i=range({cells}))

rule train:
    output: touch("results/runs/dummy/arm/{{i}}.trained")
    resources: dispatch="local", request={request!r}
    shell: "exec python -m distillbench.dispatch {{resources.dispatch}} {{output}} {{resources.request:q}} list"
"""


def checkout(folder: Path, cluster: Cluster) -> Checkout:
    folder.mkdir()
    made = Checkout(folder)
    made.environment |= {
        "SLURM_CONF": cluster.environment["SLURM_CONF"],
        "PATH": f"{made.environment['PATH']}:/usr/sbin",
    }
    (folder / "results/runs").mkdir(parents=True, exist_ok=True)
    return made


def noticed(site: Checkout, cluster: Cluster, dies: bool, index: int) -> float:
    """Seconds from a job's end, or from the kill of all its processes, until its launcher has ended."""
    stamp = site.folder / f"results/runs/dummy/{'dies' if dies else 'ends'}/{index}.trained"
    command = [
        sys.executable,
        "-m",
        "distillbench.dispatch",
        "slurm",
        str(stamp),
        json.dumps(REQUEST),
        "list",
    ]
    process = subprocess.Popen(
        command, cwd=site.folder, env=site.environment, stderr=subprocess.PIPE, text=True
    )
    folder = Path(f"{stamp}.slurm")
    if dies:
        while (number := read(folder / STARTED).get("job")) is None:
            time.sleep(0.05)
        cluster.run("scancel", "--signal=KILL", "--full", number)
        ended = time.time()
    _, errors = process.communicate(timeout=300)
    assert process.returncode == (1 if dies else 0), errors
    return time.time() - (ended if dies else read(folder / OUTCOME)["time"])


def notice(folder: Path, jobs: int) -> str:
    """How soon launchers know, with and without accounting."""
    rows = []
    for accounting in (False, True):
        cluster = Cluster(folder / f"cluster{accounting:d}", accounting=accounting)
        try:
            site = checkout(folder / f"notice{accounting:d}", cluster)
            for dies in (False, True):
                with ThreadPoolExecutor(AT_ONCE) as pool:
                    found = list(pool.map(partial(noticed, site, cluster, dies), range(jobs)))
                what = f"{'killed' if dies else 'done'} | {'with' if accounting else 'without'}"
                rows.append(
                    f"| {what} | {jobs} | {statistics.median(found):.1f} | {max(found):.1f} |"
                )
        finally:
            cluster.stop()
    return "\n".join(rows)


class Memory(threading.Thread):
    """The largest sum over Snakemake and the launchers, in MB: resident, and with shared pages counted once."""

    def __init__(self, folder: Path):
        super().__init__(daemon=True)
        self.folder, self.ended, self.processes, self.resident, self.proportional = (
            folder,
            threading.Event(),
            0,
            0.0,
            0.0,
        )

    def run(self) -> None:
        while not self.ended.wait(2):
            resident = proportional = count = 0
            for one in psutil.process_iter(["cmdline"]):
                words = " ".join(one.info["cmdline"] or [])
                try:
                    if (
                        "distillbench.dispatch slurm" in words or "snakemake" in words
                    ) and one.cwd() == str(self.folder):
                        found = one.memory_full_info()
                        resident, proportional, count = (
                            resident + found.rss,
                            proportional + found.pss,
                            count + 1,
                        )
                except psutil.Error:
                    continue
            if resident > 1e6 * self.resident:
                self.processes, self.resident, self.proportional = (
                    count,
                    resident / 1e6,
                    proportional / 1e6,
                )


def scale(folder: Path, cells: int) -> str:
    """Many dummy cells through the workflow's path: time, memory, SLURM's commands."""
    cluster = Cluster(folder / "cluster", cpus=4)
    try:
        site = checkout(folder / "scale", cluster)
        site.write(
            "Snakefile",
            SNAKEFILE.format(
                cells=cells, request=json.dumps(REQUEST | {"tries": 3, "backoff_s": 5})
            ),
        )
        for name in COMMANDS:
            real = shutil.which(name)
            site.write(
                f"bin/{name}", f'#!/bin/sh\necho >> {folder}/{name}.count\nexec {real} "$@"\n'
            ).chmod(0o755)
        site.environment["PATH"] = f"{site.folder}/bin:{site.environment['PATH']}"
        memory = Memory(site.folder)
        memory.start()
        began = time.monotonic()
        log = site.folder / "log"
        with open(log, "w") as f:
            code = subprocess.run(
                ["snakemake", "--profile", "slurm"],
                cwd=site.folder,
                env=site.environment,
                stdout=f,
                stderr=f,
            ).returncode
        seconds = time.monotonic() - began
        memory.ended.set()
        text = log.read_text()
        collected = len(list(site.folder.glob("results/runs/dummy/arm/*.trained")))
        submitted = len(set(re.findall(r"job (\d+) submitted", text)))
        said = "\n".join(
            line
            for line in text.splitlines()
            if line.startswith(("list: ", "distillbench: ")) and "submitted" not in line
        )
        assert code == 0 and collected == cells <= submitted, (
            f"{collected} of {cells}, {submitted} submitted\n{said[:5000]}"
        )
        counts = {
            name: (
                path.read_text().count("\n") if (path := folder / f"{name}.count").exists() else 0
            )
            for name in COMMANDS
        }
    finally:
        cluster.stop()
    reasons = Counter(re.findall(r"job \d+ lost: (\w+(?: \(\w+\))?)", text))
    lost = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    issued = ", ".join(f"{name} {count:,}" for name, count in counts.items() if count)
    each = seconds / max(counts["squeue"], 1)
    return f"""{collected:,} cells collected from {submitted:,} jobs in {seconds:.0f} s, {seconds / cells:.2f} s each;
{submitted - cells} were submitted again{": " if lost else "."}{lost}

SLURM's commands, from the login node and the jobs: {issued}; squeue once in {each:.1f} s.

Largest memory of Snakemake and the launchers that wait, {memory.processes} processes: {memory.resident:,.0f} MB resident,
{memory.proportional:,.0f} MB with shared pages counted once."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m perf.slurm", description=__doc__)
    parser.add_argument("--cells", type=int, default=1000)
    parser.add_argument(
        "--jobs", type=int, default=24, help="per kind of end, with and without accounting"
    )
    chosen, where = parser.parse_args(), machine()
    with tempfile.TemporaryDirectory() as name:
        rows = notice(Path(name), chosen.jobs)
        print(rows, flush=True)
        cells = scale(Path(name), chosen.cells)
    version = subprocess.run(["slurmctld", "-V"], capture_output=True, text=True).stdout.strip()
    Path(__file__).with_name("slurm.md").write_text(f"""# What the launchers cost on a cluster

By `python -m perf.slurm`, the cluster's two nodes on this one machine; {version}.
{where}

## How soon an end is noticed

Seconds from a job's end to the end of its launcher; {AT_ONCE} at a time. `killed`: all its processes at once, so that it leaves no outcome.

| job | accounting | jobs | median | largest |
|---|---|---|---|---|
{rows}

## Many short cells

{cells}
""")


if __name__ == "__main__":
    main()
