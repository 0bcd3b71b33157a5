"""Metrics against closed forms, other packages and controls that must fail."""

import contextlib
import dataclasses
import io
import math
import warnings

import cleanfid.fid
import numpy as np
import prdc
import pytest
import scipy.linalg
import scipy.stats
import torch
import torch_fidelity
from torch import Tensor
from torch_fidelity.defaults import DEFAULTS
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from eval.features.extractors import load_extractor
from eval.features.train_digits_extractor import alternate, digits_u8
from eval.metrics import pairwise, statistics
from eval.metrics.evaluate import Against, evaluate_images
from eval.metrics.frechet import frechet_distance
from eval.metrics.inception_score import inception_score
from eval.metrics.kid import kid
from eval.metrics.memorisation import memorisation
from eval.metrics.pairwise import Cloud
from eval.metrics.scores import feature_scores
from eval.metrics.statistics import Gaussian, Reference

PRDC = ("precision", "recall", "density", "coverage")


def normal(n: int, d: int, seed: int) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scores(gen: Tensor, ref: Tensor) -> dict[str, float]:
    return feature_scores(gen, Reference(ref, "these features"))


def prdc_scores(gen: Tensor, ref: Tensor) -> dict[str, float]:
    found = scores(gen, ref)
    return {name: found[name] for name in PRDC}


def skewed(n: int, d: int, seed: int, move: float = 0.0, offset: float = 0.0) -> Tensor:
    """Rows with the power-law spectrum of real features."""
    return normal(n, d, seed) * torch.arange(1, d + 1).double().pow(-0.3) + 0.3 + move + offset


def with_moments(n: int, mean: Tensor, deviation: Tensor, seed: int) -> Tensor:
    """Rows whose sample mean is exactly `mean` and sample covariance exactly diag(deviation^2)."""
    z = normal(n, len(mean), seed)
    z = z - z.mean(0)
    white = z @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(z.T))).T
    return mean + white * deviation


@pytest.fixture(scope="module")
def halves() -> tuple[Tensor, Tensor]:
    images, labels = digits_u8()
    even = alternate(labels)
    return images[even], images[~even]


@pytest.fixture(scope="module")
def extractor():
    return load_extractor("digits-gelu-64")


# FID


def test_fid_of_exact_moments_is_the_closed_form():
    d = 16
    mean, shift = torch.zeros(d).double(), torch.linspace(-1, 1, d).double()
    s1, s2 = torch.linspace(0.5, 2, d).double(), torch.linspace(1.5, 0.2, d).double()
    a, b = with_moments(300, mean, s1, 0), with_moments(200, shift, s2, 1)
    closed = (shift.square().sum() + (s1 - s2).square().sum()).item()
    assert frechet_distance(a, b) == pytest.approx(closed, rel=1e-10)
    assert frechet_distance(a.float(), b.float()) == pytest.approx(closed, rel=1e-6)
    # Planted error: without the cross term the number is another one, so the line above can fail.
    without_cross = (shift.square().sum() + s1.square().sum() + s2.square().sum()).item()
    assert abs(frechet_distance(a, b) - without_cross) > 1


def test_fid_agrees_with_scipy_sqrtm():
    a, b = normal(120, 24, 0) @ normal(24, 24, 1), 0.3 + normal(150, 24, 2) @ normal(24, 24, 3)
    s1, s2 = np.cov(a.numpy(), rowvar=False), np.cov(b.numpy(), rowvar=False)
    root = scipy.linalg.sqrtm(s1 @ s2).real
    gap = (a.mean(0) - b.mean(0)).square().sum().item()
    assert frechet_distance(a, b) == pytest.approx(gap + np.trace(s1 + s2 - 2 * root), rel=1e-9)


def test_fid_laws():
    a, b = normal(100, 12, 0) @ normal(12, 12, 1), 1 + normal(90, 12, 2)
    fid = frechet_distance(a, b)
    rotation = torch.linalg.qr(normal(12, 12, 3)).Q
    assert frechet_distance(a @ rotation, b @ rotation) == pytest.approx(fid, rel=1e-9)
    assert frechet_distance(a + 7, b + 7) == pytest.approx(fid, rel=1e-9)
    assert frechet_distance(3 * a, 3 * b) == pytest.approx(9 * fid, rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(fid, rel=1e-9)
    assert frechet_distance(a, a.clone()) == pytest.approx(0, abs=1e-5)
    # a shift of one side only is seen
    assert frechet_distance(a, b + 1) != pytest.approx(fid, rel=1e-2)


def test_fid_survives_few_dead_and_constant_features():
    ref = normal(200, 32, 0)
    few, constant = normal(10, 32, 1), torch.ones(50, 32)
    dead = ref.clone()
    dead[:, :8] = 0
    assert all(math.isfinite(frechet_distance(gen, ref)) for gen in (few, constant, dead))
    closed = ((1 - ref.mean(0)).square().sum() + torch.cov(ref.T).trace()).item()
    assert frechet_distance(constant, ref) == pytest.approx(closed, rel=1e-6)


# N, M, D; N < D too
SHAPES = [
    (500, 500, 64),
    (300, 300, 512),
    (1300, 1100, 32),
    (90, 2100, 16),
    (40, 40, 2),
]


@pytest.mark.parametrize("offset", (0, 1e4))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("n, m, d", SHAPES)
def test_fid_agrees_with_torch_fidelity_and_clean_fid(
    n: int, m: int, d: int, dtype: torch.dtype, offset: float
):
    a, b = skewed(n, d, 0, 0.2, offset).to(dtype), skewed(m, d, 1, 0, offset).to(dtype)
    one, two = (fid_features_to_statistics(x.double()) for x in (a, b))
    found = scores(a, b)["fid"]
    full_rank = min(n, m) > d
    theirs = fid_statistics_to_metric(one, two, verbose=False)["frechet_inception_distance"]
    assert found == pytest.approx(theirs, rel=1e-9 if full_rank else 1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        theirs = cleanfid.fid.frechet_distance(one["mu"], one["sigma"], two["mu"], two["sigma"])
    # Square roots of what should be 0 are noise in every implementation where
    # a covariance is singular.
    assert found == pytest.approx(theirs, rel=1e-8 if full_rank else 1e-6)
    assert found == pytest.approx(frechet_distance(a, b), rel=1e-9)
    assert frechet_distance(a, b) == frechet_distance(a, Reference(b, ""))


def test_fid_is_computed_in_float64(monkeypatch):
    a, b = skewed(500, 8, 0, 0.2).float() + 1e4, skewed(500, 8, 1).float() + 1e4
    centred = frechet_distance(a.double() - 1e4, b.double() - 1e4)
    assert frechet_distance(a, b) == pytest.approx(centred, rel=1e-6)
    # Planted error: a covariance in float32, of features as they come.
    monkeypatch.setattr(Cloud, "covariance", lambda self: torch.cov(self.features.T).double())
    monkeypatch.setattr(
        Gaussian, "of", lambda c: Gaussian(c.features.mean(0).double(), c.covariance())
    )
    assert frechet_distance(a, b) != pytest.approx(centred, rel=1e-5)


# IS


def test_inception_score_of_known_distributions():
    one_hot = 200.0 * torch.eye(10).repeat(7, 1)
    assert inception_score(one_hot) == pytest.approx(10, rel=1e-12)
    assert inception_score(torch.zeros(5, 10)) == pytest.approx(1, rel=1e-12)
    assert inception_score(one_hot[:1].repeat(5, 1)) == pytest.approx(1, rel=1e-12)
    assert inception_score(one_hot[:15]) < 9.9  # not balanced


def test_inception_score_agrees_with_scipy_entropy():
    logits = 3 * normal(400, 10, 0)
    p = logits.softmax(1).numpy()
    divergence = scipy.stats.entropy(p, p.mean(0)[None], axis=1)
    assert inception_score(logits) == pytest.approx(np.exp(divergence.mean()), rel=1e-8)
    theirs = isc_features_to_metric(logits, splits=1)["inception_score_mean"]
    assert inception_score(logits) == pytest.approx(theirs, rel=1e-12)


def test_inception_score_survives_a_class_that_underflows():
    logits = torch.zeros(20, 10)
    logits[:, 3] = -5000.0
    assert math.isnan(
        isc_features_to_metric(logits, splits=1, shuffle=False)["inception_score_mean"]
    )
    assert inception_score(logits) == pytest.approx(1)


# KID


def unbiased_mmd(a: Tensor, b: Tensor) -> float:
    """The unbiased estimate of Binkowski et al. 2018, term by term."""
    n, m, d = len(a), len(b), a.shape[1]

    def k(x: Tensor, y: Tensor) -> float:
        return ((x @ y).item() / d + 1) ** 3

    within_a = sum(k(a[i], a[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within_b = sum(k(b[i], b[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return within_a + within_b - 2 * sum(k(x, y) for x in a for y in b) / (n * m)


def test_kid_agrees_with_a_double_loop():
    a, b = normal(25, 6, 0), normal(17, 6, 1) * 1.3 + 0.2
    assert kid(a, b) == pytest.approx(unbiased_mmd(a, b), rel=1e-6)
    assert kid(a, b) == pytest.approx(kid(b, a), rel=1e-6)
    # not scale-free: hence features of RMS 1
    assert kid(3 * a, 3 * b) != pytest.approx(kid(a, b), rel=0.5)
    # The kernel is not shift-invariant: without the terms of the centres it would be.
    assert (
        kid(a + 1, b + 1)
        == pytest.approx(unbiased_mmd(a + 1, b + 1), rel=1e-6)
        != pytest.approx(kid(a, b), rel=0.1)
    )


# Far from the origin, numbers of size offset^6 cancel:
# torch-fidelity itself is then off by 3e-6 where the sets differ little.
@pytest.mark.parametrize("move, offset", [(0, 0), (0.05, 0), (0.05, 100), (1, 1e4)])
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("n, d", [(60, 300), (500, 64), (2100, 16)])
def test_kid_is_torch_fidelitys_on_everything(
    n: int, d: int, dtype: torch.dtype, move: float, offset: float
):
    a, b = skewed(n, d, 0, move, offset).to(dtype), skewed(n, d, 1, 0, offset).to(dtype)
    theirs = kid_features_to_metric(
        a.double(), b.double(), kid_subsets=1, kid_subset_size=n, verbose=False
    )
    theirs = theirs["kernel_inception_distance_mean"]
    # 1e-9 for estimates that happen to be near 0:
    # a KID of so few samples has itself an error of 1e-4 and more.
    assert scores(a, b)["kid"] == pytest.approx(theirs, rel=1e-6, abs=1e-9 if move == 0 else 0)
    assert kid(a, b) == pytest.approx(scores(a, b)["kid"], rel=1e-12)


def test_kid_of_unequal_sizes_is_over_all_pairs():
    a, b = skewed(2500, 6, 0, 0.1).float(), skewed(1100, 6, 1).float()
    k_aa, k_bb, k_ab = (
        (x.double() @ y.double().T / 6 + 1).pow(3) for x, y in ((a, a), (b, b), (a, b))
    )
    of_a, of_b = ((k.sum() - k.trace()) / (len(k) * (len(k) - 1)) for k in (k_aa, k_bb))
    assert scores(a, b)["kid"] == pytest.approx((of_a + of_b - 2 * k_ab.mean()).item(), rel=1e-6)
    biased = k_aa.mean() + k_bb.mean() - 2 * k_ab.mean()
    assert scores(a, b)["kid"] != pytest.approx(biased.item(), rel=1e-3)


def test_kid_of_copies_is_negative():
    a = normal(60, 8, 0)
    assert kid(a, a.clone()) < -1e-3


# Precision, recall, density, coverage


def brute_force(gen: Tensor, ref: Tensor) -> dict[str, float]:
    """The definitions, from all squared distances in float64; pieces of the reference's size."""

    def squared(a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([(x - b.double()).square().sum(-1)[None] for x in a.double()])

    def radius(a: Tensor, k: int) -> Tensor:
        return squared(a, a).fill_diagonal_(math.inf).sort(1).values[:, k - 1]

    pieces = [part for part in gen.split(len(ref)) if len(part) == len(ref)] or [gen]
    found = []
    for part in pieces:
        d = squared(part, ref)
        few = ref[: len(part)]
        taken = []
        for own, other in (
            (radius(part, 1), squared(part, few).amin(1)),
            (radius(few, 1), squared(part, few).amin(0)),
        ):
            taken.append(((other < own).double() + 0.5 * (other == own)).mean())
        found.append(
            [
                (d <= radius(ref, 3)).any(1).double().mean(),
                (d <= radius(part, 3)[:, None]).any(0).double().mean(),
                (d < radius(ref, 5)).double().sum() / 5 / len(part),
                (d < radius(ref, 5)).any(0).double().mean(),
                1 - (taken[0] + taken[1]) / 2,
            ]
        )
    return dict(zip((*PRDC, "c2st"), torch.tensor(found, dtype=torch.float64).mean(0).tolist()))


@pytest.mark.parametrize("seed", range(20))
def test_prdc_agrees_with_the_two_packages(seed: int):
    n, d = ((150, 5), (1200, 24), (100, 300), (1100, 64))[seed % 4]
    gen, ref = normal(n, d, seed) * (0.6 + 0.02 * seed) + 0.02 * seed, normal(n, d, 100 + seed)
    found = scores(gen, ref)
    with contextlib.redirect_stdout(io.StringIO()):
        theirs = {
            k: prdc.compute_prdc(real_features=ref.numpy(), fake_features=gen.numpy(), nearest_k=k)
            for k in (3, 5)
        }
    assert found["density"] == pytest.approx(theirs[5]["density"], abs=1e-12)
    assert found["coverage"] == pytest.approx(theirs[5]["coverage"], abs=1e-12)
    assert (found["precision"], found["recall"]) == pytest.approx(
        (theirs[3]["precision"], theirs[3]["recall"]), abs=1e-12
    )
    if d == 5:  # planted error: another k is another number
        assert found["density"] != pytest.approx(theirs[3]["density"], abs=1e-12)
        assert found["precision"] != pytest.approx(theirs[5]["precision"], abs=1e-12)
    both = prc_features_to_metric(gen, ref, save_cpu_ram=True, verbose=False)
    for name in ("precision", "recall"):  # theirs is a mean in float32: the counts are equal
        assert round(found[name] * n) == pytest.approx(both[name] * n, abs=1e-2)
    assert found == pytest.approx(found | brute_force(gen, ref), abs=1e-12)


def few_tight(n: int, seed: int) -> Tensor:
    """Ten points and slight noise: distances within a point drown in float32's rounding."""
    return 100 * normal(10, 24, 7).repeat(n // 10, 1) + 1e-5 * normal(n, 24, seed)


SETS = {
    # Small whole numbers: distances are exact and tie everywhere.
    "ties": lambda n, seed: normal(n, 3, seed).round().clamp(-2, 2),
    "repeated rows": lambda n, seed: normal(1 + n // 4, 12, 3)[
        (torch.arange(n) * (seed + 1)) % (1 + n // 4)
    ],
    "tight clusters": few_tight,
    "shifted": lambda n, seed: skewed(n, 24, seed, 0, 1e4),
    "one far row": lambda n, seed: torch.cat(
        [normal(n - 1, 24, seed), torch.full((1, 24), 1e7).double()]
    ),
    "tiny": lambda n, seed: normal(n, 24, seed) * 1e-25,
    "huge": lambda n, seed: normal(n, 24, seed) * 1e14,
}


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("n, m", [(300, 300), (770, 300), (50, 300), (90, 20)])
@pytest.mark.parametrize("name", SETS)
def test_degenerate_sets_are_decided_in_float64(
    name: str, n: int, m: int, dtype: torch.dtype, monkeypatch
):
    monkeypatch.setattr(pairwise, "ROWS", 128)  # several blocks, and pieces across them
    gen, ref = SETS[name](n, 0).to(dtype), SETS[name](m, 1).to(dtype)
    expected = brute_force(gen, ref)
    found = scores(gen, ref)
    assert {key: found[key] for key in expected} == pytest.approx(expected, abs=1e-12)


def test_float32_alone_would_be_wrong(monkeypatch):
    """Planted error: the rounding error of products taken for nought."""
    gen, ref = few_tight(300, 0), few_tight(300, 1)
    expected = brute_force(gen, ref)
    monkeypatch.setattr(pairwise, "UNIT", 0.0)
    found = scores(gen, ref)
    assert {key: found[key] for key in expected} != pytest.approx(expected, abs=0.05)


def test_blocks_do_not_matter(monkeypatch):
    gen, ref = normal(700, 6, 0).float(), normal(300, 6, 1).float()
    whole = scores(gen, ref)
    for rows in (50, 256):
        monkeypatch.setattr(pairwise, "ROWS", rows)
        assert scores(gen, ref) == pytest.approx(whole, rel=1e-6)
        assert all(scores(gen, ref)[name] == whole[name] for name in (*PRDC, "c2st"))


def test_prdc_of_copies_is_one_and_of_strangers_nought():
    ref = normal(200, 8, 0).float()
    ones = {"precision": 1, "recall": 1, "density": 1, "coverage": 1}
    assert prdc_scores(ref.clone(), ref) == ones
    assert prdc_scores(ref + 1000, ref) == dict.fromkeys(ones, 0)


def test_prdc_of_a_collapse_has_precision_without_recall():
    ref = normal(500, 64, 0).float()
    found = prdc_scores(torch.zeros(500, 64), ref)
    assert found == {
        "precision": 1,
        "recall": 0,
        "density": 100,
        "coverage": pytest.approx(1, abs=0.05),
    }
    # One image of the reference, repeated: its own ball (radius 0) still holds that image, by <= .
    assert prdc_scores(ref[:1].repeat(500, 1), ref)["recall"] == pytest.approx(1 / 500)


def test_ties_are_read_as_the_two_packages_read_them():
    """All one image on either side: every distance is 0; torch-fidelity has <=, prdc has <."""
    same = normal(1, 8, 0).repeat(20, 1)
    found = prdc_scores(same, same)
    assert found == {"precision": 1, "recall": 1, "density": 0, "coverage": 0}


def test_swapped_inputs_exchange_precision_and_recall():
    a, b = normal(300, 8, 0) * 0.7, normal(300, 8, 1)
    one, other = prdc_scores(a, b), prdc_scores(b, a)
    assert (one["precision"], one["recall"]) == (other["recall"], other["precision"])
    # narrower than the reference: this order and not the other
    assert one["precision"] > one["recall"] + 0.1


def test_prdc_stands_a_shift_of_the_features():
    a, b = normal(300, 64, 0), normal(300, 64, 1)
    assert prdc_scores(a + 1e4, b + 1e4) == prdc_scores(a, b)
    # Planted error: float32 distances from inner products,
    # as torch-fidelity has them, swallow the shift.
    theirs = prc_features_to_metric(
        a.float() + 1e4, b.float() + 1e4, save_cpu_ram=True, verbose=False
    )
    assert theirs["precision"] != pytest.approx(prdc_scores(a, b)["precision"], abs=0.1)


def test_prdc_of_many_samples_is_the_mean_over_equal_n():
    gen, ref = normal(250, 8, 0), normal(100, 8, 1)
    # Two full chunks; the last 50 rows are left out.
    parts = [prdc_scores(gen[i : i + 100], ref) for i in (0, 100)]
    for name, value in prdc_scores(gen, ref).items():
        assert value == pytest.approx((parts[0][name] + parts[1][name]) / 2, rel=1e-12)
    # Without equal N recall would grow with the number of samples alone.
    few, many = normal(100, 8, 2), normal(1000, 8, 2)
    assert prdc_scores(many, ref)["recall"] == pytest.approx(
        prdc_scores(few, ref)["recall"], abs=0.1
    )


# C2ST


def test_c2st_of_the_same_of_strangers_and_of_copies():
    ref = normal(1000, 8, 0)
    # sd of 2000 votes: 0.011
    assert scores(normal(1000, 8, 1), ref)["c2st"] == pytest.approx(0.5, abs=0.04)
    # equal numbers: 300 against 300
    assert scores(normal(300, 8, 1), ref)["c2st"] == pytest.approx(0.5, abs=0.07)
    assert scores(ref + 100, ref)["c2st"] == 1
    assert scores(ref.clone(), ref)["c2st"] == 0
    half = torch.cat([ref[:500], normal(500, 8, 2)])
    assert 0.1 < scores(half, ref)["c2st"] < 0.4
    # a row as near to both counts half
    assert scores(ref[:1].repeat(1000, 1), ref[1:].repeat(2, 1)[:1000])["c2st"] > 0.4
    # Planted error: with 300 against 1000 the larger set would win most votes.
    assert brute_votes(normal(300, 8, 1), ref) > 0.6


def brute_votes(a: Tensor, b: Tensor) -> float:
    """Share of rows whose nearest other row is of their own set, numbers unequal."""
    both = torch.cat([a, b])
    nearest = torch.cdist(both, both).fill_diagonal_(math.inf).argmin(1)
    return ((nearest < len(a)) == (torch.arange(len(both)) < len(a))).double().mean().item()


# The reference


def test_a_reference_whose_features_changed_is_refused(monkeypatch):
    gen, features = normal(80, 6, 0), normal(60, 6, 1)
    reference = Reference(features.clone(), "")
    first = feature_scores(gen, reference)
    assert feature_scores(gen, reference) == first
    reference.features.mul_(2)
    for metric in (feature_scores, frechet_distance):
        with pytest.raises(ValueError, match="have changed"):
            metric(gen, reference)
    fresh = feature_scores(gen, dataclasses.replace(reference))
    assert fresh == scores(gen, 2 * features) != first
    # Planted error: without the check the kept factors of the old features would answer.
    monkeypatch.setattr(statistics, "_digest", lambda features: "")
    stale = Reference(features.clone(), "")
    frechet_distance(gen, stale)
    stale.features.mul_(2)
    assert (
        frechet_distance(gen, stale)
        == pytest.approx(first["fid"], rel=1e-12)
        != pytest.approx(fresh["fid"], rel=0.1)
    )


def test_reference_factors_are_computed_once(monkeypatch):
    made = []
    true = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda a: made.append(len(a)) or true(a))
    reference = Reference(normal(60, 6, 1), "")
    for seed in range(3):
        feature_scores(normal(80, 6, seed), reference)
        frechet_distance(normal(80, 6, seed), reference)
    assert made == [6]


def test_features_of_another_width_are_refused():
    reference = Reference(normal(60, 6, 1), "")
    for metric in (feature_scores, frechet_distance):
        with pytest.raises(ValueError, match="one width"):
            metric(normal(60, 7, 0), reference)


def test_train_and_reference_mixed_up_would_be_seen(halves, extractor):
    """A generator that copies the training half is near the floor against the held-out half.

    It is perfect against the wrong one.
    """
    train, held_out = (Reference.of(half, extractor) for half in halves)
    right, wrong = feature_scores(train.features, held_out), feature_scores(train.features, train)
    assert 0.05 < right["fid"] < 1 and right["recall"] < 0.97 and 0.4 < right["c2st"] < 0.6
    assert (
        wrong["fid"] < 1e-3
        and wrong["recall"] == 1
        and wrong["c2st"] == 0
        and wrong["kid"] < right["kid"]
    )


def test_swapped_inputs_are_seen_on_class_means(extractor):
    """Class means, the typical failure of distillation: precision high, recall nought.

    It is the other way round where the two are swapped.
    """
    images, labels = digits_u8()
    even = alternate(labels)
    means = (
        torch.stack([images[even & (labels == c)].double().mean(0) for c in range(10)])
        .round()
        .to(torch.uint8)
    )
    held_out = extractor.features(images[~even])[0]
    blurred = extractor.features(means.repeat(90, 1, 1, 1)[: len(held_out)])[0]
    right, swapped = scores(blurred, held_out), scores(held_out, blurred)
    assert right["precision"] > 0.5 and right["recall"] == 0 and right["coverage"] < 0.3
    assert (right["precision"], right["recall"]) == (swapped["recall"], swapped["precision"])
    assert (
        right["fid"] == pytest.approx(swapped["fid"], rel=1e-5) and right["c2st"] == swapped["c2st"]
    )
    assert right["density"] > 0.5 and swapped["density"] == 0


# Memorisation


def test_memorisation_of_copies_is_one_even_of_repeated_images(halves):
    train, unseen = halves
    assert memorisation(train, train) == 1
    doubled = torch.cat([train, train])  # own distance 0: a copy is as near, not nearer
    assert memorisation(train, doubled) == 1
    assert memorisation(unseen, doubled) == 0


def test_memorisation_agrees_with_a_double_loop(halves):
    gen, train = halves[1][:40], halves[0][:60]
    a, b = gen.flatten(1).numpy().astype(float), train.flatten(1).numpy().astype(float)
    copied = 0
    for x in a:
        gaps = np.linalg.norm(b - x, axis=1)
        nearest = gaps.argmin()
        copied += gaps.min() <= np.delete(np.linalg.norm(b - b[nearest], axis=1), nearest).min()
    assert memorisation(gen, train) == memorisation(gen, train, rows=7) == copied / len(a)


def test_memorisation_tells_unseen_images_from_copies(halves):
    train, unseen = halves
    rng = torch.Generator().manual_seed(0)
    nearly = train.float() + 4 * torch.randn(train.shape, generator=rng)
    nearly = nearly.clamp(0, 255).round().to(torch.uint8)
    noise = torch.randint(0, 256, train.shape, generator=rng, dtype=torch.uint8)
    assert 0.3 < memorisation(unseen, train) < 0.6
    assert memorisation(nearly, train) > 0.95
    assert memorisation(noise, train) == 0


# All together


class DigitsFidelity(FeatureExtractorBase):
    """Our extractor as torch-fidelity sees it."""

    seen = 0

    def __init__(self, name, features_list, **kwargs):
        super().__init__(name, features_list)
        self.extractor = load_extractor("digits-gelu-64")

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        type(self).seen += len(images)
        found = dict(
            zip(self.get_provided_features_list(), self.extractor.features(images), strict=True)
        )
        # In the requested order, which comes from a set; torch-fidelity's docstring says otherwise.
        return tuple(found[name] for name in self.features_list)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return ("feat", "logits")

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "logits" if metric == "isc" else "feat"

    @staticmethod
    def can_be_compiled() -> bool:
        return False

    @staticmethod
    def get_dummy_input_for_compile() -> Tensor:
        return torch.zeros(1, 1, 8, 8, dtype=torch.uint8)


class Bare(torch.utils.data.Dataset):
    """torch-fidelity wants a data set of bare tensors."""

    def __init__(self, images: Tensor):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


def fidelity(**kwargs) -> dict[str, float]:
    """calculate_metrics, which ignores keywords it does not know, with those refused.

    A misspelt one would pass for its default.
    """
    unknown = set(kwargs) - set(DEFAULTS)
    if unknown:
        raise TypeError(f"torch-fidelity would ignore {sorted(unknown)}")
    return torch_fidelity.calculate_metrics(**kwargs)


class Careless(DigitsFidelity):
    """Planted error: features in the order that they are provided in."""

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(reversed(super().forward(images)))


def test_one_pass_equals_torch_fidelity_end_to_end(halves, extractor, tmp_path):
    train, ref = (half[:896] for half in halves)
    torch_fidelity.register_feature_extractor("distillbench-digits", DigitsFidelity)
    torch_fidelity.register_feature_extractor("distillbench-careless", Careless)
    settings = {
        "input1": Bare(train),
        "input2": Bare(ref),
        "feature_extractor": "distillbench-digits",
        "fid": True,
        "isc": True,
        "isc_splits": 1,
        "prc": True,
        "kid": True,
        "kid_subsets": 1,
        "kid_subset_size": 896,
        "cuda": False,
        "cache": False,
        "verbose": False,
        "save_cpu_ram": True,
        "batch_size": 512,
    }
    theirs = fidelity(**settings)
    assert DigitsFidelity.seen == 2 * 896  # one pass for all metrics on their side too
    ours = evaluate_images(train, None, Against(extractor, Reference.of(ref, extractor)))
    # FID and KID: theirs is of features and means in float32;
    # on the same float64 features both agree to 1e-9 (above).
    assert ours["fid"] == pytest.approx(theirs["frechet_inception_distance"], rel=2e-5)
    assert ours["is"] == pytest.approx(theirs["inception_score_mean"], rel=1e-6)
    assert ours["kid"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-4)
    for name in ("precision", "recall"):
        # the same count
        assert round(ours[name] * 896) == pytest.approx(theirs[name] * 896, abs=1e-3)
    # so that a swap would be seen
    assert round(ours["precision"] * 896) != round(ours["recall"] * 896)
    with pytest.raises(TypeError, match="kid_subset_sise"):
        fidelity(**settings, kid_subset_sise=896)
    careless = fidelity(**settings | {"feature_extractor": "distillbench-careless"})
    assert careless["frechet_inception_distance"] != pytest.approx(
        theirs["frechet_inception_distance"], rel=0.5
    )
    # Their cache goes by names alone: other data under an old name are not looked at.
    # Hence cache=False here, and hashes in ours.
    cached = settings | {
        "cache": True,
        "cache_root": str(tmp_path),
        "input2_cache_name": "reference",
        "isc": False,
        "kid": False,
        "prc": False,
    }
    first, stale = fidelity(**cached), fidelity(**cached | {"input2": Bare(train)})
    assert stale["frechet_inception_distance"] == first["frechet_inception_distance"] > 0.1


@pytest.mark.parametrize("metric", (frechet_distance, kid, scores))
def test_bad_features_are_refused(metric):
    good = normal(20, 4, 0)
    broken, large = good.clone(), good.clone()
    broken[3, 2] = float("nan")
    large[3, 2] = 1e16  # its square leaves float32
    for bad in (
        broken,
        large,
        good[:, :3],
        good[:1],
        good[0],
        good[:, :0],
        good.half(),
        (10 * good).long(),
    ):
        for pair in ((bad, good), (good, bad)):
            with pytest.raises(ValueError):
                metric(*pair)
    with pytest.raises(ValueError):
        memorisation(good, good)
    with pytest.raises(ValueError):
        inception_score(broken)
    with pytest.raises(ValueError, match="6 rows"):
        scores(good[:5], good)
