"""Metrics against closed forms, other packages and controls that must fail."""

import math
from pathlib import Path

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

from eval import metrics
from eval.extractors import load_extractor
from eval.metrics import (
    Reference,
    evaluate_images,
    frechet_distance,
    inception_score,
    kid,
    memorisation,
    precision_recall_density_coverage,
)
from eval.train_digits_extractor import alternate, digits_u8


def normal(n: int, d: int, seed: int) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


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
    assert frechet_distance(a.float(), b.float()) == pytest.approx(closed, rel=1e-5)
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
    assert frechet_distance(a, b + 1) != pytest.approx(fid, rel=1e-2)  # a shift of one side only is seen


def test_fid_survives_few_dead_and_constant_features():
    ref = normal(200, 32, 0)
    few, constant = normal(10, 32, 1), torch.ones(50, 32)
    dead = ref.clone()
    dead[:, :8] = 0
    assert all(math.isfinite(frechet_distance(gen, ref)) for gen in (few, constant, dead))
    closed = ((1 - ref.mean(0)).square().sum() + torch.cov(ref.T).trace()).item()
    assert frechet_distance(constant, ref) == pytest.approx(closed, rel=1e-6)


def test_fid_is_computed_in_float64():
    a, b = normal(500, 8, 0).float() + 1e4, normal(500, 8, 1).float() + 1e4
    centred = frechet_distance(a.double() - 1e4, b.double() - 1e4)
    assert frechet_distance(a, b) == pytest.approx(centred, rel=1e-6)


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


def test_inception_score_survives_a_class_that_underflows():
    logits = torch.zeros(20, 10)
    logits[:, 3] = -5000.0
    assert math.isnan(metrics.isc_features_to_metric(logits, splits=1, shuffle=False)["inception_score_mean"])
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
    a, b = normal(25, 6, 0), normal(25, 6, 1) * 1.3 + 0.2
    assert kid(a, b) == pytest.approx(unbiased_mmd(a, b), rel=1e-10)
    assert kid(a, b) == pytest.approx(kid(b, a), rel=1e-10)
    assert kid(3 * a, 3 * b) != pytest.approx(kid(a, b), rel=0.5)  # not scale-free: hence features of RMS 1


def test_kid_of_unequal_sizes_averages_seeded_subsets():
    a, b = normal(400, 6, 0), normal(50, 6, 1)
    assert kid(a, b) == kid(a, b) != kid(a, b, seed=1)
    assert abs(kid(a, b, subsets=200)) < 0.05 < kid(a + 0.5, b)


def test_kid_of_copies_is_negative():
    a = normal(60, 8, 0)
    assert kid(a, a.clone()) < -1e-3


# Precision, recall, density, coverage


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("k", (3, 5))
def test_prdc_agrees_with_the_prdc_package(seed: int, k: int, capsys):
    gen, ref = normal(150, 5, seed) * (0.5 + 0.1 * seed) + 0.05 * seed, normal(150, 5, 100 + seed)
    theirs = prdc.compute_prdc(real_features=ref.numpy(), fake_features=gen.numpy(), nearest_k=k)
    assert precision_recall_density_coverage(gen, ref, k, k) == pytest.approx(theirs, abs=1e-12)
    assert precision_recall_density_coverage(gen, ref, k + 1, k + 1) != pytest.approx(theirs, abs=1e-12)


def test_prdc_of_copies_is_one_and_of_strangers_nought():
    ref = normal(200, 8, 0).float()
    ones = {"precision": 1, "recall": 1, "density": 1, "coverage": 1}
    assert precision_recall_density_coverage(ref.clone(), ref) == ones
    assert precision_recall_density_coverage(ref + 1000, ref) == dict.fromkeys(ones, 0)


def test_prdc_of_a_collapse_has_precision_without_recall():
    ref = normal(500, 64, 0).float()
    scores = precision_recall_density_coverage(torch.zeros(500, 64), ref)
    assert scores == {"precision": 1, "recall": 0, "density": 100, "coverage": pytest.approx(1, abs=0.05)}
    # One image of the reference, repeated: its own ball (radius 0) still holds that image, by <= .
    assert precision_recall_density_coverage(ref[:1].repeat(500, 1), ref)["recall"] == pytest.approx(1 / 500)


def test_ties_are_read_as_the_two_packages_read_them():
    """All one image on either side: every distance and radius is 0; torch-fidelity has <=, prdc has <."""
    same = normal(1, 8, 0).repeat(20, 1)
    scores = precision_recall_density_coverage(same, same)
    assert scores == {"precision": 1, "recall": 1, "density": 0, "coverage": 0}


def test_swapped_inputs_exchange_precision_and_recall():
    a, b = normal(300, 8, 0) * 0.7, normal(300, 8, 1)
    one, other = precision_recall_density_coverage(a, b), precision_recall_density_coverage(b, a)
    assert (one["precision"], one["recall"]) == (other["recall"], other["precision"])
    assert one["precision"] > one["recall"] + 0.1  # narrower than the reference: this order and not the other


def test_prdc_stands_a_shift_of_the_features():
    a, b = normal(300, 64, 0).float(), normal(300, 64, 1).float()
    at_home = precision_recall_density_coverage(a, b)
    assert precision_recall_density_coverage(a + 1e3, b + 1e3) == pytest.approx(at_home, abs=0.01)


def test_prdc_of_many_samples_is_the_mean_over_equal_n():
    gen, ref = normal(250, 8, 0), normal(100, 8, 1)
    # Two full chunks; the last 50 rows are left out.
    parts = [precision_recall_density_coverage(gen[i : i + 100], ref) for i in (0, 100)]
    for name, value in precision_recall_density_coverage(gen, ref).items():
        assert value == pytest.approx((parts[0][name] + parts[1][name]) / 2, rel=1e-12)
    # Without equal N recall would grow with the number of samples alone.
    few, many = normal(100, 8, 2), normal(1000, 8, 2)
    assert precision_recall_density_coverage(many, ref)["recall"] == pytest.approx(
        precision_recall_density_coverage(few, ref)["recall"], abs=0.1
    )


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
        found = dict(zip(self.get_provided_features_list(), self.extractor.features(images), strict=True))
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
    """calculate_metrics ignores keywords it does not know, so a misspelt one would pass for its default."""
    unknown = set(kwargs) - set(DEFAULTS)
    if unknown:
        raise TypeError(f"torch-fidelity would ignore {sorted(unknown)}")
    return torch_fidelity.calculate_metrics(**kwargs)


def test_one_pass_equals_torch_fidelity_end_to_end(halves, extractor):
    train, ref = (half[:896] for half in halves)
    name = "distillbench-digits"
    torch_fidelity.register_feature_extractor(name, DigitsFidelity)
    settings = {
        "input1": Bare(train), "input2": Bare(ref), "feature_extractor": name,
        "fid": True, "isc": True, "isc_splits": 1, "prc": True,
        "kid": True, "kid_subsets": 20, "kid_subset_size": 896, "rng_seed": 0,
        "cuda": False, "cache": False, "verbose": False, "save_cpu_ram": True, "batch_size": 512,
    }  # fmt: skip
    theirs = fidelity(**settings)
    assert DigitsFidelity.seen == 2 * 896  # one pass for all metrics on their side too
    ours = evaluate_images(train, extractor, Reference.of(ref, extractor))
    assert ours["fid"] == pytest.approx(theirs["frechet_inception_distance"], abs=1e-4)
    assert ours["is"] == pytest.approx(theirs["inception_score_mean"], rel=1e-6)
    assert ours["kid"] == pytest.approx(theirs["kernel_inception_distance_mean"], abs=1e-5)
    assert ours["precision"] == pytest.approx(theirs["precision"], abs=1e-6)
    assert ours["recall"] == pytest.approx(theirs["recall"], abs=1e-6)
    assert ours["precision"] != pytest.approx(theirs["recall"], abs=1e-6)  # so that a swap would be seen
    with pytest.raises(TypeError, match="kid_subset_sise"):
        fidelity(**settings, kid_subset_sise=896)


def test_evaluate_images_makes_one_pass_and_plain_rounded_floats(halves, extractor, monkeypatch):
    train, ref = halves
    reference = Reference.of(ref, extractor)
    passes = []
    true = type(extractor).features
    monkeypatch.setattr(type(extractor), "features", lambda self, x: passes.append(len(x)) or true(self, x))
    scores = evaluate_images(train, extractor, reference, reference.features, train)
    assert passes == [len(train)]
    assert list(scores) == [
        "fid", "fid_teacher", "kid", "is", "precision", "recall", "density", "coverage", "memorisation"
    ]  # fmt: skip
    assert all(type(value) is float and value == float(f"{value:.8g}") for value in scores.values())
    assert any(value != float(f"{value:.7g}") for value in scores.values())  # all eight digits are kept
    assert scores["fid_teacher"] == scores["fid"] and scores["memorisation"] == 1
    alone = evaluate_images(train, extractor, reference)
    assert alone == {**scores, "fid_teacher": None, "memorisation": None}


def test_scores_under_two_extractors_never_mix(halves, extractor):
    stale = Reference(torch.zeros(10, 64), "another hash")
    with pytest.raises(ValueError, match="not by digits-gelu-64"):
        evaluate_images(halves[0], extractor, stale)


def resident(field: str) -> int:
    """A memory counter of this process, in bytes: VmRSS now, VmHWM its peak."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resets the peak as Linux does")
def test_twenty_thousand_samples_fit_in_little_memory(halves, extractor):
    reference = Reference.of(halves[1], extractor)
    images = halves[0].repeat(23, 1, 1, 1)[:20000]
    Path("/proc/self/clear_refs").write_text("5")  # peak := now
    before = resident("VmRSS")
    evaluate_images(images, extractor, reference, train_images=halves[0])
    assert resident("VmHWM") - before < 250e6
    careless = torch.ones(20000, 2000, dtype=torch.float64)
    assert resident("VmHWM") - before > 250e6 and len(careless)  # the counter would have seen it


@pytest.mark.parametrize("metric", (frechet_distance, kid, precision_recall_density_coverage))
def test_bad_features_are_refused(metric):
    good = normal(20, 4, 0)
    broken = good.clone()
    broken[3, 2] = float("nan")
    for gen in (broken, good[:, :3], good[:1], good[0]):
        with pytest.raises(ValueError):
            metric(gen, good)
    with pytest.raises(ValueError):
        memorisation(good, good)
    with pytest.raises(ValueError):
        inception_score(broken)
