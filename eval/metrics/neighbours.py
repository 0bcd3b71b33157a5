"""Scores of nearest neighbours: precision, recall, density, coverage and c2st.

`compare` makes them from one pass over all pairs of a generated and a reference row, which gives
the kernel sum of KID as well. Tests hold precision and recall to torch-fidelity, density and
coverage to prdc.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from eval.metrics.pairwise import NEIGHBOURS, Cloud, RowPairs, Within

K_PRECISION_RECALL = 3  # order of the neighbour whose distance is the radius of a row
K_DENSITY_COVERAGE = 5


@dataclass(frozen=True)
class Comparison:
    """Outcome of one pass over all pairs of a generated and a reference row."""

    kernel_sum: float  # of (x.y/D + 1)^3 over all pairs
    precision: float
    recall: float
    density: float
    coverage: float
    c2st: float


def compare(gen: Cloud, gen_within: Within, ref: Cloud, ref_within: Within) -> Comparison:
    """Kernel sum and scores of neighbours of gen [N,D] against ref [M,D].

    gen_within: of gen in pieces of M rows (or in one piece of N < M rows); ref_within: of ref in
    one piece. Each piece of gen is compared with all of ref; scores are means over the pieces, and
    only rows of gen that have a radius count. `feature_scores` says what each score is.
    """
    pairs = RowPairs(gen, ref)
    m = len(ref)
    used = len(gen_within.radii)
    pieces = -(-used // m)
    gen_radii = _by_order(gen_within.radii)
    ref_radii = _by_order(ref_within.radii)
    gen_limits = gen_within.radii[:, [NEIGHBOURS.index(1), NEIGHBOURS.index(K_PRECISION_RECALL)]]
    precise = torch.zeros(used, dtype=torch.bool)
    recalled = torch.zeros(pieces * m, dtype=torch.bool)
    covered = torch.zeros(pieces * m, dtype=torch.bool)
    # How far the other set is the nearest: 1, or 1/2 where both are as near, else 0. Per row of
    # gen, and of ref in every piece.
    gen_taken = torch.zeros(used)
    ref_taken = torch.zeros(pieces * m)
    inside = 0
    kernel_sum = 0.0
    for block_rows, cols, products in pairs.blocks():
        kernel_sum += pairs.kernel_sum(block_rows, cols, products)
        last = max(block_rows.start, min(block_rows.stop, used))
        rows = slice(block_rows.start, last)
        lower = pairs.lower_(rows, cols, products[: rows.stop - rows.start])
        i, j, squared = pairs.near(rows, cols, lower, gen_limits, ref_within.radii)
        in_piece = i // m * m + j  # row of ref, in the piece of row i
        is_precise = squared <= ref_radii[K_PRECISION_RECALL][j]
        precise[i[is_precise]] = True
        is_recalled = squared <= gen_radii[K_PRECISION_RECALL][i]
        recalled[in_piece[is_recalled]] = True
        is_dense = squared < ref_radii[K_DENSITY_COVERAGE][j]
        inside += int(is_dense.sum())
        covered[in_piece[is_dense]] = True
        _take(gen_taken, i, squared, gen_radii[1][i])
        _take(ref_taken, in_piece, squared, ref_radii[1][j])
    return Comparison(
        kernel_sum=kernel_sum,
        precision=precise.double().mean().item(),
        recall=recalled.double().mean().item(),
        density=inside / (K_DENSITY_COVERAGE * used),
        coverage=covered.double().mean().item(),
        c2st=1 - (gen_taken.double().mean().item() + ref_taken.double().mean().item()) / 2,
    )


def _by_order(radii: Tensor) -> dict[int, Tensor]:
    """Squared distances [N] to the k-th nearest row, by k of NEIGHBOURS."""
    return dict(zip(NEIGHBOURS, radii.T.contiguous(), strict=True))


def _take(taken: Tensor, index: Tensor, squared: Tensor, nearest: Tensor) -> None:
    """Raise taken[index] to 1 where a pair is nearer than the nearest own row, 1/2 where as near.

    squared, nearest: float64 [pairs], of the pairs and of the nearest row of the own set.
    """
    share = ((squared < nearest).float() + (squared <= nearest).float()) / 2
    taken.scatter_reduce_(0, index, share, "amax")
