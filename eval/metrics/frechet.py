"""FID: the Fréchet distance between two Gaussians that have the moments of two sets of features.

Tests hold it to torch-fidelity and to clean-fid. Never rank on FID alone: conditional-mean blur,
the typical failure of distillation, beats real data on IS and passes precision; only recall and
coverage see it.
"""

import torch
from torch import Tensor

from eval.metrics.pairwise import Cloud, product
from eval.metrics.statistics import Gaussian, Reference, check_features


def frechet_distance(gen: Tensor, ref: Tensor | Reference) -> float:
    """FID: |mu_g - mu_r|^2 + tr(S_g + S_r - 2 (S_g S_r)^(1/2)); Heusel et al. 2017, eq. 6.

    gen [N,D], ref [M,D] or a Reference, whose factors are then computed once -> float >= 0 up to
    rounding (copies give about -1e-7), in squared feature units (x3 gives x9). Float64 inside.
    Raises ValueError for other shapes or dtypes, fewer than two rows, or values that are not
    finite.
    """
    reference = ref if isinstance(ref, Reference) else Reference(ref, "")
    check_features(gen, reference.features, at_least=2)
    return gaussian_distance(Gaussian.of(Cloud(gen)), reference.statistics().gaussian)


def gaussian_distance(gen: Gaussian, ref: Gaussian) -> float:
    """Squared Fréchet distance between two Gaussians of one width.

    With h h^T = S_r, (S_g S_r)^(1/2) has the trace of (h^T S_g h)^(1/2), which is symmetric: no
    complex square root.
    """
    symmetric = product(product(ref.root.T, gen.covariance), ref.root)
    eigenvalues = torch.linalg.eigvalsh(symmetric)
    cross = eigenvalues.clamp_min_(0).sqrt_().sum()
    gap = (gen.mean - ref.mean).square().sum()
    return (gap + gen.covariance.trace() + ref.covariance.trace() - 2 * cross).item()
