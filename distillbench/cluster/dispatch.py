"""Runs a stage of cells where the workflow says: here, or as a SLURM job.

    python -m distillbench.cluster.dispatch WHERE STAMP REQUEST train digits dmd --seeds 0,1,2

WHERE: local, which turns this process into the command; or slurm, which submits it, waits and says
how it ended. STAMP: the workflow's output, beside which a job has its folder. REQUEST: what the job
may use (`registry.resources.request`). Imports no torch, so that waiting costs nothing.
"""

from __future__ import annotations

import os
import sys

from distillbench.cells.environment import LINES, ONE_THREAD

USAGE_ERROR = 2  # exit code


def main(arguments: list[str]) -> int:
    """Replace this process by the command line's, with one thread; or wait for the job's end."""
    os.environ.update(dict.fromkeys(ONE_THREAD, "1"))
    os.environ[LINES] = "1"
    if len(arguments) < 4 or arguments[0] not in ("local", "slurm"):
        where = f"'{arguments[0]}'" if arguments else "nowhere"
        print(
            f"distillbench: dispatch to {where} is not supported, use 'local' or 'slurm'",
            file=sys.stderr,
        )
        return USAGE_ERROR
    where, stamp, request, *words = arguments
    if where == "local":
        command = [sys.executable, "-m", "distillbench.cli", *words]
        os.execve(sys.executable, command, dict(os.environ))
    from distillbench.cluster import launcher

    return launcher.main(stamp, request, words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
