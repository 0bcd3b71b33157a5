"""Runs a stage of a cell's life where the workflow says: here, for now. Imports no torch, so that waiting costs nothing.

python -m distillbench.dispatch local train digits dmd
"""

from __future__ import annotations

import os
import sys

from distillbench.progress import LINES

ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")  # bytes repeat only at a fixed thread count


def main(arguments: list[str]) -> int:
    """Replace this process by the command line's, with one thread."""
    place, *command = arguments or [""]
    if place != "local":
        print(f"distillbench: dispatch to '{place}' is not supported, use 'local'", file=sys.stderr)
        return 2
    environment = os.environ | dict.fromkeys(ONE_THREAD, "1") | {LINES: "1"}
    os.execve(sys.executable, [sys.executable, "-m", "distillbench.cli", *command], environment)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
