"""Names of the environment variables that processes of the suite pass to each other.

Imports nothing.
"""

# Set: progress is printed as lines, in place of bars, which jobs that share a terminal overwrite.
LINES = "DISTILLBENCH_LINES"
# Seconds since the epoch at which the workflow began; launchers tell by it which cancellation is
# meant for them.
BEGAN = "DISTILLBENCH_BEGAN"
# Path of a SLURM job's log, relative to the checkout, for the record of a cell that failed in it.
LOG = "DISTILLBENCH_LOG"
# Thread counts of the numerical libraries; bytes repeat only at a fixed count.
ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
