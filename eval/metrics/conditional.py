"""Scores that know which class, or which noise, a sample was asked for.

Pure functions on logits, features and pixels. FID and its kin compare two clouds and cannot see
these: samples of the wrong class in the right proportions leave every one of them unchanged, and so
does a student that forgets which noise belongs to which image.
"""

import torch
from torch import Tensor

ROWS = 2048  # at once: bounds memory


def class_accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of samples whose predicted class is the requested one.

    logits [N,K], labels int64 [N] in 0..K-1 -> float in [0, 1]; 1/K is chance. What the classifier
    says of real images (row `floor`) is the most one can ask. Raises ValueError for other shapes,
    labels out of range, or logits that are not finite.
    """
    return float((_predicted(logits, labels) == labels).double().mean())


def label_tv(logits: Tensor, labels: Tensor) -> float:
    """Total variation, half the L1 distance, between histograms of predicted and requested classes.

    logits [N,K], labels int64 [N] in 0..K-1 -> float in [0, 1 - 1/K] where all classes are
    requested equally often: 0.1 if one class of ten is missing, 0.9 if all samples are of one
    class. Blind to mix-ups that keep the proportions, which `class_accuracy` sees. Raises
    ValueError as `class_accuracy` does.
    """
    classes = logits.shape[1]
    predicted = _predicted(logits, labels).bincount(minlength=classes).double()
    requested = labels.bincount(minlength=classes).double()
    return float((predicted - requested).abs().sum() / (2 * len(labels)))


def diversity(
    features: Tensor, labels: Tensor, ref_features: Tensor, ref_labels: Tensor
) -> float | None:
    """Mean distance between two samples of one requested class, over the same of real images.

    Both means are averaged over classes. features [N,D], labels int64 [N]; ref_features [M,D],
    ref_labels int64 [M] -> float >= 0: 1 = as diverse as reality, 0 = one image per class, above 1
    = too spread (noise). Pairs of different samples only, so N need not equal M: the mean is
    unbiased at any N. The feature-space form of the intra-class LPIPS diversity of few-step papers.

    Classes with fewer than two samples have no pair and are left out on that side; None if one side
    has no pair at all or reality does not vary. Raises ValueError for other shapes or features that
    are not finite.
    """
    generated = _within_class(features, labels)
    real = _within_class(ref_features, ref_labels)
    if generated is None or real is None or real == 0:
        return None
    return generated / real


def noise_distance(images_u8: Tensor, teacher_u8: Tensor, labels: Tensor) -> float | None:
    """RMS pixel distance to the teacher's sample of the same noise and label, over other pairs'.

    Both uint8 [N,...] of one shape, labels int64 [N] -> float >= 0: 0 = the teacher's own samples,
    1 = no relation to its noise beyond the class. Descriptive: only a method that follows the
    teacher's trajectories aims at 0; distribution matching need not keep the coupling and is not
    worse for losing it.

    The other pairs are all i != j of a class, in place of shuffling once, in closed form:
    sum_ij |x_i - y_j|^2 = n sum |x|^2 + n sum |y|^2 - 2 (sum x).(sum y); integers in float64, hence
    exact. None if no class has two samples or nothing varies. Raises ValueError for other shapes or
    dtypes.
    """
    if (
        images_u8.dtype != torch.uint8
        or teacher_u8.dtype != torch.uint8
        or images_u8.shape != teacher_u8.shape
    ):
        images = f"{images_u8.dtype} {list(images_u8.shape)}"
        teacher = f"{teacher_u8.dtype} {list(teacher_u8.shape)}"
        raise ValueError(
            f"expected uint8 images of one shape, sample by sample, got {images} and {teacher}"
        )
    _check_labels(images_u8, labels)
    same = 0.0
    shuffled = 0.0
    for c in labels.unique():
        x = images_u8[labels == c].flatten(1)
        y = teacher_u8[labels == c].flatten(1)
        n = len(x)
        if n < 2:
            continue
        own = 0.0
        squares = 0.0
        sum_x = torch.zeros(x.shape[1], dtype=torch.float64)
        sum_y = torch.zeros(x.shape[1], dtype=torch.float64)
        for x_rows, y_rows in zip(x.split(ROWS), y.split(ROWS)):
            a = x_rows.double()
            b = y_rows.double()
            own += float((a - b).square().sum())
            squares += float(a.square().sum() + b.square().sum())
            sum_x += a.sum(0)
            sum_y += b.sum(0)
        same += own
        others = n * squares - 2 * float(sum_x @ sum_y) - own
        shuffled += others / (n - 1)  # n times the mean over the n (n - 1) other pairs
    return (same / shuffled) ** 0.5 if shuffled else None


def _within_class(features: Tensor, labels: Tensor) -> float | None:
    """Mean distance of two rows of one class, averaged over the classes that have two."""
    _check_labels(features, labels)
    if features.ndim != 2 or not features.isfinite().all():
        raise ValueError(f"expected a matrix of finite features, got {list(features.shape)}")
    means = []
    for c in labels.unique():
        parts = features[labels == c].split(ROWS)
        n = sum(map(len, parts))
        if n < 2:
            continue
        # Direct differences, not the product form: equal rows must be at distance 0. Every pair
        # once.
        total = sum(float(torch.pdist(part).double().sum()) for part in parts)
        for i, part in enumerate(parts):
            for other in parts[i + 1 :]:
                distances = torch.cdist(part, other, compute_mode="donot_use_mm_for_euclid_dist")
                total += float(distances.double().sum())
        means.append(2 * total / (n * (n - 1)))
    return sum(means) / len(means) if means else None


def _predicted(logits: Tensor, labels: Tensor) -> Tensor:
    """Class of the largest logit, int64 [N]; ValueError for what is not logits and labels."""
    _check_labels(logits, labels)
    if (
        logits.ndim != 2
        or not logits.isfinite().all()
        or labels.min() < 0
        or labels.max() >= logits.shape[1]
    ):
        got = f"logits {list(logits.shape)}, labels up to {labels.max()}"
        raise ValueError(f"expected finite logits [N,K] and labels in 0..K-1, got {got}")
    return logits.argmax(dim=1)


def _check_labels(rows: Tensor, labels: Tensor) -> None:
    if labels.dtype != torch.int64 or labels.shape != (len(rows),) or len(rows) == 0:
        got = f"{labels.dtype} {list(labels.shape)} for {len(rows)} rows"
        raise ValueError(f"expected one int64 label per row, got {got}")
