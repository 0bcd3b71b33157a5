"""Several processes that train one cell: how they meet. One process alone unless WORLD_SIZE says otherwise (torch's `env://`)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

PATIENCE = timedelta(
    days=7
)  # the others wait while rank 0 samples; who dies is noticed by the launcher of the ranks


def alone() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) == 1


def leads() -> bool:
    """Whether this process is the one that writes."""
    return alone() or os.environ["RANK"] == "0"


@contextmanager
def joined() -> Iterator[None]:
    """Inside this block the processes of WORLD_SIZE are torch's process group: NCCL with a GPU for each, else gloo."""
    if alone():
        yield
        return
    import torch
    import torch.distributed as dist

    if gpus := torch.cuda.device_count():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % gpus)
    dist.init_process_group("nccl" if gpus else "gloo", timeout=PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


def meet() -> None:
    """Wait for all."""
    if not alone():
        import torch.distributed as dist

        dist.barrier()
