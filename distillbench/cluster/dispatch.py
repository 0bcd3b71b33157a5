"""Runs a stage of cells where the workflow says: here, or as a SLURM job. Imports no torch, so that waiting costs nothing.

python -m distillbench.cluster.dispatch PLACE STAMP REQUEST train digits dmd --seeds 0,1,2

PLACE: local, which turns this process into the command; or slurm, which submits it, waits and says how it ended. STAMP: the
workflow's output, beside which a job has its folder. REQUEST: what the job may use (`distillbench.resources.request`).
"""

from __future__ import annotations

import os
import sys

from distillbench.cells.environment import LINES, ONE_THREAD


def main(arguments: list[str]) -> int:
    """Replace this process by the command line's, with one thread; or wait for the job that runs it."""
    os.environ.update(dict.fromkeys(ONE_THREAD, "1") | {LINES: "1"})
    if len(arguments) < 4 or arguments[0] not in ("local", "slurm"):
        place = f"'{arguments[0]}'" if arguments else "nowhere"
        print(
            f"distillbench: dispatch to {place} is not supported, use 'local' or 'slurm'",
            file=sys.stderr,
        )
        return 2
    place, stamp, request, *words = arguments
    if place == "local":
        os.execve(
            sys.executable, [sys.executable, "-m", "distillbench.cli", *words], dict(os.environ)
        )
    from distillbench.cluster import launcher

    return launcher.main(stamp, request, words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
