"""`make test-slow`: runs the slow tests and writes tests/slow.md.

The log is tracked and states commit, versions and seconds.
"""

from __future__ import annotations

import platform
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from importlib.metadata import version
from pathlib import Path

LOG = Path(__file__).with_name("slow.md")


def git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=LOG.parent, capture_output=True, text=True
    ).stdout.strip()


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-m",
            "slow",
            "-n",
            "1",
            f"--junitxml={report}",
            str(LOG.parent),
        ]
        code = subprocess.run(command).returncode
        cases = ElementTree.parse(report).getroot().iter("testcase")
        lines = []
        for case in cases:
            ended = next(
                (c.tag for c in case if c.tag in ("failure", "error", "skipped")), "passed"
            )
            lines.append(
                f"| {case.get('classname')} {case.get('name')} | {ended} "
                f"| {float(case.get('time', 0)):.0f} |"
            )
    dirty = (
        " with uncommitted changes" if git("status", "--porcelain", "--", "..", ":!slow.md") else ""
    )
    head = [
        "# Slow tests",
        "",
        f"Commit {git('rev-parse', '--short=12', 'HEAD')}{dirty}; "
        f"Python {platform.python_version()}, torch {version('torch')}, "
        f"snakemake {version('snakemake')}; written by `make test-slow`.",
        "",
        "| test | outcome | seconds |",
        "|---|---|---|",
    ]
    LOG.write_text("\n".join(head + sorted(lines)) + "\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
