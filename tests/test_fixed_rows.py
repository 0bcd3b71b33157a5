"""The trivial generators are what they say, and scores on digits lie where they were calibrated."""

import numpy as np
import pytest
import torch
from torch import Tensor

from eval.features.train_digits_extractor import digits_u8
from eval.metrics.evaluate import SCORES, Against, evaluate_images, fixed_rows
from eval.metrics.fixed_rows import (
    FAILURES,
    GENERATORS,
    class_gaussian,
    class_means,
    memoriser,
    mixup,
    noise,
    one_class_missing,
    one_image_repeated,
)
from eval.metrics.frechet import frechet_distance
from eval.report.protocol import CROSS_EXTRACTOR, EXTRACTOR, Digits

N = 1800


@pytest.fixture(scope="module")
def data() -> Digits:
    return Digits.split()


@pytest.fixture(scope="module")
def digits(data) -> tuple[Tensor, Tensor, Tensor]:
    """Training images, training labels, reference images."""
    return data.train, data.train_labels, data.reference


@pytest.fixture(scope="module")
def against(data) -> Against:
    return Against.of(data, EXTRACTOR, CROSS_EXTRACTOR)


@pytest.fixture(scope="module")
def extractor(against):
    return against.extractor


@pytest.fixture(scope="module")
def rows(data, against) -> dict[str, dict]:
    """Every trivial generator, and the copy of the held-out half."""
    found = {row["name"]: row for row in fixed_rows(data, against, N, 0, GENERATORS + FAILURES)}
    return found | {"copy": evaluate_images(data.reference, data.reference_labels, against)}


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("generate", GENERATORS + FAILURES)
def test_images_are_uint8_and_seeded(generate, digits):
    train, labels, _ = digits
    images = generate(train, labels, 205, rng())
    assert images.shape == (205, 1, 8, 8) and images.dtype == torch.uint8
    assert torch.equal(images, generate(train, labels, 205, rng()))
    assert generate is class_means or not torch.equal(images, generate(train, labels, 205, rng(1)))


@pytest.mark.parametrize("generate", GENERATORS)
def test_image_i_is_of_class_i_modulo_ten(generate, digits, extractor):
    train, labels, _ = digits
    images, asked = generate(train, labels, 205, rng()), torch.arange(205) % 10
    recognised = extractor.features(images)[1].argmax(1)
    assert (recognised == asked).float().mean() > 0.9  # chance, or another order of classes: 0.1


def test_class_means_are_the_means(digits):
    train, labels, _ = digits
    images = class_means(train, labels, 20, rng())
    for i in (0, 3, 13):
        assert torch.equal(
            images[i], train[labels == i % 10].double().mean(0).round().to(torch.uint8)
        )


def test_gaussian_has_the_moments_of_its_class():
    """Far from 0 and 255, where nothing is cut."""
    mixing = torch.from_numpy(rng().normal(size=(4, 4)) * 6)
    z = torch.from_numpy(rng(1).normal(size=(2000, 4)))
    train = (128 + z @ mixing).round().clamp(0, 255).to(torch.uint8).view(-1, 1, 2, 2)
    images = class_gaussian(train, torch.zeros(2000, dtype=torch.long), 40000, rng(2))
    a, b = train.flatten(1).double(), images.flatten(1).double()
    assert torch.allclose(a.mean(0), b.mean(0), atol=0.3)
    assert torch.allclose(torch.cov(a.T), torch.cov(b.T), rtol=0.05, atol=2.5)
    # the full covariance, not its diagonal
    assert torch.cov(b.T).fill_diagonal_(0).abs().max() > 10


def test_mixup_stays_between_two_images_of_the_class():
    ends = torch.tensor([0, 200, 50, 90], dtype=torch.uint8).view(4, 1, 1, 1).repeat(1, 1, 2, 2)
    images = mixup(ends, torch.tensor([0, 0, 1, 1]), 20000, rng())
    first, second = images[0::2, 0, 0, 0].double(), images[1::2, 0, 0, 0].double()
    assert (first.min(), first.max(), second.min(), second.max()) == (0, 200, 50, 90)
    # one weight per image, not per pixel
    assert torch.equal(images.amin((1, 2, 3)), images.amax((1, 2, 3)))
    inside = (first > 0) & (first < 200)  # half of the pairs are of two equal images
    assert inside.double().mean().item() == pytest.approx(0.5, abs=0.02)
    # a uniform weight
    assert (first[inside] < 50).double().mean().item() == pytest.approx(0.25, abs=0.02)


def test_memoriser_draws_with_replacement(digits):
    train, labels, _ = digits
    images = memoriser(train, labels, 900, rng())
    known = {image.numpy().tobytes() for image in train}
    drawn = [image.numpy().tobytes() for image in images]
    # 1 - 1/e = 0.63 of them distinct
    assert set(drawn) <= known and len(set(drawn)) < 0.75 * len(drawn)


def test_failures_are_what_they_say(digits):
    train, labels, _ = digits
    known = {image.numpy().tobytes(): int(label) for image, label in zip(train, labels)}
    drawn = torch.tensor(
        [known[image.numpy().tobytes()] for image in one_class_missing(train, labels, 1000, rng())]
    )
    asked = torch.arange(1000) % 10
    assert (
        torch.equal(drawn[asked != 9], asked[asked != 9])
        and 9 not in drawn
        and len(drawn[asked == 9].unique()) == 9
    )
    repeated = one_image_repeated(train, labels, 50, rng())
    assert len(repeated.unique(dim=0)) == 1 and repeated[0].numpy().tobytes() in known
    grey = noise(train, labels, 5000, rng()).double()
    # cut at 2 sd
    assert grey.mean().item() == pytest.approx(
        127.5, abs=0.5
    ) and grey.std().item() == pytest.approx(62, abs=1)


def test_rows_are_named_complete_and_repeat(data, against, rows):
    small = [fixed_rows(data, against, 200, seed) for seed in (0, 0, 1)]
    assert [row["name"] for row in small[0]] == [
        "floor",
        "class_means",
        "class_gaussian",
        "mixup",
        "memoriser",
    ]
    assert list(rows) == ["floor", *(g.__name__ for g in GENERATORS + FAILURES), "copy"]
    unknown = {"fid_teacher", "noise_distance"}  # there is no teacher
    for name, row in rows.items():
        assert list(row) == [*(["name"] if name != "copy" else []), *SCORES]
        assert {m for m in SCORES if row[m] is None} == unknown
    with_teacher = Against.of(data, EXTRACTOR, CROSS_EXTRACTOR, data.train)
    assert fixed_rows(data, with_teacher, 200, 0) == small[0]
    assert small[0] == small[1]
    assert [a == b for a, b in zip(small[0], small[2], strict=True)] == [
        True,
        True,
        False,
        False,
        False,
    ]


def test_floor_is_where_it_was_calibrated(rows):
    """Stratified halves, specs/eval.md section 5: FID 0.18 +- 0.03, KID about 0, slightly below."""
    floor = rows["floor"]
    assert 0.1 < floor["fid"] < 0.26 and -0.02 < floor["kid"] < 0.005 and floor["is"] > 9.7
    assert floor["precision"] > 0.85 and floor["recall"] > 0.85
    assert floor["density"] == pytest.approx(1, abs=0.1)
    assert floor["coverage"] == pytest.approx(1 - 2**-5, abs=0.03)
    # of unseen images, not of the training half (which would be 1)
    assert 0.3 < floor["memorisation"] < 0.6


def test_random_halves_lie_above_the_stratified_floor(extractor, rows):
    """Half of a random floor is class imbalance: why labels are balanced everywhere."""
    features = extractor.features(digits_u8()[0])[0]
    found = []
    for seed in range(10):
        order = torch.from_numpy(rng(seed).permutation(len(features)))
        found.append(frechet_distance(features[order[:898]], features[order[898:]]))
    assert rows["floor"]["fid"] < np.mean(found) < 0.6


def broken(rows: dict[str, dict]) -> list[str]:
    """What a trivial generator should score and does not, as `docs/protocol.md` reads the table."""
    floor, copy, means, gaussian = (
        rows["floor"],
        rows["copy"],
        rows["class_means"],
        rows["class_gaussian"],
    )
    mix, memorised, missing = rows["mixup"], rows["memoriser"], rows["one_class_missing"]
    repeated, noisy = rows["one_image_repeated"], rows["noise"]
    said = {
        # the held-out half itself:
        # below the floor of reality, nearest neighbours are its own originals
        "copy: no distance": all(abs(copy[m]) < 1e-3 for m in ("fid", "fid_cross"))
        and copy["kid"] < floor["kid"] - 0.002,
        "copy: all four are 1": all(
            copy[m] == 1 for m in ("precision", "recall", "density", "coverage")
        ),
        "copy: C2ST is 0": copy["c2st"] == 0
        and copy["diversity"] == 1
        and abs(floor["c2st"] - 0.5) < 0.06,
        "copy: memorisation does not see it": copy["memorisation"] == floor["memorisation"],
        # conditional-mean blur passes precision, density, IS and everything about classes
        "means: pass": means["precision"] > 0.99
        and means["density"] > 1.5
        and means["is"] > 9.9
        and means["class_accuracy"] == 1,
        "means: fail": means["recall"] < 0.01
        and means["coverage"] < 0.2
        and means["fid"] > 20 * floor["fid"],
        "means: no diversity": means["diversity"] == 0
        and means["c2st"] > 0.95
        and means["fid_cross"] > 20 * floor["fid_cross"],
        # FID alone likes these two
        "gaussian: FID": (means["fid"] - gaussian["fid"]) / (means["fid"] - floor["fid"]) > 0.7,
        "gaussian: rest": gaussian["recall"] < floor["recall"] - 0.1
        and gaussian["c2st"] > 0.6
        and gaussian["class_accuracy"] < 0.98,
        "mixup: FID": (means["fid"] - mix["fid"]) / (means["fid"] - floor["fid"]) > 0.7
        and mix["class_accuracy"] > 0.98,
        "mixup: rest": mix["recall"] < floor["recall"] - 0.1
        and mix["diversity"] < 0.9
        and mix["c2st"] > 0.6,
        "mixup: near the data": mix["memorisation"] > floor["memorisation"] + 0.2,
        # only memorisation sees what the memoriser does;
        # what repeats cost stands under recall and C2ST
        "memoriser: caught": memorised["memorisation"] == 1,
        "memoriser: pass": memorised["fid"] < 2 * floor["fid"]
        and memorised["fid_cross"] < 2 * floor["fid_cross"],
        "memoriser: alike": memorised["diversity"] > 0.95 and memorised["class_accuracy"] == 1,
        "missing: labels": abs(missing["label_tv"] - 0.1) < 0.01
        and abs(missing["class_accuracy"] - 0.9) < 0.01,
        "missing: cover": missing["coverage"] < memorised["coverage"] - 0.06
        and missing["recall"] < memorised["recall"] - 0.06,
        "missing: pass": missing["precision"] > 0.9
        and missing["density"] > 0.95
        and missing["diversity"] > 1,
        "missing: the second FID less": missing["fid"] / floor["fid"]
        > 1.5 * missing["fid_cross"] / floor["fid_cross"]
        > 3,
        "repeated: precise": repeated["precision"] == 1 and repeated["density"] > 1,
        "repeated: the rest": repeated["recall"] < 0.01
        and repeated["coverage"] < 0.05
        and repeated["diversity"] == 0,
        "repeated: one class": repeated["is"] < 1.001,
        "repeated: labels": abs(repeated["label_tv"] - 0.9) < 1e-9
        and abs(repeated["class_accuracy"] - 0.1) < 1e-9,
        "noise: far": noisy["precision"] < 0.2
        and noisy["recall"] < 0.1
        and noisy["density"] < 0.1
        and noisy["coverage"] < 0.1,
        "noise: told apart": noisy["c2st"] > 0.95
        and noisy["class_accuracy"] < 0.2
        and noisy["fid"] > 3 * means["fid"],
        "noise: copies nothing": noisy["memorisation"] == 0,
    }
    return [name for name, kept in said.items() if not kept]


def test_every_failure_is_caught_and_missed_where_the_protocol_says(rows):
    assert broken(rows) == []


def test_swapped_sets_are_noticed(data, rows):
    """Generated and reference, or both halves, exchanged: the calibrated reading breaks."""
    swapped = Digits(data.reference, data.reference_labels, data.train, data.train_labels)
    wrong = Against.of(swapped, EXTRACTOR, CROSS_EXTRACTOR)
    memorised = memoriser(data.train, data.train_labels, N, rng())
    planted = rows | {"memoriser": evaluate_images(memorised, torch.arange(N) % 10, wrong)}
    assert "memoriser: caught" in broken(planted)
    planted = rows | {"copy": evaluate_images(data.reference, data.reference_labels, wrong)}
    assert {"copy: no distance", "copy: C2ST is 0"} <= set(broken(planted))
    exchanged = rows["class_means"] | {
        "precision": rows["class_means"]["recall"],
        "recall": rows["class_means"]["precision"],
    }
    assert {"means: pass", "means: fail"} <= set(broken(rows | {"class_means": exchanged}))
    turned = evaluate_images(
        memorised, (torch.arange(N) + 1) % 10, Against.of(data, EXTRACTOR, CROSS_EXTRACTOR)
    )
    assert "memoriser: alike" in broken(rows | {"memoriser": turned})
