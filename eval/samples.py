"""Samples as others release them, read strictly: what is not exactly as expected is refused in one line that names the
file, what is wrong and the remedy. Nothing is resized, converted, dropped, guessed or reordered, and no code is executed."""

from __future__ import annotations

import hashlib
import io
import math
import re
import stat
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor

IMAGE_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
MODES = {1: "L", 3: "RGB"}  # PIL's name of 8-bit images by number of channels
TO_BYTES = "round to uint8 yourself: (x * 255).round() from [0, 1], ((x + 1) * 127.5).round() from [-1, 1], (x * 255 / 16).round() from 0..16"
ORIENTATION = 0x0112  # EXIF's tag; 1 is upright
# safetensors' names of what has a range worth telling: torch cannot even convert some of the smaller floats
INTEGERS = ("I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64")
NUMBERS = (*INTEGERS, "F16", "BF16", "F32", "F64")

Check = Callable[[tuple[int, ...]], None]  # of the images' shape [N,C,H,W], before they are loaded
Report = Callable[[str, int, int], None]  # (what, done, total)


@dataclass(frozen=True)
class Samples:
    """`images` uint8 [N,C,H,W] (of a mixture float32 [N,*shape]) in the order of the file; `labels` int64 [N], the class
    that was asked for, or None; `sha256` of the decoded content, see `content_sha256`."""

    path: Path
    images: Tensor
    labels: Tensor | None
    sha256: str


def read_samples(
    path: Path,
    shape: tuple[int, ...],
    count: int,
    classes: int,
    brightest: int = 255,
    least: int = 1,
    report: Report | None = None,
) -> Samples:
    """`count` images uint8 of `shape` (C, H, W), with labels in 0..classes-1 where the file has them.

    - folder of .png, .jpg or .webp in the order of their names, 2 before 10; or of class folders 0, 1, ...: their
      images are taken in turn, in proportion to the folders' sizes, so that equal folders give labels 0, 1, ..., 0, 1, ...
    - .npz: as `read_npz`
    - .safetensors: `samples` uint8 [N,C,H,W] and, optionally, `labels` [N] of integers
    `brightest`: the largest pixel of the benchmark's own images; samples that reach less than half of it are in another range.
    `least`: the smallest number of samples that can be scored. Raises ValueError, one line, for everything else.
    """
    with _one_line(path):
        if stat.S_ISDIR(path.stat().st_mode):
            images, labels = _read_folder(
                path, shape, count, least, report or (lambda what, done, total: None)
            )
        elif path.suffix == ".npz":
            images, labels = _read_npz(
                path, lambda found: _check_shape(path, "arr_0", found, shape, "C,H,W", count, least)
            )
        elif path.suffix == ".safetensors":
            check = lambda found: _check_shape(path, "samples", found, shape, "C,H,W", count, least)
            images, labels = _read_safetensors(path, check, "uint8 0 to 255")
            _check_pixels(path, "samples", _numpy(images), _name(images))
        else:
            known = "a folder of images, .npz (arr_0) or .safetensors (samples)"
            raise ValueError(f"{path}: files ending in '{path.suffix}' are not read: give {known}")
        if 2 * (found := int(images.max())) < brightest:
            darker = f"no pixel is above {found}, and the benchmark's reach {brightest}: bytes of another range?"
            raise ValueError(f"{path}: {darker} {TO_BYTES}")
        if labels is not None and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
            raise ValueError(
                f"{path}: labels from {labels.min()} to {labels.max()}: the classes are 0 to {classes - 1}"
            )
    return Samples(path, images, labels, content_sha256(images))


def read_points(path: Path, shape: tuple[int, ...], count: int) -> Samples:
    """`count` finite samples of a mixture from a .safetensors file: `samples` float32 [N,*shape]; else ValueError, one line."""
    with _one_line(path):
        path.stat()  # missing comes first
        if path.suffix != ".safetensors":
            raise ValueError(
                f"{path}: points come as .safetensors with a tensor 'samples' float32 [N,{_text(shape)}]"
            )
        points, _ = _read_safetensors(
            path,
            lambda found: _check_shape(path, "samples", found, shape, _text(shape), count, 1),
            "float32",
        )
        if points.dtype != torch.float32:
            raise ValueError(f"{path}: 'samples' is {_name(points)}: store float32")
        _check_finite(path, "samples", points.numpy())
    return Samples(path, points, None, content_sha256(points))


def read_npz(path: Path) -> tuple[Tensor, Tensor | None]:
    """The layout of ADM's sample and reference batches: `arr_0` uint8 [N,H,W,C], optionally `arr_1` integers [N].

    Returns images uint8 [N,C,H,W], contiguous, and labels int64 [N] or None; other arrays are left alone.
    Raises ValueError, one line; pickled objects are refused. Source: openai/guided-diffusion, evaluations/README.md.
    """
    with _one_line(path):
        return _read_npz(path, lambda found: None)


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
            raise ValueError(
                f"{e.filename or path}: no such file or folder: check the path"
            ) from None
        raise ValueError(
            f"{e.filename or path}: cannot be read ({e.strerror or e}): mend that, then rerun"
        ) from None


@contextmanager
def _reading(refusal: str) -> Iterator[None]:
    """Whatever a library raises on spoilt content, as this refusal; what the system says of the file itself goes through."""
    try:
        yield
    except Exception as e:  # zipfile, numpy, PIL and decompressors raise a dozen kinds
        if isinstance(e, OSError) and e.errno:
            raise
        raise ValueError(refusal) from None


def _read_npz(path: Path, check: Check) -> tuple[Tensor, Tensor | None]:
    """As `read_npz`. All that the headers tell is checked before anything is unpacked: a small file may hold a huge array."""
    _check_regular(path)
    if not zipfile.is_zipfile(path):
        raise ValueError(
            f"{path}: no .npz archive, or a truncated one: write it again with np.savez(path, images)"
        )
    spoilt = (
        f"{path}: a corrupt or truncated .npz archive: write it again with np.savez(path, images)"
    )
    with _reading(spoilt):
        archive = zipfile.ZipFile(path)
    with archive:
        names = [name.removesuffix(".npy") for name in archive.namelist()]
        if "arr_0" not in names:
            held = ", ".join(names) or "nothing"
            raise ValueError(
                f"{path}: no array 'arr_0' (holds {held}): write the images first, np.savez(path, images, labels)"
            )
        wanted = [name for name in ("arr_0", "arr_1") if name in names]
        for name in wanted:
            if names.count(name) > 1:
                raise ValueError(
                    f"{path}: holds '{name}' twice: write it again with np.savez(path, images, labels)"
                )
        with _reading(spoilt):
            headers = {name: _npy_header(archive, f"{name}.npy") for name in wanted}
        if any(dtype.hasobject for _, dtype in headers.values()):
            raise ValueError(
                f"{path}: holds pickled objects, which may run code: store plain arrays, x.astype(np.uint8)"
            )
        shape, dtype = headers["arr_0"]
        if dtype.kind not in "fiu":
            raise ValueError(
                f"{path}: 'arr_0' is {dtype.name}, expected uint8 0 to 255: store pixels as such"
            )
        if len(shape) != 4 or shape[3] not in MODES or 0 in shape:
            got, remedy = (
                _text(shape),
                "np.savez(path, x.transpose(0, 2, 3, 1)) from [N,C,H,W], x[..., None] from [N,H,W]",
            )
            raise ValueError(
                f"{path}: 'arr_0' is [{got}], expected [N,H,W,C] of 1 or 3 channels: {remedy}"
            )
        check((shape[0], shape[3], *shape[1:3]))
        if "arr_1" in headers:
            of_labels, kind = headers["arr_1"]
            _check_labels(path, "arr_1", kind.name, kind.kind in "iu", of_labels, shape[0])
        with _reading(spoilt):
            found = {name: _npy(archive, f"{name}.npy") for name in wanted}
    images = found["arr_0"]
    _check_pixels(path, "arr_0", images, images.dtype.name)
    # A copy: a view of grey images counts as contiguous, yet convolutions take it for channels last, and round otherwise.
    pixels = (
        torch.from_numpy(images).permute(0, 3, 1, 2).clone(memory_format=torch.contiguous_format)
    )
    return pixels, torch.from_numpy(found["arr_1"].astype(np.int64)) if "arr_1" in found else None


def _npy_header(archive: zipfile.ZipFile, member: str) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of a .npy file; raises whatever there is to raise if it is none, or not as long as these say."""
    info = archive.getinfo(member)
    with archive.open(info) as f:
        versions = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        shape, _, dtype = versions[np.lib.format.read_magic(f)](f)
        whole = dtype.hasobject or info.file_size == f.tell() + math.prod(shape) * dtype.itemsize
        if not whole or bool in map(
            type, shape
        ):  # numpy takes True for 1 here, and fails on it later
            raise ValueError("of another size than its header says")
    return shape, dtype


def _npy(archive: zipfile.ZipFile, member: str) -> np.ndarray:
    with archive.open(member) as f:
        return np.lib.format.read_array(f, allow_pickle=False)


def _read_safetensors(path: Path, check: Check, wanted: str) -> tuple[Tensor, Tensor | None]:
    """The tensors `samples`, of numbers, and, where there is one, `labels`, int64; checked by their headers before they are loaded."""
    _check_regular(path)
    spoilt = f"{path}: no .safetensors file, or a truncated one: write it again"
    with _reading(spoilt):
        file = safe_open(path, framework="pt")
    with file:
        names = sorted(file.keys())
        if "samples" not in names:
            raise ValueError(
                f"{path}: no tensor 'samples' (holds {', '.join(names) or 'nothing'}): name it so"
            )
        with _reading(spoilt):
            slices = {name: file.get_slice(name) for name in ("samples", "labels") if name in names}
            headers = {
                name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()
            }
        dtype, shape = headers["samples"]
        if dtype not in NUMBERS:
            raise ValueError(f"{path}: 'samples' is {dtype}, expected {wanted}: store it as such")
        if not shape or 0 in shape:
            raise ValueError(f"{path}: 'samples' is empty: expected [N,...]")
        check(shape)
        if "labels" in headers:
            kind, of_labels = headers["labels"]
            _check_labels(path, "labels", kind, kind in INTEGERS, of_labels, shape[0])
        with _reading(spoilt):
            found = {name: file.get_tensor(name) for name in headers}
    return found["samples"], found["labels"].long() if "labels" in found else None


def _read_folder(
    path: Path, shape: tuple[int, ...], count: int, least: int, report: Report
) -> tuple[Tensor, Tensor | None]:
    files = _listing(path)
    _check_count(path, len(files), count, least)
    images = torch.empty(len(files), *shape, dtype=torch.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for i, (file, _) in enumerate(files):
            images[i] = torch.from_numpy(_decode(file, shape, first=i == 0))
            report("reading", i + 1, len(files))
    return images, None if files[0][1] is None else torch.tensor([label for _, label in files])


def _listing(path: Path) -> list[tuple[Path, int | None]]:
    """The image files of a folder with their labels, None without class folders, in the order they are read in."""
    inside = _in_order(path)
    if not inside:
        raise ValueError(f"{path}: an empty folder: give one with the images in it")
    folders = [p for p in inside if stat.S_ISDIR(p.stat().st_mode)]
    if not folders:
        return [(file, None) for file in _images_in(path, inside)]
    for p in inside:
        if p not in folders or not re.fullmatch("[0-9]{1,9}", p.name):
            raise ValueError(
                f"{p}: folders beside images are classes, named 0, 1, ..., with nothing else beside them: move or rename this"
            )
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
            raise ValueError(
                f"{file}: no image file ({', '.join(IMAGE_FORMATS)}): remove it, only samples may lie there"
            )
        if before is not None and _natural(file) == _natural(before):
            raise ValueError(
                f"{file}: second file for the sample {before.name}: remove one of them"
            )
    return files


def _in_order(folder: Path) -> list[Path]:
    return sorted(folder.iterdir(), key=lambda path: (_natural(path), path.name))


def _natural(path: Path) -> list[tuple[str, int]]:
    """Orders a, a0, a2, a10; equal for a.png and a.jpg, 1.png and 01.png."""
    return [
        (text, int(number or -1))
        for text, number in re.findall(r"([^0-9]*)([0-9]*)", path.stem.casefold())
    ]


def _decode(file: Path, shape: tuple[int, ...], first: bool) -> np.ndarray:
    """One image file -> uint8 [C,H,W], exactly as it is stored."""
    kind, mode, (channels, height, width) = (
        IMAGE_FORMATS[file.suffix.lower()],
        MODES[shape[0]],
        shape,
    )
    size, others = file.stat().st_size, "" if first else ", unlike the images before it"
    if size > 2**20 + 8 * math.prod(
        shape
    ):  # several times what noise takes, and room for a colour profile
        raise ValueError(
            f"{file}: {size} bytes, far more than {width}x{height} pixels take: write the image again, and nothing else"
        )
    content = file.read_bytes()
    unreadable = f"{file}: no readable {kind}: corrupt, or of another format than its name says: write it again"
    with (
        _reading(unreadable),
        Image.open(io.BytesIO(content), formats=(kind,)) as image,
    ):  # reads the header only
        got, frames, clear = (
            (image.mode, image.size),
            getattr(image, "n_frames", 1),
            "transparency" in image.info,
        )
    if got[1] != (width, height):
        raise ValueError(
            f"{file}: {got[1][0]}x{got[1][1]} pixels, expected {width}x{height}{others}: nothing is resized here"
        )
    bits = (
        content[24] if kind == "PNG" else 8
    )  # in the header; PIL would drop the lower half of 16 bits
    if bits != 8 or got[0].startswith("I;16"):
        raise ValueError(
            f"{file}: {bits} bits per channel, expected 8{others}: store bytes yourself"
        )
    if frames != 1 or clear:
        raise ValueError(
            f"{file}: {'several frames' if frames != 1 else 'a transparent colour'}{others}: write one opaque image per file"
        )
    if got[0] != mode:
        names = {"L": "grey (L)", "RGB": "RGB"}
        remedy = f"save image.convert({mode!r}) where that loses nothing"
        raise ValueError(f"{file}: mode {got[0]}, expected {names[mode]}{others}: {remedy}")
    with (
        _reading(f"{file}: corrupt or truncated {kind}: write it again"),
        Image.open(io.BytesIO(content), formats=(kind,)) as image,
    ):
        pixels, orientation = np.array(image), image.getexif().get(ORIENTATION, 1)
    if orientation != 1:
        raise ValueError(
            f"{file}: stored turned or mirrored (EXIF orientation {orientation}){others}: turn the pixels, drop the tag"
        )
    return pixels.reshape(height, width, channels).transpose(2, 0, 1)


def _check_regular(path: Path) -> None:
    """An OSError in the system's words where a file cannot be opened; ValueError for pipes and devices, which may block."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError(f"{path}: no regular file: give a folder of images, .npz or .safetensors")
    with open(path, "rb"):
        pass


def _check_pixels(path: Path, key: str, x: np.ndarray, dtype: str) -> None:
    """uint8, or a line that says how to get there from these numbers."""
    if dtype == "uint8":
        return
    _check_finite(path, key, x)
    remedy = TO_BYTES if x.dtype.kind == "f" else "if it is 0 to 255, x.astype(np.uint8)"
    raise ValueError(
        f"{path}: '{key}' is {dtype} from {x.min():g} to {x.max():g}, expected uint8 0 to 255: {remedy}"
    )


def _check_finite(path: Path, key: str, x: np.ndarray) -> None:
    bad = 0 if x.dtype.kind != "f" else int((~np.isfinite(x)).sum())
    if bad:
        raise ValueError(
            f"{path}: '{key}' has {bad} values that are NaN or infinite: the sampler diverged, nothing to score"
        )


def _check_shape(
    path: Path,
    key: str,
    found: tuple[int, ...],
    shape: tuple[int, ...],
    letters: str,
    count: int,
    least: int,
) -> None:
    if found[1:] != shape:
        got, wanted = _text(found), _text(shape)
        raise ValueError(
            f"{path}: '{key}' is [{got}] as N,{letters}, expected [N,{wanted}]: nothing is resized or transposed here"
        )
    _check_count(path, found[0], count, least)


def _check_count(path: Path, found: int, count: int, least: int) -> None:
    if found != count:
        other = (
            f", or say --count {found} and have the row marked as not comparable"
            if found >= least
            else ""
        )
        raise ValueError(f"{path}: {found} samples, expected {count}: draw as many{other}")


def _check_labels(
    path: Path, key: str, dtype: str, integers: bool, shape: tuple[int, ...], count: int
) -> None:
    if not integers or shape != (count,):
        raise ValueError(
            f"{path}: '{key}' is {dtype} [{_text(shape)}], expected [{count}] integers, a class per sample"
        )


def _numpy(x: Tensor) -> np.ndarray:
    """As numpy; floats that it lacks (bfloat16, float8) as float32."""
    return (x.float() if x.is_floating_point() and x.dtype != torch.float64 else x).numpy()


def _name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _text(shape: tuple[int, ...]) -> str:
    return ",".join(map(str, shape))
