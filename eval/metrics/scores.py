"""All scores that need features alone, in one pass over the inner products of all pairs of rows.

`eval/metrics/pairwise.py` makes the products; `frechet`, `kid` and `neighbours` make the scores.
"""

from torch import Tensor

from eval.metrics.frechet import gaussian_distance
from eval.metrics.kid import unbiased_mmd
from eval.metrics.neighbours import compare
from eval.metrics.pairwise import NEIGHBOURS, Cloud, within
from eval.metrics.statistics import Gaussian, Reference, check_features


def feature_scores(gen: Tensor, reference: Reference) -> dict[str, float]:
    """fid, kid, precision, recall, density, coverage, c2st of gen [N,D] against a reference [M,D].

    fid, kid: `frechet_distance`, `kid`, of all N rows.

    precision, recall (Kynkaanniemi et al. 2019, eq. 1-2; k = 3) and coverage in [0, 1], density in
    [0, inf) (Naeem et al. 2020, sec. 3; k = 5). Same distribution: density 1, coverage 1 - 2^-5,
    precision and recall well below 1 (0.6 for Gaussians in 64-d). Literal copies: 1, 1, 1, 1. A
    distance equal to a radius counts for precision and recall (torch-fidelity's <=), and does not
    for density and coverage (prdc's <, as <= gives copies density 1 + 1/k).

    c2st in [0, 1]: accuracy of the leave-one-out nearest neighbour at telling generated from
    held-out rows (Lopez-Paz & Oquab 2017; Xu et al. 2018). 0.5: indistinguishable; 1: told apart;
    below 0.5: copies of the held-out rows. A row as near to the other set as to its own counts
    half.

    All but fid and kid grow with N, so numbers must be equal: gen is cut into consecutive pieces of
    M rows, each is compared with the reference, and the mean is returned; a last incomplete piece
    is left out, unless it is the only one (then c2st takes the first N rows of the reference).
    Memory: no N x M matrix, only blocks.

    Raises ValueError unless both are float32 or float64, of one width, of 6 rows or more, finite
    and below 1e15.
    """
    check_features(gen, reference.features, at_least=NEIGHBOURS[-1] + 1)
    ref = reference.statistics()
    n = len(gen)
    m = len(ref.cloud)
    cloud = Cloud(gen)
    own = within(cloud, min(n, m))
    compared = compare(cloud, own, ref.cloud, ref.within)
    c2st = compared.c2st
    if n < m:
        few = Cloud(reference.features[:n])
        c2st = compare(cloud, own, few, within(few, n)).c2st
    kernel_sums = (own.kernel_sum, ref.within.kernel_sum, compared.kernel_sum)
    return {
        "fid": gaussian_distance(Gaussian.of(cloud), ref.gaussian),
        "kid": unbiased_mmd(*kernel_sums, n, m),
        "precision": compared.precision,
        "recall": compared.recall,
        "density": compared.density,
        "coverage": compared.coverage,
        "c2st": c2st,
    }
