"""Ranks: several processes that train one cell, and how they meet.

One process alone unless WORLD_SIZE says otherwise (torch's `env://`). Imports no torch for one
process alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

# The others wait while rank 0 samples; one that dies is noticed by the launcher of the ranks.
PATIENCE = timedelta(days=7)


def alone() -> bool:
    """Whether this process is the only one that trains its cell."""
    return int(os.environ.get("WORLD_SIZE", "1")) == 1


def leads() -> bool:
    """Whether this process is the one that writes."""
    return alone() or os.environ["RANK"] == "0"


@contextmanager
def joined() -> Iterator[None]:
    """A block in which the processes of WORLD_SIZE are torch's process group.

    Over NCCL with a GPU for each where there are GPUs, else over gloo.
    """
    if alone():
        yield
        return
    import torch
    import torch.distributed as dist

    gpus = torch.cuda.device_count()
    if gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % gpus)
    dist.init_process_group("nccl" if gpus else "gloo", timeout=PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


def barrier() -> None:
    """Barrier over all ranks; nothing for one process alone."""
    if not alone():
        import torch.distributed as dist

        dist.barrier()
