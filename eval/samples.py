"""Samples as others release them, read strictly.

What is not exactly as expected is refused in one line that names the file, what is wrong and the
remedy. Nothing is resized, converted, dropped, guessed or reordered, and no code is executed.
"""

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
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor

IMAGE_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
MODES = {1: "L", 3: "RGB"}  # PIL's name of 8-bit images by number of channels
TO_BYTES = (
    "round to uint8 yourself: (x * 255).round() from [0, 1], "
    "((x + 1) * 127.5).round() from [-1, 1], (x * 255 / 16).round() from 0..16"
)
ORIENTATION = 0x0112  # EXIF's tag; 1 is upright
# safetensors' names of what has a range worth telling: torch cannot even convert some of the
# smaller floats.
INTEGERS = ("I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64")
NUMBERS = (*INTEGERS, "F16", "BF16", "F32", "F64")

Shape = tuple[int, ...]
Header = tuple[Shape, np.dtype]  # of an array in a .npz archive
CheckShape = Callable[[Shape], None]  # of the shape of all samples, before they are loaded
Report = Callable[[str, int, int], None]  # (what, done, total)


@dataclass(frozen=True)
class Samples:
    """Samples of a file or folder, in its order.

    images: uint8 [N,C,H,W], of a mixture float32 [N,*shape]; labels: int64 [N], the class that was
    asked for, or None; sha256: of the decoded content, see `content_sha256`.
    """

    path: Path
    images: Tensor
    labels: Tensor | None
    sha256: str


def read_samples(
    path: Path,
    shape: Shape,
    count: int,
    classes: int,
    brightest: int = 255,
    least: int = 1,
    report: Report | None = None,
) -> Samples:
    """`count` images uint8 of `shape` (C, H, W), with labels where the file has them.

    Labels are in 0..classes-1. Read are:
    - folder of .png, .jpg or .webp in the order of their names, 2 before 10; or of class folders 0,
      1, ...: their images are taken in turn, in proportion to the folders' sizes, so that equal
      folders give labels 0, 1, ..., 0, 1, ...
    - .npz: as `read_npz`
    - .safetensors: `samples` uint8 [N,C,H,W] and, optionally, `labels` [N] of integers

    `brightest`: the largest pixel of the benchmark's own images; samples that reach less than half
    of it are in another range. `least`: the smallest number of samples that can be scored.
    `report`: is called after each image of a folder. Raises ValueError, one line, for everything
    else.
    """

    def check_shape(key: str) -> CheckShape:
        def check(found: Shape) -> None:
            _check_shape(path, key, found, shape, "C,H,W")
            _check_count(path, found[0], count, least)

        return check

    with _one_line(path):
        if stat.S_ISDIR(path.stat().st_mode):
            images, labels = _read_folder(path, shape, count, least, report)
        elif path.suffix == ".npz":
            images, labels = _read_npz(path, check_shape("arr_0"))
        elif path.suffix == ".safetensors":
            images, labels = _read_safetensors(path, check_shape("samples"), "uint8 0 to 255")
            _check_pixels(path, "samples", _numpy(images), _name(images))
        else:
            known = "a folder of images, .npz (arr_0) or .safetensors (samples)"
            raise ValueError(f"{path}: files ending in '{path.suffix}' are not read: give {known}")
        _check_brightness(path, images, brightest)
        if labels is not None:
            _check_classes(path, labels, classes)
    return Samples(path, images, labels, content_sha256(images))


def read_points(path: Path, shape: Shape, count: int) -> Samples:
    """`count` finite samples of a mixture from a .safetensors file: `samples` float32 [N,*shape].

    Raises ValueError, one line, for everything else.
    """

    def check(found: Shape) -> None:
        _check_shape(path, "samples", found, shape, _text(shape))
        _check_count(path, found[0], count, least=1)

    with _one_line(path):
        path.stat()  # missing comes first
        if path.suffix != ".safetensors":
            expected = f"a tensor 'samples' float32 [N,{_text(shape)}]"
            raise ValueError(f"{path}: points come as .safetensors with {expected}")
        points, _ = _read_safetensors(path, check, "float32")
        if points.dtype != torch.float32:
            raise ValueError(f"{path}: 'samples' is {_name(points)}: store float32")
        _check_finite(path, "samples", points.numpy())
    return Samples(path, points, None, content_sha256(points))


def read_npz(path: Path) -> tuple[Tensor, Tensor | None]:
    """The layout of ADM's sample and reference batches.

    That is `arr_0` uint8 [N,H,W,C], optionally `arr_1` integers [N]; other arrays are left alone.
    Returns images uint8 [N,C,H,W], contiguous, and labels int64 [N] or None. Raises ValueError, one
    line; pickled objects are refused. Source: openai/guided-diffusion, evaluations/README.md.
    """

    def any_shape(found: Shape) -> None:
        """Take samples of any shape and number."""

    with _one_line(path):
        return _read_npz(path, any_shape)


def content_sha256(x: Tensor) -> str:
    """SHA-256 of dtype, shape and bytes of a tensor in order.

    A folder, .npz and .safetensors of the same images agree.
    """
    content = hashlib.sha256(f"{_name(x)} {_text(x.shape)}\n".encode())
    for part in x.split(1024):
        content.update(part.numpy().tobytes())
    return content.hexdigest()


@contextmanager
def _one_line(path: Path) -> Iterator[None]:
    """Every refusal, the system's too, as a ValueError of one line."""
    try:
        yield
    except ValueError as e:
        raise ValueError(" ".join(str(e).split())) from None
    except FileNotFoundError as e:
        missing = e.filename or path
        raise ValueError(f"{missing}: no such file or folder: check the path") from None
    except OSError as e:
        unreadable = e.filename or path
        reason = e.strerror or e
        raise ValueError(
            f"{unreadable}: cannot be read ({reason}): mend that, then rerun"
        ) from None


@contextmanager
def _reading(refusal: str) -> Iterator[None]:
    """Whatever a library raises on spoilt content, as this refusal.

    What the system says of the file itself goes through.
    """
    try:
        yield
    except Exception as e:  # zipfile, numpy, PIL and decompressors raise a dozen kinds
        if isinstance(e, OSError) and e.errno:
            raise
        raise ValueError(refusal) from None


def _read_npz(path: Path, check_shape: CheckShape) -> tuple[Tensor, Tensor | None]:
    """Images and labels as of `read_npz`; check_shape is given [N,C,H,W].

    All that the headers tell is checked before anything is unpacked: a small file may hold a huge
    array.
    """
    _check_regular(path)
    again = "write it again with np.savez(path, images)"
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path}: no .npz archive, or a truncated one: {again}")
    spoilt = f"{path}: a corrupt or truncated .npz archive: {again}"
    with _reading(spoilt):
        archive = zipfile.ZipFile(path)
    with archive:
        wanted = _wanted_arrays(path, archive)
        with _reading(spoilt):
            headers = {name: _npy_header(archive, f"{name}.npy") for name in wanted}
        _check_headers(path, headers, check_shape)
        with _reading(spoilt):
            arrays = {name: _npy(archive, f"{name}.npy") for name in wanted}
    pixels = arrays["arr_0"]
    _check_pixels(path, "arr_0", pixels, pixels.dtype.name)
    channels_first = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    # A copy: a view of grey images counts as contiguous, yet convolutions take it for channels
    # last, and round otherwise.
    images = channels_first.clone(memory_format=torch.contiguous_format)
    if "arr_1" not in arrays:
        return images, None
    return images, torch.from_numpy(arrays["arr_1"].astype(np.int64))


def _wanted_arrays(path: Path, archive: zipfile.ZipFile) -> list[str]:
    """`arr_0` and, where there is one, `arr_1`; ValueError where one is missing or there twice."""
    names = [name.removesuffix(".npy") for name in archive.namelist()]
    if "arr_0" not in names:
        held = ", ".join(names) or "nothing"
        raise ValueError(
            f"{path}: no array 'arr_0' (holds {held}): "
            "write the images first, np.savez(path, images, labels)"
        )
    wanted: list[str] = [name for name in ("arr_0", "arr_1") if name in names]
    for name in wanted:
        if names.count(name) > 1:
            remedy = "write it again with np.savez(path, images, labels)"
            raise ValueError(f"{path}: holds '{name}' twice: {remedy}")
    return wanted


def _check_headers(path: Path, headers: dict[str, Header], check_shape: CheckShape) -> None:
    """ValueError where the headers of a .npz do not announce images [N,H,W,C], or labels [N]."""
    if any(dtype.hasobject for _, dtype in headers.values()):
        raise ValueError(
            f"{path}: holds pickled objects, which may run code: "
            "store plain arrays, x.astype(np.uint8)"
        )
    shape, dtype = headers["arr_0"]
    if dtype.kind not in "fiu":
        raise ValueError(
            f"{path}: 'arr_0' is {dtype.name}, expected uint8 0 to 255: store pixels as such"
        )
    if len(shape) != 4 or shape[3] not in MODES or 0 in shape:
        raise ValueError(
            f"{path}: 'arr_0' is [{_text(shape)}], expected [N,H,W,C] of 1 or 3 channels: "
            "np.savez(path, x.transpose(0, 2, 3, 1)) from [N,C,H,W], x[..., None] from [N,H,W]"
        )
    count, height, width, channels = shape
    check_shape((count, channels, height, width))
    if "arr_1" in headers:
        labels_shape, kind = headers["arr_1"]
        _check_labels(path, "arr_1", kind.name, kind.kind in "iu", labels_shape, count)


def _npy_header(archive: zipfile.ZipFile, member: str) -> Header:
    """Shape and dtype of a .npy file.

    Raises whatever there is to raise if it is none, or not as long as these say.
    """
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    info = archive.getinfo(member)
    with archive.open(info) as f:
        read_header = readers[np.lib.format.read_magic(f)]
        shape, _, dtype = read_header(f)
        size = f.tell() + math.prod(shape) * dtype.itemsize
        is_whole = dtype.hasobject or info.file_size == size
        # numpy takes True for 1 here, and fails on it later.
        if not is_whole or bool in map(type, shape):
            raise ValueError("of another size than its header says")
    return shape, dtype


def _npy(archive: zipfile.ZipFile, member: str) -> np.ndarray:
    """A plain array of an archive; ValueError for pickled objects."""
    with archive.open(member) as f:
        return np.lib.format.read_array(f, allow_pickle=False)


def _read_safetensors(
    path: Path, check_shape: CheckShape, wanted: str
) -> tuple[Tensor, Tensor | None]:
    """The tensors `samples`, of numbers, and, where there is one, `labels`, int64.

    Checked by their headers before they are loaded; `wanted` says in refusals what is expected.
    """
    _check_regular(path)
    spoilt = f"{path}: no .safetensors file, or a truncated one: write it again"
    with _reading(spoilt):
        file = safe_open(path, framework="pt")
    with file:
        names = sorted(file.keys())
        if "samples" not in names:
            held = ", ".join(names) or "nothing"
            raise ValueError(f"{path}: no tensor 'samples' (holds {held}): name it so")
        headers = {}
        with _reading(spoilt):
            for name in ("samples", "labels"):
                if name in names:
                    part = file.get_slice(name)
                    headers[name] = (part.get_dtype(), tuple(part.get_shape()))
        dtype, shape = headers["samples"]
        if dtype not in NUMBERS:
            raise ValueError(f"{path}: 'samples' is {dtype}, expected {wanted}: store it as such")
        if not shape or 0 in shape:
            raise ValueError(f"{path}: 'samples' is empty: expected [N,...]")
        check_shape(shape)
        if "labels" in headers:
            kind, labels_shape = headers["labels"]
            _check_labels(path, "labels", kind, kind in INTEGERS, labels_shape, shape[0])
        with _reading(spoilt):
            tensors = {name: file.get_tensor(name) for name in headers}
    if "labels" not in tensors:
        return tensors["samples"], None
    return tensors["samples"], tensors["labels"].long()


def _read_folder(
    path: Path, shape: Shape, count: int, least: int, report: Report | None
) -> tuple[Tensor, Tensor | None]:
    """Images uint8 [N,C,H,W] of a folder, and labels int64 [N] where it has class folders."""
    files = _listing(path)
    _check_count(path, len(files), count, least)
    images = torch.empty(len(files), *shape, dtype=torch.uint8)
    labels = []
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for i, (file, label) in enumerate(files):
            images[i] = torch.from_numpy(_decode(file, shape, first=i == 0))
            if label is not None:
                labels.append(label)
            if report is not None:
                report("reading", i + 1, len(files))
    return images, torch.tensor(labels) if labels else None


def _listing(path: Path) -> list[tuple[Path, int | None]]:
    """The image files of a folder with their labels, in the order they are read in.

    Labels are None without class folders.
    """
    inside = _in_order(path)
    if not inside:
        raise ValueError(f"{path}: an empty folder: give one with the images in it")
    folders = [entry for entry in inside if stat.S_ISDIR(entry.stat().st_mode)]
    if not folders:
        return [(file, None) for file in _images_in(path, inside)]
    for entry in inside:
        if entry not in folders or not re.fullmatch("[0-9]{1,9}", entry.name):
            raise ValueError(
                f"{entry}: folders beside images are classes, named 0, 1, ..., "
                "with nothing else beside them: move or rename this"
            )
    labels = [int(folder.name) for folder in folders]
    for folder, label in zip(folders, labels):
        if labels.count(label) > 1:
            raise ValueError(f"{folder}: two folders for one class: put their images into one")
    # Image i of a folder of n stands at (i + 1/2) / n of the way; of equals, the smaller class.
    places = []
    for folder, label in zip(folders, labels):
        files = _images_in(folder, _in_order(folder))
        for i, file in enumerate(files):
            places.append(((i + 0.5) / len(files), label, file))
    places.sort(key=itemgetter(0, 1))
    return [(file, label) for _, label, file in places]


def _images_in(folder: Path, files: list[Path]) -> list[Path]:
    """`files`, once each is known to be a regular image file with a name of its own."""
    if not files:
        raise ValueError(f"{folder}: an empty class folder: remove it, or put its images there")
    for file, before in zip(files, [None, *files]):
        if not stat.S_ISREG(file.stat().st_mode) or file.suffix.lower() not in IMAGE_FORMATS:
            known = ", ".join(IMAGE_FORMATS)
            raise ValueError(
                f"{file}: no image file ({known}): remove it, only samples may lie there"
            )
        if before is not None and _natural(file) == _natural(before):
            raise ValueError(
                f"{file}: second file for the sample {before.name}: remove one of them"
            )
    return files


def _in_order(folder: Path) -> list[Path]:
    """Entries of a folder in the natural order of their names."""

    def order(path: Path) -> tuple[list[tuple[str, int]], str]:
        return _natural(path), path.name

    return sorted(folder.iterdir(), key=order)


def _natural(path: Path) -> list[tuple[str, int]]:
    """Sorting key: a, a0, a2, a10 in this order; equal for a.png and a.jpg, 1.png and 01.png."""
    parts = re.findall(r"([^0-9]*)([0-9]*)", path.stem.casefold())
    return [(text, int(number or -1)) for text, number in parts]


def _decode(file: Path, shape: Shape, first: bool) -> np.ndarray:
    """One image file as uint8 [C,H,W], exactly as it is stored.

    Raises ValueError for what is not an image of `shape` (C, H, W) with 8 bits per channel, upright
    and opaque; refusals of any but the first say that those before it were right.
    """
    channels, height, width = shape
    kind = IMAGE_FORMATS[file.suffix.lower()]
    others = "" if first else ", unlike the images before it"
    size = file.stat().st_size
    # Several times what noise takes, and room for a colour profile.
    if size > 2**20 + 8 * math.prod(shape):
        raise ValueError(
            f"{file}: {size} bytes, far more than {width}x{height} pixels take: "
            "write the image again, and nothing else"
        )
    content = file.read_bytes()
    _check_image_header(file, content, shape, others)
    with (
        _reading(f"{file}: corrupt or truncated {kind}: write it again"),
        Image.open(io.BytesIO(content), formats=(kind,)) as image,
    ):
        pixels = np.array(image)
        orientation = image.getexif().get(ORIENTATION, 1)
    if orientation != 1:
        raise ValueError(
            f"{file}: stored turned or mirrored (EXIF orientation {orientation}){others}: "
            "turn the pixels, drop the tag"
        )
    return pixels.reshape(height, width, channels).transpose(2, 0, 1)


def _check_image_header(file: Path, content: bytes, shape: Shape, others: str) -> None:
    """ValueError where the header of an image file tells that it is not as `_decode` takes it."""
    channels, height, width = shape
    kind = IMAGE_FORMATS[file.suffix.lower()]
    expected_mode = MODES[channels]
    unreadable = (
        f"{file}: no readable {kind}: corrupt, or of another format than its name says: "
        "write it again"
    )
    with (
        _reading(unreadable),
        Image.open(io.BytesIO(content), formats=(kind,)) as image,  # reads the header only
    ):
        mode = image.mode
        found_width, found_height = image.size
        frames = getattr(image, "n_frames", 1)
        has_transparency = "transparency" in image.info
    if (found_width, found_height) != (width, height):
        raise ValueError(
            f"{file}: {found_width}x{found_height} pixels, expected {width}x{height}{others}: "
            "nothing is resized here"
        )
    # A PNG says so in its header; PIL would drop the lower half of 16 bits.
    bits = content[24] if kind == "PNG" else 8
    if bits != 8 or mode.startswith("I;16"):
        raise ValueError(
            f"{file}: {bits} bits per channel, expected 8{others}: store bytes yourself"
        )
    if frames != 1 or has_transparency:
        what = "several frames" if frames != 1 else "a transparent colour"
        raise ValueError(f"{file}: {what}{others}: write one opaque image per file")
    if mode != expected_mode:
        names = {"L": "grey (L)", "RGB": "RGB"}
        remedy = f"save image.convert({expected_mode!r}) where that loses nothing"
        raise ValueError(f"{file}: mode {mode}, expected {names[expected_mode]}{others}: {remedy}")


def _check_regular(path: Path) -> None:
    """An OSError in the system's words where a file cannot be opened.

    ValueError for pipes and devices, which may block.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError(f"{path}: no regular file: give a folder of images, .npz or .safetensors")
    with open(path, "rb"):
        pass


def _check_pixels(path: Path, key: str, x: np.ndarray, dtype: str) -> None:
    """ValueError unless uint8: a line that says how to get there from these numbers."""
    if dtype == "uint8":
        return
    _check_finite(path, key, x)
    remedy = TO_BYTES if x.dtype.kind == "f" else "if it is 0 to 255, x.astype(np.uint8)"
    numbers = f"{dtype} from {x.min():g} to {x.max():g}"
    raise ValueError(f"{path}: '{key}' is {numbers}, expected uint8 0 to 255: {remedy}")


def _check_brightness(path: Path, images: Tensor, brightest: int) -> None:
    """ValueError where no pixel reaches half of the benchmark's brightest."""
    found = int(images.max())
    if 2 * found < brightest:
        raise ValueError(
            f"{path}: no pixel is above {found}, and the benchmark's reach {brightest}: "
            f"bytes of another range? {TO_BYTES}"
        )


def _check_classes(path: Path, labels: Tensor, classes: int) -> None:
    """ValueError where a label is not in 0..classes-1."""
    low = int(labels.min())
    high = int(labels.max())
    if low < 0 or high >= classes:
        raise ValueError(f"{path}: labels from {low} to {high}: the classes are 0 to {classes - 1}")


def _check_finite(path: Path, key: str, x: np.ndarray) -> None:
    """ValueError where floats are NaN or infinite."""
    if x.dtype.kind != "f":
        return
    bad = int((~np.isfinite(x)).sum())
    if bad:
        raise ValueError(
            f"{path}: '{key}' has {bad} values that are NaN or infinite: "
            "the sampler diverged, nothing to score"
        )


def _check_shape(path: Path, key: str, found: Shape, shape: Shape, letters: str) -> None:
    """ValueError unless `found` is [N,*shape]; `letters` names the axes of `shape`."""
    if found[1:] != shape:
        raise ValueError(
            f"{path}: '{key}' is [{_text(found)}] as N,{letters}, expected [N,{_text(shape)}]: "
            "nothing is resized or transposed here"
        )


def _check_count(path: Path, found: int, count: int, least: int) -> None:
    """ValueError unless there are `count` samples; from `least` on with a way to score them."""
    if found == count:
        return
    other = ""
    if found >= least:
        other = f", or say --count {found} and have the row marked as not comparable"
    raise ValueError(f"{path}: {found} samples, expected {count}: draw as many{other}")


def _check_labels(
    path: Path, key: str, dtype: str, are_integers: bool, shape: Shape, count: int
) -> None:
    """ValueError unless labels are `count` integers."""
    if not are_integers or shape != (count,):
        found = f"{dtype} [{_text(shape)}]"
        raise ValueError(
            f"{path}: '{key}' is {found}, expected [{count}] integers, a class per sample"
        )


def _numpy(x: Tensor) -> np.ndarray:
    """A tensor as numpy; floats that numpy lacks (bfloat16, float8) as float32."""
    if x.is_floating_point() and x.dtype != torch.float64:
        return x.float().numpy()
    return x.numpy()


def _name(x: Tensor) -> str:
    """Name of a dtype: uint8, float32, ..."""
    return str(x.dtype).removeprefix("torch.")


def _text(shape: Shape) -> str:
    """A shape as 3,8,8."""
    return ",".join(map(str, shape))
