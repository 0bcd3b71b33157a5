"""The image-scale extractors equal the packages they are named after, on random weights.

The network and the weights' format are the published ones: what is checked is loading,
preprocessing, layers and the wall between the two.

"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import pickle
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import cleanfid.fid
import numpy as np
import pytest
import torch
from cleanfid import inception_pytorch
from cleanfid.inception_torchscript import InceptionV3W
from cleanfid.resize import build_resizer
from PIL import Image
from torch import Tensor, nn
from torch_fidelity import calculate_metrics
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from eval.features import inception
from eval.features.extractor import Extractor
from eval.features.extractors import load_extractor
from eval.features.weights import INCEPTION, known_extractor, weight_file
from eval.metrics.evaluate import Against, evaluate_images
from eval.metrics.frechet import frechet_distance
from eval.metrics.inception_score import inception_score
from eval.metrics.key import evaluation_key
from eval.metrics.kid import kid
from eval.metrics.reference import reference_set
from eval.metrics.statistics import Reference

TORCH_FIDELITY, CLEAN_FID = "inception-torch-fidelity", "inception-clean-fid"


class Unloaded(FeatureExtractorInceptionV3):
    """torch-fidelity's network before any weights."""

    def __init__(self) -> None:
        empty = io.BytesIO()
        torch.save({}, empty)
        empty.seek(0)
        super().__init__("inception-v3-compat", ["2048"], feature_extractor_weights_path=empty)

    def load_state_dict(self, *args, **kwargs):
        return None


def random_weights() -> dict[str, Tensor]:
    """The published file's format: a plain dict of 472 tensors, no batch counters.

    He's initialisation keeps activations of order one.
    """
    network = Unloaded()
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
    return {
        name: value
        for name, value in network.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with the weight file, in the serialisation of 2019."""
    torch.manual_seed(0)
    out = tmp_path_factory.mktemp("weights")
    torch.save(random_weights(), out / INCEPTION, _use_new_zipfile_serialization=False)
    return out


@pytest.fixture(autouse=True)
def where(folder, monkeypatch) -> Iterator[None]:
    monkeypatch.setenv("DISTILLBENCH_WEIGHTS", str(folder))
    evaluation_key.cache_clear()
    yield
    evaluation_key.cache_clear()


@pytest.fixture(scope="module")
def extractors(folder) -> dict[str, Extractor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISTILLBENCH_WEIGHTS", str(folder))
        return {name: load_extractor(name) for name in (TORCH_FIDELITY, CLEAN_FID)}


def images(
    count: int,
    size: tuple[int, int] = (32, 32),
    channels: int = 3,
    seed: int = 0,
    contrast: float = 1.0,
) -> Tensor:
    """Smooth random colours with some noise, uint8 [count,channels,*size]."""
    g = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, channels, 4, 4, generator=g)
    smooth = nn.functional.interpolate(coarse, size, mode="bicubic")
    return (
        ((contrast * (smooth - 0.5) + 0.5 + 0.1 * torch.rand(smooth.shape, generator=g)) * 235)
        .clamp(0, 255)
        .byte()
    )


def png_folder(at: Path, pixels: Tensor) -> Path:
    at.mkdir()
    for i, image in enumerate(pixels.permute(0, 2, 3, 1).numpy()):
        Image.fromarray(image.squeeze()).save(at / f"{i:05d}.png")
    return at


def moved(a: Tensor, b: Tensor) -> float:
    """Relative distance of two feature matrices."""
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture(scope="module")
def clean_fid_model(folder, tmp_path_factory) -> nn.Module:
    """clean-fid's InceptionV3W on a TorchScript file of clean-fid's own network.

    That network knows nothing of torch-fidelity's.
    """
    home = tmp_path_factory.mktemp("home")
    checkpoints = home / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    os.link(folder / INCEPTION, checkpoints / "pt_inception-2015-12-05-6726825d.pth")

    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = inception_pytorch.InceptionV3(
                [3], resize_input=False, normalize_input=False
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.network(x)[0]

    class Base(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = Layers().eval()

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x)

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        patch.setenv("TORCH_HOME", str(home))
        torch.jit.trace(Base().eval(), torch.zeros(2, 3, 299, 299)).save(
            str(home / "inception-2015-12-05.pt")
        )
        return InceptionV3W(str(home), download=False).eval()


def features_by_clean_fid(at: Path, model: nn.Module) -> Tensor:
    found = cleanfid.fid.get_folder_features(
        str(at), model, num_workers=0, device=torch.device("cpu"), mode="clean", verbose=False
    )
    return torch.from_numpy(found)


def test_torch_fidelity_is_the_package_itself(extractors, folder):
    pixels = images(3, size=(40, 24))
    theirs = FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048", "logits_unbiased"], str(folder / INCEPTION)
    )
    features, logits = extractors[TORCH_FIDELITY].features(pixels)
    assert (
        features.shape == (3, 2048)
        and logits.shape == (3, 1008)
        and features.dtype == logits.dtype == torch.float32
    )
    for ours, other in zip((features, logits), theirs(pixels), strict=True):
        assert torch.equal(ours, other)


def test_clean_fid_is_the_package_itself(extractors, clean_fid_model, tmp_path, monkeypatch):
    """Features through clean-fid's reading, resizer, network and scaling are ours.

    Another resizer or scale in ours would show.
    """
    pixels = images(3, size=(40, 24))
    theirs = features_by_clean_fid(png_folder(tmp_path / "a", pixels), clean_fid_model)
    ours, logits = extractors[CLEAN_FID].features(pixels)
    assert logits is None and ours.shape == (3, 2048)
    assert moved(ours, theirs) < 1e-5
    network = extractors[CLEAN_FID].network
    # Planted: another resizer, then clean-fid's with rounding
    for wrong in (
        "legacy_pytorch",
        "clean",
    ):
        resize = build_resizer(wrong)
        monkeypatch.setattr(network, "resize", lambda x, resize=resize: resize(x).round())
        assert moved(network(pixels)[0], theirs) > 1e-4, wrong


def test_the_resizer_is_all_that_differs_and_it_matters(extractors):
    small, native = images(2), images(2, size=(299, 299))
    both = [extractors[name] for name in (TORCH_FIDELITY, CLEAN_FID)]
    at_native, at_32 = ([e.features(x)[0] for e in both] for x in (native, small))
    assert moved(*at_native) < 1e-5
    assert moved(*at_32) > 0.01


def test_two_resizers_never_share_a_column(extractors, tmp_path):
    """One weight file, two hashes, two keys.

    A reference of one extractor is refused by the other, and the cache keeps them apart.
    """
    one, other = extractors[TORCH_FIDELITY], extractors[CLEAN_FID]
    assert weight_file(TORCH_FIDELITY) == weight_file(CLEAN_FID)
    assert one.sha256 != other.sha256
    assert evaluation_key(TORCH_FIDELITY) != evaluation_key(CLEAN_FID)
    pixels = images(2)
    for mine, theirs in ((one, other), (other, one)):
        foreign = Reference(torch.zeros(2, 2048), theirs.sha256)
        with pytest.raises(ValueError, match="not by " + mine.name):
            evaluate_images(pixels, None, Against(mine, foreign))
    kept = [reference_set(pixels, e, tmp_path) for e in (one, other)]
    assert len(list(tmp_path.iterdir())) == 2
    assert moved(*(r.features for r in kept)) > 0.01
    for mine, found in zip((one, other), kept, strict=True):
        assert torch.equal(reference_set(pixels, mine, tmp_path).features, found.features)
        assert found.extractor_sha256 == mine.sha256


def test_the_hash_is_that_of_file_and_name(extractors, folder, tmp_path, monkeypatch):
    content = (folder / INCEPTION).read_bytes()
    for name, extractor in extractors.items():
        assert extractor.sha256 == hashlib.sha256(content + name.encode()).hexdigest()
    key = evaluation_key(CLEAN_FID)
    (tmp_path / INCEPTION).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    monkeypatch.setenv("DISTILLBENCH_WEIGHTS", str(tmp_path))
    evaluation_key.cache_clear()
    assert evaluation_key(CLEAN_FID) != key


def test_published_means_the_hash_in_the_name(folder, tmp_path, monkeypatch, extractors):
    assert not extractors[TORCH_FIDELITY].published
    prefix = hashlib.sha256((folder / INCEPTION).read_bytes()).hexdigest()[:8]
    (tmp_path / f"weights-{prefix}.pth").symlink_to(folder / INCEPTION)
    monkeypatch.setattr(inception, "weight_file", lambda name: tmp_path / f"weights-{prefix}.pth")
    assert inception.load(CLEAN_FID).published
    assert load_extractor("digits-gelu-64").published


def test_batches_sizes_and_channels(extractors, monkeypatch):
    for extractor in extractors.values():
        monkeypatch.setattr(inception, "CHUNK", 32)
        grey = images(3, size=(16, 20), channels=1)
        together = extractor.features(grey)[0]
        assert moved(extractor.features(grey.repeat(1, 3, 1, 1))[0], together) < 1e-6
        monkeypatch.setattr(inception, "CHUNK", 2)
        assert moved(extractor.features(grey)[0], together) < 1e-5
        for wrong in (grey.float(), grey[0], grey.repeat(1, 2, 1, 1), grey[:0]):
            with pytest.raises(ValueError):
                extractor.features(wrong)


def test_names_are_known_and_near_misses_answered():
    known_extractor(TORCH_FIDELITY)
    with pytest.raises(ValueError, match="did you mean 'inception-clean-fid'"):
        load_extractor("inception-cleanfid")


def test_a_missing_file_is_one_line_that_says_what_to_put_where(tmp_path, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    # a wrong folder is not made up for by another
    monkeypatch.setenv("DISTILLBENCH_WEIGHTS", str(tmp_path / "nowhere"))
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / INCEPTION).symlink_to(folder / INCEPTION)
    for ask in (load_extractor, evaluation_key, weight_file):
        with pytest.raises(ValueError) as caught:
            ask(CLEAN_FID)
        line = str(caught.value)
        assert "\n" not in line
        for part in (
            CLEAN_FID,
            INCEPTION,
            str(tmp_path / "nowhere"),
            "torch-fidelity",
            "6726825d",
            "DISTILLBENCH_WEIGHTS",
        ):
            assert part in line
    monkeypatch.delenv("DISTILLBENCH_WEIGHTS")
    assert weight_file(CLEAN_FID) == Path("weights") / INCEPTION
    (tmp_path / "weights" / INCEPTION).unlink()
    with pytest.raises(ValueError, match="put it into"):
        weight_file(CLEAN_FID)
    hub = Path(torch.hub.get_dir()) / "checkpoints"  # what records.py says without importing torch
    assert hub.is_relative_to(tmp_path)
    hub.mkdir(parents=True)
    (hub / INCEPTION).symlink_to(folder / INCEPTION)
    assert weight_file(CLEAN_FID) == hub / INCEPTION
    monkeypatch.delenv("TORCH_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home2"))
    hub = Path(torch.hub.get_dir()) / "checkpoints"
    hub.mkdir(parents=True)
    (hub / INCEPTION).symlink_to(folder / INCEPTION)
    assert weight_file(CLEAN_FID) == hub / INCEPTION


class Bomb:
    """An object whose unpickling creates a file."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_code_in_the_file_is_refused_and_never_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILLBENCH_WEIGHTS", str(tmp_path))
    path, mark = tmp_path / INCEPTION, tmp_path / "ran"
    bombs = [
        lambda: torch.save({"fc.weight": Bomb(mark)}, path),
        lambda: path.write_bytes(pickle.dumps(Bomb(mark))),
    ]
    for write in bombs:
        write()
        with pytest.raises(ValueError, match="does not load as plain tensors") as caught:
            load_extractor(TORCH_FIDELITY)
        assert "\n" not in str(caught.value) and not mark.exists()
        with contextlib.suppress(RuntimeError):
            torch.load(path, weights_only=False)  # the bomb is real: a careless loader sets it off
        assert mark.exists()
        mark.unlink()


def test_other_content_is_refused_in_one_line(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILLBENCH_WEIGHTS", str(tmp_path))
    good = torch.load(folder / INCEPTION)
    truncated = (folder / INCEPTION).read_bytes()[:100_000]
    cases = {
        "size mismatch for fc.weight": good | {"fc.weight": torch.zeros(1000, 2048)},
        "Missing key": {name: value for name, value in good.items() if name != "fc.bias"},
        "Unexpected key": good | {"AuxLogits.fc.bias": torch.zeros(10)},
        "not a state dict": [torch.zeros(2)],
        "is not a state dict": good | {"epoch": 3},
        "does not load": truncated,
    }
    for message, content in cases.items():
        if isinstance(content, bytes):
            (tmp_path / INCEPTION).write_bytes(content)
        else:
            torch.save(content, tmp_path / INCEPTION)
        with pytest.raises(ValueError, match=message) as caught:
            load_extractor(CLEAN_FID)
        assert (
            "\n" not in str(caught.value)
            and INCEPTION in str(caught.value)
            and len(str(caught.value)) < 500
        )


def test_a_state_dict_with_batch_counters_gives_the_same_features(
    folder, tmp_path, monkeypatch, extractors
):
    good = torch.load(folder / INCEPTION)
    counters = {
        name.replace("running_var", "num_batches_tracked"): torch.tensor(0)
        for name in good
        if name.endswith("running_var")
    }
    full = OrderedDict(good | counters)
    full._metadata = OrderedDict({"": {"version": 1}})
    torch.save(full, tmp_path / INCEPTION)
    monkeypatch.setenv("DISTILLBENCH_WEIGHTS", str(tmp_path))
    again = load_extractor(TORCH_FIDELITY)
    pixels = images(1)
    assert torch.equal(again.features(pixels)[0], extractors[TORCH_FIDELITY].features(pixels)[0])
    assert again.sha256 != extractors[TORCH_FIDELITY].sha256


@pytest.mark.slow
def test_end_to_end_scores_equal_those_of_torch_fidelity(extractors, folder, tmp_path):
    generated, real = images(12, seed=1, contrast=0.7), images(12, seed=2)
    theirs = calculate_metrics(
        input1=str(png_folder(tmp_path / "generated", generated)),
        input2=str(png_folder(tmp_path / "real", real)),
        cuda=False,
        isc=True,
        fid=True,
        kid=True,
        isc_splits=1,
        kid_subsets=1,
        kid_subset_size=12,
        verbose=False,
        cache=False,
        save_cpu_ram=True,
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(folder / INCEPTION),
    )
    extractor = extractors[TORCH_FIDELITY]
    (features, logits), reference = extractor.features(generated), Reference.of(real, extractor)
    assert frechet_distance(features, reference.features) == pytest.approx(
        theirs["frechet_inception_distance"], rel=1e-6
    )
    # Their kernel is of order one and in float32, so a KID of 1e-2 has an error of some 1e-7.
    assert kid(features, reference.features) == pytest.approx(
        theirs["kernel_inception_distance_mean"], abs=5e-7
    )
    assert inception_score(logits) == pytest.approx(theirs["inception_score_mean"], rel=1e-6)
    other = extractors[CLEAN_FID]
    # Planted: what the guard forbids
    mixed = frechet_distance(other.features(generated)[0], reference.features)
    assert mixed != pytest.approx(theirs["frechet_inception_distance"], rel=0.1)


@pytest.mark.slow
def test_end_to_end_fid_equals_that_of_clean_fid(extractors, clean_fid_model, tmp_path):
    generated, real = images(24, seed=1, contrast=0.7), images(24, seed=2)
    theirs = [
        features_by_clean_fid(png_folder(tmp_path / name, x), clean_fid_model)
        for name, x in (("g", generated), ("r", real))
    ]
    ours = [extractors[CLEAN_FID].features(x)[0] for x in (generated, real)]
    assert moved(ours[0], theirs[0]) < 1e-5 and moved(ours[1], theirs[1]) < 1e-5
    few = [x[:, :: 2048 // 8] for x in theirs]
    assert frechet_distance(*few) == pytest.approx(by_clean_fid(*few), rel=1e-8)
    # 24 rows of 2048 columns: a square root of their singular product is good to some 1e-7,
    # ours is held to the exact value.
    fid = by_clean_fid(*theirs)
    assert frechet_distance(*theirs) == pytest.approx(fid, rel=2e-6)
    assert frechet_distance(*theirs) == pytest.approx(by_singular_values(*theirs), rel=1e-7)
    assert frechet_distance(*ours) == pytest.approx(fid, rel=1e-5)


def by_clean_fid(gen: Tensor, ref: Tensor) -> float:
    return float(np.real(cleanfid.fid.fid_from_feats(gen.double().numpy(), ref.double().numpy())))


def by_singular_values(gen: Tensor, ref: Tensor) -> float:
    """Frechet distance without a D x D matrix, of features [N, D].

    The trace of the square root is the sum of singular values of X Y^T over N - 1, X and Y centred.
    """
    (x, y), rows = (f.double() - f.double().mean(0) for f in (gen, ref)), len(gen) - 1
    gap = (gen.double().mean(0) - ref.double().mean(0)).square().sum()
    return (
        gap + (x.square().sum() + y.square().sum() - 2 * torch.linalg.svdvals(x @ y.T).sum()) / rows
    ).item()
