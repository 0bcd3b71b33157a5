"""Scores that know classes and noise: closed forms, oracles by brute force, planted errors."""

import math

import pytest
import torch
from torch import Tensor

from eval.metrics import conditional
from eval.metrics.conditional import class_accuracy, diversity, label_tv, noise_distance

N, K = 2000, 10
TURN = torch.arange(N) % K


def one_hot(predicted: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(predicted, K).float()


def normal(n: int, d: int, seed: int) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def pixels(n: int, seed: int) -> Tensor:
    return torch.randint(
        0, 256, (n, 1, 4, 4), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )


def clouds(spread: float, seed: int, n: int = N) -> Tensor:
    """Gaussian classes [n,8] of this spread, far apart."""
    return 50 * one_hot(torch.arange(n) % K)[:, :8] + spread * normal(n, 8, seed)


def test_accuracy_and_label_tv_of_known_predictions():
    assert (class_accuracy(one_hot(TURN), TURN), label_tv(one_hot(TURN), TURN)) == (1, 0)
    missing = TURN.where(TURN != 9, 0)  # who asks for the last class gets the first
    assert (
        class_accuracy(one_hot(missing), TURN),
        label_tv(one_hot(missing), TURN),
    ) == pytest.approx((0.9, 0.1))
    constant = torch.full((N,), 4)
    assert (
        class_accuracy(one_hot(constant), TURN),
        label_tv(one_hot(constant), TURN),
    ) == pytest.approx((0.1, 0.9))
    # every class is another, in the same proportions: only the accuracy can see it
    swapped = (TURN + 1) % K
    assert (class_accuracy(one_hot(swapped), TURN), label_tv(one_hot(swapped), TURN)) == (0, 0)


def test_label_tv_is_against_the_classes_asked_for():
    # a quarter of class 1
    half = torch.zeros(100, dtype=torch.long).scatter_(0, torch.arange(25), 1)
    assert label_tv(one_hot(half), half) == 0
    assert label_tv(one_hot(half), torch.arange(100) % 2) == pytest.approx(0.25)


def test_a_wrong_order_of_labels_is_seen():
    blocks = torch.arange(N) // (N // K)  # sorted instead of in turn
    assert (
        class_accuracy(one_hot(TURN), blocks) == pytest.approx(1 / K)
        and label_tv(one_hot(TURN), blocks) == 0
    )
    assert diversity(clouds(1, 0), TURN, clouds(1, 1), TURN) == pytest.approx(1, abs=0.02)
    assert diversity(clouds(1, 0), blocks, clouds(1, 1), TURN) > 5
    y = pixels(N, 0)
    # one off: no relation left
    assert noise_distance(y.roll(1, 0), y, TURN) == pytest.approx(1, abs=0.02)


def test_diversity_is_the_ratio_of_spreads_at_any_number_of_samples():
    real = clouds(1, 0)
    for spread in (0.5, 1, 3):
        assert diversity(clouds(spread, 1), TURN, real, TURN) == pytest.approx(spread, rel=0.02)
    # generated first
    assert diversity(real, TURN, clouds(2, 1), TURN) == pytest.approx(0.5, rel=0.02)
    # 4 of a class: no bias
    few = [diversity(clouds(1, seed, 40), TURN[:40], real, TURN) for seed in range(20)]
    assert sum(few) / 20 == pytest.approx(1, abs=0.05)
    # The law is E|x - y| = 2 s G((d + 1)/2) / G(d/2) for Gaussians in d dimensions.
    exact = 2 * math.gamma(4.5) / math.gamma(4)
    assert conditional._within_class(real, TURN) == pytest.approx(exact, rel=0.01)


def test_diversity_of_one_image_per_class_is_exactly_zero():
    means = (normal(K, 8, 3) / 3)[TURN]
    assert diversity(means, TURN, clouds(1, 0), TURN) == 0
    # if classes were forgotten
    assert diversity(means, torch.zeros(N, dtype=torch.long), clouds(1, 0), TURN) > 0


def test_diversity_is_brute_force_and_chunks_do_not_matter(monkeypatch):
    x, labels = clouds(1, 0, 60), TURN[:60]
    pairs = [
        [
            (x[i] - x[j]).norm().item()
            for i in range(60)
            for j in range(60)
            if i != j and labels[i] == labels[j] == c
        ]
        for c in range(K)
    ]
    expected = sum(sum(p) / len(p) for p in pairs) / K
    assert conditional._within_class(x, labels) == pytest.approx(expected, rel=1e-5)
    y, whole = pixels(60, 1), conditional._within_class(x, labels)
    distance = noise_distance(y, y.roll(10, 0), labels)
    monkeypatch.setattr(conditional, "ROWS", 4)
    assert conditional._within_class(x, labels) == pytest.approx(whole, rel=1e-6)
    assert noise_distance(y, y.roll(10, 0), labels) == distance  # integers: to the last bit


def test_noise_distance_of_known_relations():
    y = pixels(N, 0)
    assert noise_distance(y, y, TURN) == 0
    unrelated = torch.cat([y[c == TURN].roll(7, 0) for c in range(K)])[
        torch.argsort(torch.argsort(TURN, stable=True))
    ]
    assert noise_distance(unrelated, y, TURN) == pytest.approx(1, abs=0.02)
    # x = y + c for two-valued y:
    # same^2 = c^2, shuffled^2 = c^2 + 2 var (n / (n - 1) for pairs of different samples).
    labels = torch.zeros(1000, dtype=torch.long)
    flip = 40 * (torch.arange(1000) % 2).view(-1, 1, 1, 1).to(torch.uint8)
    assert noise_distance(flip + 30, flip, labels) == pytest.approx(
        math.sqrt(900 / (900 + 2 * 400 * 1000 / 999))
    )
    opposite = noise_distance(40 - flip, flip, labels)
    assert opposite > 1.4  # each as far as can be: sqrt 2


def test_noise_distance_is_brute_force_for_classes_of_any_size():
    x, y, labels = pixels(30, 0), pixels(30, 1), TURN[:30] % 3  # 12, 9 and 9

    def squared(i: int, others: list[int]) -> float:
        return sum((x[i].double() - y[j].double()).square().mean().item() for j in others) / len(
            others
        )

    same = sum(squared(i, [i]) for i in range(30))
    other = sum(
        squared(i, [j for j in range(30) if j != i and labels[j] == labels[i]]) for i in range(30)
    )
    assert noise_distance(x, y, labels) == pytest.approx(math.sqrt(same / other), rel=1e-12)


def test_what_has_no_pair_has_no_score():
    alone = torch.arange(6)
    assert diversity(normal(6, 4, 0), alone, clouds(1, 0), TURN) is None
    # no varying reality
    assert (
        diversity(clouds(1, 0), TURN, torch.zeros(6, 8), torch.zeros(6, dtype=torch.long)) is None
    )
    assert noise_distance(pixels(6, 0), pixels(6, 1), alone) is None
    black = torch.zeros(6, 1, 4, 4, dtype=torch.uint8)
    assert noise_distance(black, black, alone % 2) is None


def test_bad_arguments_are_refused():
    good, broken = one_hot(TURN), one_hot(TURN)
    broken[3, 2] = float("nan")
    for logits, labels in (
        (good, TURN[:-1]),
        (good, TURN.int()),
        (good, TURN + 1),
        (good, TURN - 1),
        (broken, TURN),
        (good[:0], TURN[:0]),
    ):
        for score in (class_accuracy, label_tv):
            with pytest.raises(ValueError, match="expected"):
                score(logits, labels)
    for features, labels in ((good, TURN[:-1]), (broken, TURN), (good[:, :, None], TURN)):
        with pytest.raises(ValueError, match="expected"):
            diversity(features, labels, good, TURN)
        with pytest.raises(ValueError, match="expected"):
            diversity(good, TURN, features, labels)
    y = pixels(N, 0)
    for x, z, labels in (
        (y[:-1], y, TURN),
        (y.float(), y, TURN),
        (y, y.float(), TURN),
        (y, y, TURN[1:]),
    ):
        with pytest.raises(ValueError, match="expected"):
            noise_distance(x, z, labels)
