"""Samples as others release them, read strictly: what is not exactly as expected is refused in one line that names the
file, what is wrong and the remedy. Nothing is resized, converted, dropped, guessed or reordered, and no code is executed."""

from __future__ import annotations

import hashlib
import io
import re
import stat
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor

IMAGE_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".bmp": "BMP", ".webp": "WEBP"}
MODES = {1: "L", 3: "RGB"}  # PIL's name of 8-bit images by number of channels
TO_BYTES = "round to uint8 yourself: (x * 255).round() from [0, 1], ((x + 1) * 127.5).round() from [-1, 1]"
UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, MemoryError, struct.error, zlib.error, zipfile.BadZipFile, SafetensorError)

Report = Callable[[str, int, int], None]  # (what, done, total)


@dataclass(frozen=True)
class Samples:
    """`images` uint8 [N,C,H,W] (of a mixture float32 [N,*shape]) in the order of the file; `labels` int64 [N], the class
    that was asked for, or None; `sha256` of the decoded content, see `content_sha256`."""

    path: Path
    images: Tensor
    labels: Tensor | None
    sha256: str


def read_samples(path: Path, shape: tuple[int, ...], count: int, classes: int, report: Report | None = None) -> Samples:
    """`count` images uint8 of `shape` (C, H, W), with labels in 0..classes-1 where the file has them.

    - folder of .png, .jpg, .bmp or .webp in the order of their names, 2 before 10; or of class folders 0, 1, ...: their
      images are taken in turn, in proportion to the folders' sizes, so that equal folders give labels 0, 1, ..., 0, 1, ...
    - .npz: as `read_npz`
    - .safetensors: `samples` uint8 [N,C,H,W] and, optionally, `labels` [N] of integers
    Raises ValueError, one line, for everything else.
    """
    with _one_line(path):
        if stat.S_ISDIR(path.stat().st_mode):
            return _read_folder(path, shape, count, classes, report or (lambda what, done, total: None))
        if path.suffix == ".npz":
            key, (images, labels) = "arr_0", read_npz(path)
        elif path.suffix == ".safetensors":
            key, (images, labels) = "samples", _read_safetensors(path)
            _check_pixels(path, key, _numpy(images), _name(images))
        else:
            known = "a folder of images, .npz (arr_0) or .safetensors (samples)"
            raise ValueError(f"{path}: files ending in '{path.suffix}' are not read: give {known}")
        _check_shape(path, key, images, shape, "C,H,W")
        _check_count(path, len(images), count)
        return _accepted(path, images, labels, classes)


def read_points(path: Path, shape: tuple[int, ...], count: int) -> Samples:
    """`count` finite samples of a mixture from a .safetensors file: `samples` float32 [N,*shape]; else ValueError, one line."""
    with _one_line(path):
        path.stat()  # missing comes first
        if path.suffix != ".safetensors":
            raise ValueError(f"{path}: points come as .safetensors with a tensor 'samples' float32 [N,{_text(shape)}]")
        points, _ = _read_safetensors(path)
        if points.dtype != torch.float32:
            raise ValueError(f"{path}: 'samples' is {_name(points)}: store float32")
        _check_shape(path, "samples", points, shape, _text(shape))
        _check_count(path, len(points), count)
        _check_finite(path, "samples", points.numpy())
    return Samples(path, points, None, content_sha256(points))


def read_npz(path: Path) -> tuple[Tensor, Tensor | None]:
    """The layout of ADM's sample and reference batches: `arr_0` uint8 [N,H,W,C], optionally `arr_1` integers [N].

    Returns images uint8 [N,C,H,W], contiguous, and labels int64 [N] or None; other arrays are left alone.
    Raises ValueError, one line; pickled objects are refused. Source: openai/guided-diffusion, evaluations/README.md.
    """
    with _one_line(path):
        _check_regular(path)
        if not zipfile.is_zipfile(path):
            raise ValueError(f"{path}: no .npz archive, or a truncated one: write it again with np.savez(path, images)")
        try:
            with np.load(path, allow_pickle=False) as stored:
                names = list(stored.files)
                found = {name: stored[name] for name in ("arr_0", "arr_1") if names.count(name) == 1}
            whole = all(isinstance(array, np.ndarray) for array in found.values())  # numpy hands out other members as bytes
        except UNREADABLE as e:
            if isinstance(e, OSError) and e.errno:
                raise
            if "allow_pickle" in str(e):
                raise ValueError(f"{path}: holds pickled objects, which may run code: store plain arrays, x.astype(np.uint8)") from None
            whole = False
        if not whole:
            raise ValueError(f"{path}: a corrupt or truncated .npz archive: write it again with np.savez(path, images)")
        if "arr_0" not in found:
            held = f"holds {', '.join(names) or 'nothing'}" if names.count("arr_0") == 0 else "holds it twice"
            raise ValueError(f"{path}: no array 'arr_0' ({held}): write the images first, np.savez(path, images, labels)")
        images, labels = found["arr_0"], found.get("arr_1")
        _check_pixels(path, "arr_0", images, images.dtype.name)
        if images.ndim != 4 or images.shape[3] not in MODES:
            got, remedy = _text(images.shape), "np.savez(path, x.transpose(0, 2, 3, 1)) from [N,C,H,W], x[..., None] from [N,H,W]"
            raise ValueError(f"{path}: 'arr_0' is [{got}], expected [N,H,W,C] of 1 or 3 channels: {remedy}")
        # A copy: a view of grey images counts as contiguous, yet convolutions take it for channels last, and round otherwise.
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).clone(memory_format=torch.contiguous_format)
        return pixels, None if labels is None else _check_labels(path, "arr_1", labels, len(images))


def content_sha256(x: Tensor) -> str:
    """SHA-256 of dtype, shape and bytes in order, so that a folder, .npz and .safetensors of the same images agree."""
    found = hashlib.sha256(f"{_name(x)} {_text(x.shape)}\n".encode())
    for part in x.split(1024):
        found.update(part.numpy().tobytes())
    return found.hexdigest()


@contextmanager
def _one_line(path: Path) -> Iterator[None]:
    """Every refusal, the system's too, as a ValueError of one line."""
    try:
        yield
    except ValueError as e:
        raise ValueError(" ".join(str(e).split())) from None
    except OSError as e:
        if isinstance(e, FileNotFoundError):
            raise ValueError(f"{e.filename or path}: no such file or folder: check the path") from None
        raise ValueError(f"{e.filename or path}: cannot be read ({e.strerror or e}): mend that, then rerun") from None


def _accepted(path: Path, images: Tensor, labels: Tensor | None, classes: int) -> Samples:
    if images.max() <= 1:
        raise ValueError(f"{path}: no pixel is above {int(images.max())} of 255: bytes of images in [0, 1]? {TO_BYTES}")
    if labels is not None and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(f"{path}: labels from {labels.min()} to {labels.max()}: the classes are 0 to {classes - 1}")
    return Samples(path, images, labels, content_sha256(images))


def _read_safetensors(path: Path) -> tuple[Tensor, Tensor | None]:
    """The tensors `samples` and, where there is one, `labels`."""
    _check_regular(path)
    try:
        with safe_open(path, framework="pt") as f:
            names = sorted(f.keys())
            found = {name: f.get_tensor(name) for name in ("samples", "labels") if name in names}
    except UNREADABLE:
        raise ValueError(f"{path}: no .safetensors file, or a truncated one: write it again") from None
    if "samples" not in found:
        raise ValueError(f"{path}: no tensor 'samples' (holds {', '.join(names) or 'nothing'}): name it so")
    samples, labels = found["samples"], found.get("labels")
    if samples.ndim == 0 or len(samples) == 0:
        raise ValueError(f"{path}: 'samples' is empty: expected [N,...]")
    return samples, None if labels is None else _check_labels(path, "labels", _numpy(labels), len(samples))


def _read_folder(path: Path, shape: tuple[int, ...], count: int, classes: int, report: Report) -> Samples:
    files = _listing(path)
    _check_count(path, len(files), count)
    images = torch.empty(len(files), *shape, dtype=torch.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for i, (file, _) in enumerate(files):
            images[i] = torch.from_numpy(_decode(file, shape, first=i == 0))
            report("reading", i + 1, len(files))
    labels = None if files[0][1] is None else torch.tensor([label for _, label in files])
    return _accepted(path, images, labels, classes)


def _listing(path: Path) -> list[tuple[Path, int | None]]:
    """The image files of a folder with their labels, None without class folders, in the order they are read in."""
    inside = _in_order(path)
    if not inside:
        raise ValueError(f"{path}: an empty folder: give one with the images in it")
    folders = [p for p in inside if stat.S_ISDIR(p.stat().st_mode)]
    if not folders:
        return [(file, None) for file in _images_in(path, inside)]
    for p in inside:
        if p not in folders or not re.fullmatch("[0-9]+", p.name):
            raise ValueError(f"{p}: folders beside images are classes, named 0, 1, ..., with nothing else beside them: move or rename this")
    labels = [int(p.name) for p in folders]
    if len(set(labels)) < len(labels):
        twice = next(p for p, label in zip(folders, labels) if labels.count(label) > 1)
        raise ValueError(f"{twice}: two folders for one class: put their images into one")
    turns = []
    for folder, label in zip(folders, labels):
        files = _images_in(folder, _in_order(folder))
        turns += [((i + 0.5) / len(files), label, file) for i, file in enumerate(files)]
    return [(file, label) for _, label, file in sorted(turns, key=lambda turn: turn[:2])]


def _images_in(folder: Path, files: list[Path]) -> list[Path]:
    """`files`, once each is known to be a regular image file with a name of its own."""
    if not files:
        raise ValueError(f"{folder}: an empty class folder: remove it, or put its images there")
    for file, before in zip(files, [None, *files]):
        if not stat.S_ISREG(file.stat().st_mode) or file.suffix.lower() not in IMAGE_FORMATS:
            raise ValueError(f"{file}: no image file ({', '.join(IMAGE_FORMATS)}): remove it, only samples may lie there")
        if before is not None and _natural(file) == _natural(before):
            raise ValueError(f"{file}: second file for the sample {before.name}: remove one of them")
    return files


def _in_order(folder: Path) -> list[Path]:
    return sorted(folder.iterdir(), key=lambda path: (_natural(path), path.name))


def _natural(path: Path) -> list[tuple[str, int]]:
    """Orders 2 before 10; equal for a.png and a.jpg, 1.png and 01.png."""
    return [(text, int(number or 0)) for text, number in re.findall(r"([^0-9]*)([0-9]*)", path.stem.casefold())]


def _decode(file: Path, shape: tuple[int, ...], first: bool) -> np.ndarray:
    """One image file -> uint8 [C,H,W], exactly as it is stored."""
    kind, mode, (channels, height, width) = IMAGE_FORMATS[file.suffix.lower()], MODES[shape[0]], shape
    content = file.read_bytes()
    others = "" if first else ", unlike the images before it"
    try:
        with Image.open(io.BytesIO(content), formats=(kind,)) as image:  # reads the header only
            got, frames, clear = (image.mode, image.size), getattr(image, "n_frames", 1), "transparency" in image.info
    except (*UNREADABLE, Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ValueError(f"{file}: no readable {kind}: corrupt, or of another format than its name says: write it again") from None
    if got[1] != (width, height):
        raise ValueError(f"{file}: {got[1][0]}x{got[1][1]} pixels, expected {width}x{height}{others}: nothing is resized here")
    bits = content[24] if kind == "PNG" else 8  # in the header; PIL would drop the lower half of 16 bits
    if bits != 8 or got[0].startswith("I;16"):
        raise ValueError(f"{file}: {bits} bits per channel, expected 8{others}: store bytes yourself")
    if frames != 1 or clear:
        raise ValueError(f"{file}: {'several frames' if frames != 1 else 'a transparent colour'}{others}: write one opaque image per file")
    if got[0] != mode:
        names = {"L": "grey (L)", "RGB": "RGB"}
        remedy = f"save image.convert({mode!r}) where that loses nothing"
        raise ValueError(f"{file}: mode {got[0]}, expected {names[mode]}{others}: {remedy}")
    try:
        with Image.open(io.BytesIO(content), formats=(kind,)) as image:
            pixels = np.array(image)
    except (*UNREADABLE, Image.DecompressionBombError):
        raise ValueError(f"{file}: corrupt or truncated {kind}: write it again") from None
    return pixels.reshape(height, width, channels).transpose(2, 0, 1)


def _check_regular(path: Path) -> None:
    """An OSError in the system's words where a file cannot be opened; ValueError for pipes and devices, which may block."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError(f"{path}: no regular file: give a folder of images, .npz or .safetensors")
    with open(path, "rb"):
        pass


def _check_pixels(path: Path, key: str, x: np.ndarray, dtype: str) -> None:
    """uint8, or a line that says how to get there."""
    if dtype == "uint8":
        return
    if x.dtype.kind not in "fiu":
        raise ValueError(f"{path}: '{key}' is {dtype}, expected uint8 0 to 255: store pixels as such")
    _check_finite(path, key, x)
    span = f" from {x.min():g} to {x.max():g}" if x.size else ""
    remedy = TO_BYTES if x.dtype.kind == "f" else "if it is 0 to 255, x.astype(np.uint8)"
    raise ValueError(f"{path}: '{key}' is {dtype}{span}, expected uint8 0 to 255: {remedy}")


def _check_finite(path: Path, key: str, x: np.ndarray) -> None:
    bad = 0 if x.dtype.kind != "f" else int((~np.isfinite(x)).sum())
    if bad:
        raise ValueError(f"{path}: '{key}' has {bad} values that are NaN or infinite: the sampler diverged, nothing to score")


def _check_shape(path: Path, key: str, x: Tensor, shape: tuple[int, ...], letters: str) -> None:
    if tuple(x.shape[1:]) != shape:
        got, wanted = _text(x.shape), _text(shape)
        raise ValueError(f"{path}: '{key}' is [{got}] as N,{letters}, expected [N,{wanted}]: nothing is resized or transposed here")


def _check_count(path: Path, found: int, count: int) -> None:
    if found != count:
        remedy = f"draw as many, or say --count {found} and have the row marked as not comparable"
        raise ValueError(f"{path}: {found} samples, expected {count}: {remedy}")


def _check_labels(path: Path, key: str, labels: np.ndarray, count: int) -> Tensor:
    if labels.dtype.kind not in "iu" or labels.shape != (count,):
        raise ValueError(f"{path}: '{key}' is {labels.dtype.name} [{_text(labels.shape)}], expected [{count}] integers, a class per sample")
    return torch.from_numpy(labels.astype(np.int64))


def _numpy(x: Tensor) -> np.ndarray:
    """As numpy; floats that it lacks (bfloat16, float8) as float32."""
    return (x.float() if x.is_floating_point() and x.dtype != torch.float64 else x).numpy()


def _name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _text(shape: tuple[int, ...]) -> str:
    return ",".join(map(str, shape))
