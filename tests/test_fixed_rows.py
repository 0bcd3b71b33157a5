"""The trivial generators are what they say, and every score on digits lies where it was calibrated."""

import numpy as np
import pytest
import torch
from torch import Tensor

from eval.extractors import load_extractor
from eval.fixed_rows import GENERATORS, class_gaussian, class_means, fixed_rows, memoriser, mixup
from eval.metrics import frechet_distance
from eval.train_digits_extractor import alternate, digits_u8

N = 1800


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor, Tensor]:
    """Training images, training labels, reference images."""
    images, labels = digits_u8()
    even = alternate(labels)
    return images[even], labels[even], images[~even]


@pytest.fixture(scope="module")
def extractor():
    return load_extractor("digits-gelu-64")


@pytest.fixture(scope="module")
def rows(digits, extractor) -> dict[str, dict]:
    return {row["name"]: row for row in fixed_rows(*digits, extractor, N, seed=0)}


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("generate", GENERATORS)
def test_images_are_uint8_balanced_and_seeded(generate, digits, extractor):
    train, labels, _ = digits
    images = generate(train, labels, 205, rng())
    assert images.shape == (205, 1, 8, 8) and images.dtype == torch.uint8
    assert torch.equal(images, generate(train, labels, 205, rng()))
    assert generate is class_means or not torch.equal(images, generate(train, labels, 205, rng(1)))
    asked = torch.arange(205) % 10
    recognised = extractor.features(images)[1].argmax(1)
    assert (recognised == asked).float().mean() > 0.9  # chance, or another order of classes: 0.1


def test_class_means_are_the_means(digits):
    train, labels, _ = digits
    images = class_means(train, labels, 20, rng())
    for i in (0, 3, 13):
        assert torch.equal(images[i], train[labels == i % 10].double().mean(0).round().to(torch.uint8))


def test_gaussian_has_the_moments_of_its_class():
    """Far from 0 and 255, where nothing is cut."""
    mixing = torch.from_numpy(rng().normal(size=(4, 4)) * 6)
    z = torch.from_numpy(rng(1).normal(size=(2000, 4)))
    train = (128 + z @ mixing).round().clamp(0, 255).to(torch.uint8).view(-1, 1, 2, 2)
    images = class_gaussian(train, torch.zeros(2000, dtype=torch.long), 40000, rng(2))
    a, b = train.flatten(1).double(), images.flatten(1).double()
    assert torch.allclose(a.mean(0), b.mean(0), atol=0.3)
    assert torch.allclose(torch.cov(a.T), torch.cov(b.T), rtol=0.05, atol=2.5)
    assert torch.cov(b.T).fill_diagonal_(0).abs().max() > 10  # the full covariance, not its diagonal


def test_mixup_stays_between_two_images_of_the_class():
    ends = torch.tensor([0, 200, 50, 90], dtype=torch.uint8).view(4, 1, 1, 1).repeat(1, 1, 2, 2)
    images = mixup(ends, torch.tensor([0, 0, 1, 1]), 20000, rng())
    first, second = images[0::2, 0, 0, 0].double(), images[1::2, 0, 0, 0].double()
    assert (first.min(), first.max(), second.min(), second.max()) == (0, 200, 50, 90)
    assert torch.equal(images.amin((1, 2, 3)), images.amax((1, 2, 3)))  # one weight per image, not per pixel
    inside = (first > 0) & (first < 200)  # half of the pairs are of two equal images
    assert inside.double().mean().item() == pytest.approx(0.5, abs=0.02)
    assert (first[inside] < 50).double().mean().item() == pytest.approx(0.25, abs=0.02)  # a uniform weight


def test_memoriser_draws_with_replacement(digits):
    train, labels, _ = digits
    images = memoriser(train, labels, 900, rng())
    known = {image.numpy().tobytes() for image in train}
    drawn = [image.numpy().tobytes() for image in images]
    assert set(drawn) <= known and len(set(drawn)) < 0.75 * len(drawn)  # 1 - 1/e = 0.63 of them distinct


def test_rows_are_named_complete_and_repeat(digits, extractor, rows):
    assert list(rows) == ["floor", "class_means", "class_gaussian", "mixup", "memoriser"]
    scores = ["fid", "fid_teacher", "kid", "is", "precision", "recall", "density", "coverage", "memorisation"]
    assert all(list(row) == ["name", *scores] for row in rows.values())
    small = [fixed_rows(*digits, extractor, 200, seed) for seed in (0, 0, 1)]
    assert small[0] == small[1]
    assert [a == b for a, b in zip(small[0], small[2], strict=True)] == [True, True, False, False, False]


def test_floor_is_where_it_was_calibrated(rows):
    """Stratified halves, specs/eval.md section 5: FID 0.18 +- 0.03, and KID about 0, slightly below."""
    floor = rows["floor"]
    assert 0.1 < floor["fid"] < 0.26 and -0.02 < floor["kid"] < 0.005 and floor["is"] > 9.7
    assert floor["precision"] > 0.85 and floor["recall"] > 0.85
    assert floor["density"] == pytest.approx(1, abs=0.1)
    assert floor["coverage"] == pytest.approx(1 - 2**-5, abs=0.03)
    assert 0.3 < floor["memorisation"] < 0.6  # of unseen images, not of the training half (which would be 1)


def test_random_halves_lie_above_the_stratified_floor(extractor, rows):
    """Half of a random floor is class imbalance: why labels are balanced everywhere."""
    features = extractor.features(digits_u8()[0])[0]
    found = []
    for seed in range(10):
        order = torch.from_numpy(rng(seed).permutation(len(features)))
        found.append(frechet_distance(features[order[:898]], features[order[898:]]))
    assert rows["floor"]["fid"] < np.mean(found) < 0.6


def test_every_trick_is_caught_by_some_column(rows):
    floor, means = rows["floor"], rows["class_means"]
    # Conditional-mean blur passes the first line's columns, and fails those of the second.
    assert means["precision"] > 0.85 and means["is"] > 9.9
    assert means["recall"] < 0.01 and means["coverage"] < 0.2 and means["fid"] > 20 * floor["fid"]
    assert rows["memoriser"]["fid"] < 2 * floor["fid"] and rows["memoriser"]["memorisation"] == 1
    for name in ("class_gaussian", "mixup"):  # FID alone likes them
        assert (means["fid"] - rows[name]["fid"]) / (means["fid"] - floor["fid"]) > 0.7
        assert rows[name]["recall"] < floor["recall"] - 0.1
    assert rows["mixup"]["memorisation"] > floor["memorisation"] + 0.2
