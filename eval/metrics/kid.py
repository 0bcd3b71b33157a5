"""KID: squared maximum mean discrepancy between two sets of features under a cubic kernel.

Tests hold it to torch-fidelity.
"""

from torch import Tensor

from eval.metrics.pairwise import Cloud, RowPairs
from eval.metrics.statistics import check_features


def kid(gen: Tensor, ref: Tensor) -> float:
    """KID: unbiased squared MMD under the kernel (x.y/D + 1)^3; Binkowski et al. 2018.

    gen [N,D], ref [M,D] -> float, over all pairs of rows, no subsets. Unbiased, so negative values
    are right: literal copies score below 0. No scale-free unit: assumes features of RMS 1. Raises
    ValueError as `frechet_distance` does.
    """
    check_features(gen, ref, at_least=2)
    x = Cloud(gen)
    y = Cloud(ref)
    gen_sum = _kernel_sum(RowPairs(x, x))
    ref_sum = _kernel_sum(RowPairs(y, y))
    cross_sum = _kernel_sum(RowPairs(x, y))
    return unbiased_mmd(gen_sum, ref_sum, cross_sum, len(gen), len(ref))


def unbiased_mmd(gen_sum: float, ref_sum: float, cross_sum: float, n: int, m: int) -> float:
    """Squared MMD from sums of the kernel over pairs; Binkowski et al. 2018, eq. 4.

    gen_sum, ref_sum: over the n (n - 1) and m (m - 1) ordered pairs of two rows of one set;
    cross_sum: over all n m pairs of a generated and a reference row.
    """
    return gen_sum / (n * (n - 1)) + ref_sum / (m * (m - 1)) - 2 * cross_sum / (n * m)


def _kernel_sum(pairs: RowPairs) -> float:
    return sum(pairs.kernel_sum(*block) for block in pairs.blocks())
