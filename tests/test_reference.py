"""Reference features are computed once per content, and nothing but the same content ever hits."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from eval.features.extractor import Extractor
from eval.features.extractors import load_extractor
from eval.metrics import reference
from eval.metrics.frechet import frechet_distance
from eval.metrics.reference import reference_set
from eval.metrics.statistics import Reference


class Counting(nn.Module):
    """The extractor's network, or another, and how many images it has seen."""

    def __init__(self, network: nn.Module, factor: float = 1):
        super().__init__()
        self.network, self.factor, self.seen = network, factor, 0

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.seen += len(x)
        features, logits = self.network(x)
        return self.factor * features, logits


@pytest.fixture
def extractor() -> Extractor:
    found = load_extractor("digits-gelu-64")
    return replace(found, network=Counting(found.network))


@pytest.fixture
def sets() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    bright = torch.randint(0, 256, (40, 1, 8, 8), dtype=torch.uint8, generator=g)
    return bright, bright // 2


def seen(extractor: Extractor) -> int:
    """Images computed since the last question."""
    assert isinstance(extractor.network, Counting)
    count, extractor.network.seen = extractor.network.seen, 0
    return count


def one_file(folder: Path) -> Path:
    [found] = folder.iterdir()  # no partial file left either
    return found


@pytest.fixture
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.usefixtures("quiet")
def test_computed_once_and_read_back_exactly(extractor, sets, tmp_path):
    folder = tmp_path / "deep" / "cache"
    first = reference_set(sets[0], extractor, folder)
    assert seen(extractor) == 40
    again = reference_set(sets[0].clone(), extractor, folder)
    assert seen(extractor) == 0
    direct = Reference.of(sets[0], extractor)
    for found in (first, again):
        assert (
            torch.equal(found.features, direct.features)
            and found.extractor_sha256 == extractor.sha256
        )
    assert one_file(folder).name.startswith("digits-gelu-64-")
    generated = extractor.features(sets[1])[0]
    assert frechet_distance(generated, again.features) == frechet_distance(
        generated, direct.features
    )


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("what", ["order", "one pixel", "fewer", "shape"])
def test_other_images_never_hit(what, extractor, sets, tmp_path):
    images = sets[0]
    reference_set(images, extractor, tmp_path)
    seen(extractor)
    other = images.clone()
    other[3, 0, 0, 0] ^= 1
    changed = {
        "order": images.flip(0),
        "one pixel": other,
        "fewer": images[:-1],
        "shape": images.transpose(2, 3),
    }[what]
    found = reference_set(changed, extractor, tmp_path)
    assert seen(extractor) == len(changed)
    assert torch.equal(found.features, extractor.features(changed)[0])


@pytest.mark.usefixtures("quiet")
def test_same_path_with_other_images_never_hits(extractor, sets, tmp_path, monkeypatch):
    """The same path with other images is another key of the cache, which has the content's hash.

    torch-fidelity's is keyed by a name and answers with the old value.
    """
    path, folder = tmp_path / "reference.npz", tmp_path / "cache"
    for images in sets:
        np.savez(path, images.permute(0, 2, 3, 1).numpy())
        assert torch.equal(
            reference_set(path, extractor, folder).features, extractor.features(images)[0]
        )
    monkeypatch.setattr(reference, "content_sha256", lambda images: path.name)  # planted
    stale = []
    for images in sets:
        np.savez(path, images.permute(0, 2, 3, 1).numpy())
        stale.append(reference_set(path, extractor, folder))
    assert torch.equal(stale[0].features, stale[1].features)


@pytest.mark.usefixtures("quiet")
def test_other_weights_under_the_same_name_never_hit(extractor, sets, tmp_path):
    other = replace(extractor, network=Counting(extractor.network, factor=2), sha256="0" * 64)
    planted = replace(other, sha256=extractor.sha256)
    first = reference_set(sets[0], extractor, tmp_path)
    assert torch.equal(reference_set(sets[0], other, tmp_path).features, 2 * first.features)
    # the hash is what protects
    assert torch.equal(reference_set(sets[0], planted, tmp_path).features, first.features)


@pytest.mark.usefixtures("quiet")
def test_edited_evaluation_never_hits(extractor, sets, tmp_path, monkeypatch):
    reference_set(sets[0], extractor, tmp_path)
    monkeypatch.setattr(reference, "evaluation_key", lambda name: "edited")
    seen(extractor)
    reference_set(sets[0], extractor, tmp_path)
    assert seen(extractor) == 40


def test_a_file_moved_under_another_name_is_found_out(extractor, sets, tmp_path, monkeypatch):
    one, other = tmp_path / "one", tmp_path / "other"
    for folder, images in zip((one, other), sets, strict=True):
        reference_set(images, extractor, folder)
    shutil.copy(one_file(one), one_file(other))
    with pytest.warns(UserWarning, match="made of other images") as caught:
        found = reference_set(sets[1], extractor, other)
    assert "\n" not in str(caught[0].message)
    assert torch.equal(found.features, extractor.features(sets[1])[0])
    seen(extractor)
    reference_set(sets[1], extractor, other)  # and was replaced
    assert seen(extractor) == 0
    shutil.copy(one_file(one), one_file(other))
    # Planted: believe the name
    monkeypatch.setattr(reference, "read", lambda path, made_of: original(path, reference_of(path)))
    assert torch.equal(
        reference_set(sets[1], extractor, other).features, extractor.features(sets[0])[0]
    )


original = reference.read


def reference_of(path: Path) -> dict[str, str]:
    with reference.safe_open(path, framework="pt") as f:
        return {key: value for key, value in f.metadata().items() if key != "features_sha256"}


@pytest.mark.parametrize("keep", [0, 5, 400, -1])
def test_a_damaged_file_is_computed_again_with_one_line(keep, extractor, sets, tmp_path):
    good = reference_set(sets[0], extractor, tmp_path)
    path = one_file(tmp_path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.warns(UserWarning, match="computed again") as caught:
        found = reference_set(sets[0], extractor, tmp_path)
    [warning] = caught
    assert "\n" not in str(warning.message) and path.name in str(warning.message)
    assert torch.equal(found.features, good.features)
    one_file(tmp_path)
    seen(extractor)
    # mended
    assert torch.equal(reference_set(sets[0], extractor, tmp_path).features, good.features)
    assert seen(extractor) == 0


def test_flipped_bits_are_found_out(extractor, sets, tmp_path):
    good = reference_set(sets[0], extractor, tmp_path)
    path = one_file(tmp_path)
    content = bytearray(path.read_bytes())
    content[-2] ^= 1  # of a feature: everything that the file says of itself still holds
    path.write_bytes(content)
    with pytest.warns(UserWarning, match="not those that were written"):
        found = reference_set(sets[0], extractor, tmp_path)
    assert torch.equal(found.features, good.features)


def test_a_failed_write_costs_a_warning_and_leaves_nothing(extractor, sets, tmp_path, monkeypatch):
    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(reference, "save_file", full)
    with pytest.warns(UserWarning, match=r"was not written.*No space left"):
        found = reference_set(sets[0], extractor, tmp_path)
    assert torch.equal(found.features, extractor.features(sets[0])[0])
    assert list(tmp_path.iterdir()) == []


def test_no_folder_is_said_before_any_work(extractor, sets, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="name one that can be written"):
        reference_set(sets[0], extractor, tmp_path / "file")
    assert seen(extractor) == 0


@pytest.mark.usefixtures("quiet")
def test_adm_batches_give_their_images_and_nothing_else(extractor, sets, tmp_path):
    """mu and sigma are of another network: here they are pickles, so reading them would raise."""
    images, path, folder = sets[0], tmp_path / "VIRTUAL.npz", tmp_path / "cache"
    poison = {
        name: np.array([{"not": "read"}], dtype=object)
        for name in ("mu", "sigma", "mu_s", "sigma_s")
    }
    np.savez(path, images.permute(0, 2, 3, 1).numpy(), np.arange(40), **poison)
    with np.load(path, allow_pickle=False) as stored, pytest.raises(ValueError):
        stored["mu"]
    found = reference_set(path, extractor, folder)
    assert torch.equal(found.features, extractor.features(images)[0])
    seen(extractor)
    reference_set(images, extractor, folder)  # the same content, as a tensor
    assert seen(extractor) == 0


def test_bad_batches_are_one_line_each(extractor, tmp_path):
    """The wording is the reader's and tested with it; here, that none becomes a reference."""
    pixels, path = np.zeros((4, 8, 8, 1), np.uint8), tmp_path / "batch.npz"
    cases = {
        "other name": lambda: np.savez(path, images=pixels),
        "pickle": lambda: np.savez(path, np.array([{"a": 1}], dtype=object)),
        "floats": lambda: np.savez(path, pixels / 255),
        "labels": lambda: np.savez(path, pixels, np.arange(3)),
        "truncated": lambda: path.write_bytes(path.read_bytes()[:100]),
        "no file": lambda: path.unlink(),
        "size": lambda: np.savez(path, np.zeros((4, 16, 16, 3), np.uint8)),
    }
    for make in cases.values():
        make()
        with pytest.raises(ValueError, match=r"batch\.npz|takes uint8") as caught:
            reference_set(path, extractor, tmp_path / "cache")
        assert "\n" not in str(caught.value)
    assert list((tmp_path / "cache").iterdir()) == []
