"""SLURM: where a stage of cells runs, its launcher on a login node, its job, the queue."""
