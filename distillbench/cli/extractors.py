"""What images are scored by and as: extractors whose weights are there, and images as bytes."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from distillbench.config import Benchmark
from distillbench.errors import UserError

if TYPE_CHECKING:
    from distillbench.data.images import Images


def check_extractors(benchmarks: list[Benchmark]) -> None:
    """UserError on a benchmark whose extractor eval does not have, or has without its weights."""
    from eval.features.weights import weight_file

    for b in benchmarks:
        for key, name in (("extractor", b.extractor), ("cross_extractor", b.cross_extractor)):
            try:
                if name is not None:
                    weight_file(name)
            except ValueError as e:
                raise UserError(f"workflows/benchmarks/{b.name}.yaml: key '{key}': {e}") from None


def stored_images(data: Images) -> Images:
    """A data set whose images are as evaluation takes them: uint8 [N,C,H,W]."""
    from distillbench.data.images import to_bytes

    return dataclasses.replace(data, train=to_bytes(data.train), reference=to_bytes(data.reference))
