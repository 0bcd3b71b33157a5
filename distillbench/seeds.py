"""Random numbers from (seed, role, step), never from a global stream nor a sum of integers."""

from __future__ import annotations

import hashlib

import torch
import torch.distributed as dist
from torch import Tensor


def derive(seed: int, *names: object) -> int:
    """A 63-bit seed, in [0, 2^63), from a seed and the names of its use.

    Distinct names give independent streams; names enter by their `repr`.
    """
    text = repr((seed, *names)).encode()
    digest = hashlib.blake2b(text, digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def ranks() -> tuple[int, int]:
    """This process's rank and the number of ranks: (0, 1) unless several train one cell."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


class Rng:
    """One named stream of random numbers, the same on every device.

    Rows are drawn for the global batch; rank r of W keeps rows r, r+W, ..., so that 1 rank and W
    ranks together see the same batch. Every draw of n rows gives this rank's own n, [n, ...].
    """

    def __init__(
        self,
        seed: int,
        *names: object,
        rank: int = 0,
        world: int = 1,
        device: torch.device | str = "cpu",
    ):
        # Always a CPU generator: the numbers do not depend on the device.
        self._generator = torch.Generator().manual_seed(derive(seed, *names))
        self._rank = rank
        self._world = world
        self._device = device

    def _own(self, rows: Tensor) -> Tensor:
        return rows[self._rank :: self._world].to(self._device)

    def normal(self, n: int, *shape: int) -> Tensor:
        """[n, *shape] standard normal, float32."""
        return self._own(torch.randn(n * self._world, *shape, generator=self._generator))

    def uniform(self, n: int) -> Tensor:
        """[n] uniform in [0, 1), float32."""
        return self._own(torch.rand(n * self._world, generator=self._generator))

    def integers(self, n: int, high: int) -> Tensor:
        """[n] integers in [0, high), int64."""
        return self._own(torch.randint(high, (n * self._world,), generator=self._generator))
