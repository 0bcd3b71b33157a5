"""IS: how sure a classifier is of each image, and how evenly it sees the classes."""

from torch import Tensor
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric

from eval.metrics.statistics import check_features

# exp(-600) = 1e-261 stays above 0 in float64, even averaged over many rows.
LEAST_LOG_PROBABILITY = -600.0


def inception_score(logits: Tensor) -> float:
    """IS: exp E_x KL(p(y|x) | p(y)); Salimans et al. 2016, sec. 4.

    logits [N,C] -> float in [1, C], by torch-fidelity's function. One split: the usual ten bias it
    down where N is small. Log-probabilities are floored, since torch-fidelity answers NaN (0 times
    inf) where a class underflows to 0 in every row. Raises ValueError for other shapes or values
    that are not finite.
    """
    check_features(logits, logits, at_least=1)
    log_p = logits.double().log_softmax(dim=1).clamp_min(LEAST_LOG_PROBABILITY)
    found = isc_features_to_metric(log_p, splits=1, shuffle=False)
    return found[KEY_METRIC_ISC_MEAN]
