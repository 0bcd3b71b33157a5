"""Files of samples as others release them, for the tests of `distillbench evaluate PATH`."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from distillbench.cli import main
from distillbench.config import DigitsData
from distillbench.data import kinds
from distillbench.data.images import Images, to_bytes
from eval.metrics.evaluate import GENERATORS

N = 1000  # samples of the benchmark `tiny`
FLAT = ["--benchmark", "tiny"]


@cache
def digits() -> Images:
    """The benchmark's data, images as bytes."""
    found = kinds.load(DigitsData(kind="digits"))
    return Images(
        to_bytes(found.train),
        found.train_labels,
        to_bytes(found.reference),
        found.reference_labels,
        10,
    )


@cache
def memorised() -> Tensor:
    """N images of the training half, classes in turn: the fixed row `memoriser` of seed 0."""
    generators = [g.__name__ for g in GENERATORS]
    index = generators.index("memoriser")
    return GENERATORS[index](
        digits().train, digits().train_labels, N, np.random.default_rng([0, index])
    )


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `distillbench evaluate ...` in this process."""
    code = 0
    argv, sys.argv = sys.argv, ["distillbench", *arguments]
    try:
        main.main()
    except SystemExit as e:
        code = int(e.code or 0)
    finally:
        sys.argv = argv
    return code, *capsys.readouterr()


def picture(path: str | Path, image: np.ndarray | None = None, **how) -> Path:
    """An image file; 8x8 grey noise unless told otherwise."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8)
    Image.fromarray(noise if image is None else image).save(path, **how)
    return path


def folder(images: Tensor, path: str = "bad") -> Path:
    """A folder 0.png, 1.png, ... of uint8 [N,1,H,W]."""
    Path(path).mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image[0].numpy()).save(f"{path}/{i}.png")
    return Path(path)


def npz(*arrays: np.ndarray, **named: np.ndarray) -> None:
    np.savez("bad.npz", *arrays, **named)


def channels_last(images: Tensor) -> np.ndarray:
    return images.permute(0, 2, 3, 1).numpy()
