"""`distillbench evaluate PATH`: what is refused, in which words, and what the scores of released samples are.

`pytest -s tests/test_external.py -k refused` prints "kind: line" for every kind of bad file.
"""

from __future__ import annotations

import io
import json
import os
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from distillbench import cli, scoring
from distillbench import data as data_sets
from distillbench.config import DigitsData
from eval import evaluate, external, records
from eval.rows import build_rows, protocol
from eval.samples import content_sha256, read_samples
from tests.test_tables import ROOT, copy_of_the_published

N = 1000  # samples of the benchmark `tiny`
FLAT = ["--benchmark", "tiny"]


@pytest.fixture(scope="session")
def digits() -> data_sets.Images:
    """The benchmark's data, images as bytes."""
    found = data_sets.load(DigitsData(kind="digits"))
    return data_sets.Images(
        data_sets.to_bytes(found.train), found.train_labels, data_sets.to_bytes(found.reference), found.reference_labels, 10
    )


@pytest.fixture(scope="session")
def good(digits) -> Tensor:
    """N images drawn from the training half, classes in turn: the fixed row `memoriser` of seed 0."""
    generators = [g.__name__ for g in evaluate.GENERATORS]
    index = generators.index("memoriser")
    return evaluate.GENERATORS[index](digits.train, digits.train_labels, N, np.random.default_rng([0, index]))


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `distillbench evaluate ...` in this process."""
    code = 0
    argv, sys.argv = sys.argv, ["distillbench", *arguments]
    try:
        cli.main()
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


# ---------------------------------------------------------------- what is refused

KINDS: dict[str, tuple[Callable[[Tensor], object], str]] = {}


def kind(what: str, line: str) -> Callable[[Callable[[Tensor], object]], None]:
    """Registers a maker of a bad file named `bad*` from good images, and the line that refuses it."""

    def register(make: Callable[[Tensor], object]) -> None:
        KINDS[what] = (make, line)

    return register


@kind(
    "path missing",
    "evaluate bad: neither a path (no such file or folder) nor a benchmark followed by an arm "
    "(known: check-digits, check-mixture, tiny, tiny-ring)",
)
def _(x):
    pass


@kind("empty folder", "bad: an empty folder: give one with the images in it")
def _(x):
    Path("bad").mkdir()


@kind("wrong count", "bad: 3 samples, expected 1000: draw as many")
def _(x):
    folder(x[:3])


@kind("another count", "bad: 900 samples, expected 1000: draw as many, or say --count 900 and have the row marked as not comparable")
def _(x):
    folder(x[:900])


@kind("not an image", "bad/notes.txt: no image file (.png, .jpg, .jpeg, .webp): remove it, only samples may lie there")
def _(x):
    folder(x)
    Path("bad/notes.txt").write_text("see paper\n")


@kind("hidden file", "bad/.DS_Store: no image file (.png, .jpg, .jpeg, .webp): remove it, only samples may lie there")
def _(x):
    folder(x)
    Path("bad/.DS_Store").write_bytes(b"\0")


@kind("mis-sized", "bad/0.png: 16x16 pixels, expected 8x8: nothing is resized here")
def _(x):
    folder(x.repeat_interleave(2, 2).repeat_interleave(2, 3))


@kind("mixed sizes", "bad/7.png: 9x8 pixels, expected 8x8, unlike the images before it: nothing is resized here")
def _(x):
    folder(x)
    picture("bad/7.png", np.zeros((8, 9), np.uint8))


@kind("grey stored as RGB", "bad/0.png: mode RGB, expected grey (L): save image.convert('L') where that loses nothing")
def _(x):
    folder(x)
    picture("bad/0.png", np.repeat(x[0, 0].numpy()[..., None], 3, 2))


@kind(
    "mixed modes", "bad/5.png: mode RGBA, expected grey (L), unlike the images before it: save image.convert('L') where that loses nothing"
)
def _(x):
    folder(x)
    picture("bad/5.png", np.zeros((8, 8, 4), np.uint8))


@kind("16-bit image", "bad/0.png: 16 bits per channel, expected 8: store bytes yourself")
def _(x):
    folder(x)
    picture("bad/0.png", np.full((8, 8), 40000, np.uint16))


@kind("black and white", "bad/0.png: 1 bits per channel, expected 8: store bytes yourself")
def _(x):
    folder(x)
    Image.new("1", (8, 8)).save("bad/0.png")


@kind("animation", "bad/2.png: several frames, unlike the images before it: write one opaque image per file")
def _(x):
    folder(x)
    frames = [Image.new("L", (8, 8), shade) for shade in (0, 90)]
    frames[0].save("bad/2.png", save_all=True, append_images=frames[1:])


@kind("transparent colour", "bad/0.png: a transparent colour: write one opaque image per file")
def _(x):
    folder(x)
    picture("bad/0.png", transparency=0)


@kind("corrupt image", "bad/3.png: corrupt or truncated PNG: write it again")
def _(x):
    folder(x)
    file = picture("bad/3.png", compress_level=0)
    content = bytearray(file.read_bytes())
    content[content.index(b"IDAT") + 30] ^= 1  # one bit of a pixel: the checksum alone sees it
    file.write_bytes(content)


@kind("truncated PNG", "bad/0.png: corrupt or truncated PNG: write it again")
def _(x):
    folder(x)
    file = picture("bad/0.png")
    file.write_bytes(file.read_bytes()[:-30])


@kind("truncated JPEG", "bad/0.jpg: corrupt or truncated JPEG: write it again")
def _(x):
    folder(x)
    os.unlink("bad/0.png")
    file = picture("bad/0.jpg")
    file.write_bytes(file.read_bytes()[:-12])


@kind("another format than its name", "bad/0.png: no readable PNG: corrupt, or of another format than its name says: write it again")
def _(x):
    folder(x)
    os.replace(picture("bad/0.jpg"), "bad/0.png")


@kind("empty file", "bad/4.png: no readable PNG: corrupt, or of another format than its name says: write it again")
def _(x):
    folder(x)
    Path("bad/4.png").write_bytes(b"")


@kind("endless file", "bad/19.png: 8000000000000 bytes, far more than 8x8 pixels take: write the image again, and nothing else")
def _(x):
    folder(x)
    os.truncate("bad/19.png", 8 * 10**12)  # sparse


@kind("turned JPEG", "bad/0.jpg: stored turned or mirrored (EXIF orientation 6): turn the pixels, drop the tag")
def _(x):
    folder(x)
    os.unlink("bad/0.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    picture("bad/0.jpg", exif=turned)


@kind("duplicate name", "bad/7.png: second file for the sample 007.png: remove one of them")
def _(x):
    folder(x)
    os.replace("bad/8.png", "bad/007.png")


@kind("symlink loop", "bad/0.png: cannot be read (Too many levels of symbolic links): mend that, then rerun")
def _(x):
    folder(x[1:])
    os.unlink("bad/0.png")
    os.symlink("0.png", "bad/0.png")


@kind("broken symlink", "bad/0.png: no such file or folder: check the path")
def _(x):
    folder(x)
    os.unlink("bad/0.png")
    os.symlink("../gone.png", "bad/0.png")


@kind("folder in itself", "bad/0/0: no image file (.png, .jpg, .jpeg, .webp): remove it, only samples may lie there")
def _(x):
    Path("bad").mkdir()
    os.symlink(".", "bad/0")


@kind(
    "folder that is no class",
    "bad/images: folders beside images are classes, named 0, 1, ..., with nothing else beside them: move or rename this",
)
def _(x):
    Path("bad").mkdir()
    folder(x[:9], "bad/images")


@kind("two folders of a class", "bad/01: two folders for one class: put their images into one")
def _(x):
    for name in ("bad/1/0.png", "bad/01/0.png"):
        picture(name)


@kind("no such class", "bad: labels from 0 to 10: the classes are 0 to 9")
def _(x):
    Path("bad").mkdir()
    for name, part in (("0", x[:500]), ("10", x[500:])):
        folder(part, f"bad/{name}")


@kind("pipe", "bad.npz: no regular file: give a folder of images, .npz or .safetensors")
def _(x):
    os.mkfifo("bad.npz")


@kind("unknown suffix", "bad.npy: files ending in '.npy' are not read: give a folder of images, .npz (arr_0) or .safetensors (samples)")
def _(x):
    np.save("bad.npy", channels_last(x))


@kind("npz without arr_0", "bad.npz: no array 'arr_0' (holds mu, sigma): write the images first, np.savez(path, images, labels)")
def _(x):
    npz(mu=np.zeros(3), sigma=np.eye(3))


@kind("pickled objects", "bad.npz: holds pickled objects, which may run code: store plain arrays, x.astype(np.uint8)")
def _(x):
    npz(np.array([{"image": 1}], dtype=object))


@kind("npz that is no archive", "bad.npz: no .npz archive, or a truncated one: write it again with np.savez(path, images)")
def _(x):
    np.save("bad.npy", channels_last(x))
    os.replace("bad.npy", "bad.npz")


@kind("truncated npz", "bad.npz: no .npz archive, or a truncated one: write it again with np.savez(path, images)")
def _(x):
    npz(channels_last(x))
    Path("bad.npz").write_bytes(Path("bad.npz").read_bytes()[:-100])


@kind("corrupt npz", "bad.npz: a corrupt or truncated .npz archive: write it again with np.savez(path, images)")
def _(x):
    npz(channels_last(x))
    content = bytearray(Path("bad.npz").read_bytes())
    content[20000] ^= 1  # one bit: the archive's checksum sees it
    Path("bad.npz").write_bytes(content)


@kind("npz of no array", "bad.npz: a corrupt or truncated .npz archive: write it again with np.savez(path, images)")
def _(x):
    with zipfile.ZipFile("bad.npz", "w") as f:
        f.writestr("arr_0.npy", b"no array")


def member(content: bytes, compression: int = zipfile.ZIP_STORED) -> None:
    """bad.npz of one member arr_0.npy."""
    with zipfile.ZipFile("bad.npz", "w", compression) as f:
        f.writestr("arr_0.npy", content)


def npy(shape: str, dtype: str = "|u1", content: bytes = b"") -> bytes:
    """A .npy file whose header says what it likes."""
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + content


SPOILT = "bad.npz: a corrupt or truncated .npz archive: write it again with np.savez(path, images)"


@kind("npz with half a header", SPOILT)
def _(x):
    member(b"\x93NUMPY\x01\x00" + struct.pack("<H", 20) + b"{'descr': '|u1', 'fo")


@kind("npz of more pixels than there are numbers", SPOILT)
def _(x):
    member(npy(f"({2**70}, 8, 8, 1)"))


@kind("npz of a shape that is no number", SPOILT)
def _(x):
    member(npy("(True,)", content=b"\0"))


@kind("npz with more behind its array", SPOILT)
def _(x):
    member(npy("(1000, 8, 8, 1)", "|u1", channels_last(x).tobytes() + b"more"))


@kind("npz with a password", SPOILT)
def _(x):
    npz(channels_last(x))
    content = bytearray(Path("bad.npz").read_bytes())
    for at in (6, content.rindex(b"PK\x01\x02") + 8):  # a flag of the member, told twice
        content[at] |= 1
    Path("bad.npz").write_bytes(content)


@kind("npz of an unknown compression", SPOILT)
def _(x):
    npz(channels_last(x))
    content = bytearray(Path("bad.npz").read_bytes())
    for at in (8, content.rindex(b"PK\x01\x02") + 10):
        content[at] = 99
    Path("bad.npz").write_bytes(content)


@kind("npz of damaged LZMA", SPOILT)
def _(x):
    member(npy("(1000, 8, 8, 1)", "|u1", channels_last(x).tobytes()), zipfile.ZIP_LZMA)
    content = bytearray(Path("bad.npz").read_bytes())
    content[45:60] = b"\xff" * 15  # behind the name: the properties and the first symbols
    Path("bad.npz").write_bytes(content)


@kind(
    "npz of too many images, not unpacked",  # or its damage would be told: a few hundred kB may hold ten million images
    "bad.npz: 1001 samples, expected 1000: draw as many, or say --count 1001 and have the row marked as not comparable",
)
def _(x):
    npz(channels_last(torch.cat([x, x[:1]])))
    content = bytearray(Path("bad.npz").read_bytes())
    content[20000] ^= 1
    Path("bad.npz").write_bytes(content)


@kind("npz with an array twice", "bad.npz: holds 'arr_0' twice: write it again with np.savez(path, images, labels)")
def _(x):
    stored = io.BytesIO()
    np.save(stored, channels_last(x))
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile("bad.npz", "w") as f:
        for _ in range(2):
            f.writestr("arr_0.npy", stored.getvalue())


@kind(
    "floats in [0, 1]",
    "bad.npz: 'arr_0' is float32 from 0 to 1, expected uint8 0 to 255: round to uint8 yourself: (x * 255).round() from [0, 1], "
    "((x + 1) * 127.5).round() from [-1, 1], (x * 255 / 16).round() from 0..16",
)
def _(x):
    npz(channels_last(x).astype(np.float32) / 255)


@kind(
    "floats in [-1, 1]",
    "bad.safetensors: 'samples' is float32 from -1 to 1, expected uint8 0 to 255: round to uint8 yourself: (x * 255).round() from "
    "[0, 1], ((x + 1) * 127.5).round() from [-1, 1], (x * 255 / 16).round() from 0..16",
)
def _(x):
    save_file({"samples": x / 127.5 - 1}, "bad.safetensors")


@kind(
    "half-precision floats",
    "bad.safetensors: 'samples' is bfloat16 from -1 to 1, expected uint8 0 to 255: round to uint8 yourself: (x * 255).round() from "
    "[0, 1], ((x + 1) * 127.5).round() from [-1, 1], (x * 255 / 16).round() from 0..16",
)
def _(x):
    save_file({"samples": (x / 127.5 - 1).bfloat16()}, "bad.safetensors")


@kind("NaN", "bad.npz: 'arr_0' has 2 values that are NaN or infinite: the sampler diverged, nothing to score")
def _(x):
    images = channels_last(x).astype(np.float32) / 255
    images[3, 0, 0, 0], images[9, 1, 1, 0] = np.nan, np.inf
    npz(images)


@kind(
    "integers that are no bytes", "bad.npz: 'arr_0' is int64 from -3 to 300, expected uint8 0 to 255: if it is 0 to 255, x.astype(np.uint8)"
)
def _(x):
    images = channels_last(x).astype(np.int64)
    images[0, 0, 0, 0], images[0, 0, 1, 0] = -3, 300
    npz(images)


@kind(
    "bytes of images in [0, 1]",
    "bad.npz: no pixel is above 1, and the benchmark's reach 255: bytes of another range? round to uint8 yourself: (x * 255).round() "
    "from [0, 1], ((x + 1) * 127.5).round() from [-1, 1], (x * 255 / 16).round() from 0..16",
)
def _(x):
    npz((channels_last(x) / 255).round().astype(np.uint8))


@kind(
    "scikit-learn's levels 0 to 16",
    "bad: no pixel is above 16, and the benchmark's reach 255: bytes of another range? round to uint8 yourself: (x * 255).round() "
    "from [0, 1], ((x + 1) * 127.5).round() from [-1, 1], (x * 255 / 16).round() from 0..16",
)
def _(x):
    folder((x / 255 * 16).round().to(torch.uint8))


@kind(
    "npz in channels-first order",
    "bad.npz: 'arr_0' is [1000,1,8,8], expected [N,H,W,C] of 1 or 3 channels: np.savez(path, x.transpose(0, 2, 3, 1)) from [N,C,H,W], "
    "x[..., None] from [N,H,W]",
)
def _(x):
    npz(x.numpy())


@kind("mis-sized npz", "bad.npz: 'arr_0' is [1000,3,16,16] as N,C,H,W, expected [N,1,8,8]: nothing is resized or transposed here")
def _(x):
    npz(np.zeros((N, 16, 16, 3), np.uint8))


@kind("labels too few", "bad.npz: 'arr_1' is int64 [999], expected [1000] integers, a class per sample")
def _(x):
    npz(channels_last(x), np.arange(N - 1) % 10)


@kind("one-hot labels", "bad.npz: 'arr_1' is float64 [1000,10], expected [1000] integers, a class per sample")
def _(x):
    npz(channels_last(x), np.eye(10)[np.arange(N) % 10])


@kind("labels that are words", "bad.npz: 'arr_1' is str32 [1000], expected [1000] integers, a class per sample")
def _(x):
    npz(channels_last(x), np.array(["0"] * N))


@kind("labels out of range", "bad.npz: labels from 1 to 10: the classes are 0 to 9")
def _(x):
    npz(channels_last(x), np.arange(N) % 10 + 1)


@kind("safetensors without samples", "bad.safetensors: no tensor 'samples' (holds images): name it so")
def _(x):
    save_file({"images": x}, "bad.safetensors")


def safetensors(name: str, dtype: str, shape: list[int], x: Tensor) -> None:
    """bad.safetensors with `samples` and another tensor, of a dtype that torch may lack."""
    size = {"F4": 1, "F8_E4M3": 2}[dtype] * int(np.prod(shape)) // 2
    header = {"samples": {"dtype": "U8", "shape": list(x.shape), "data_offsets": [size, size + x.numel()]}} if name != "samples" else {}
    header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    content = bytes(size) + (x.numpy().tobytes() if name != "samples" else b"")
    Path("bad.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + content)


@kind("samples of four bits", "bad.safetensors: 'samples' is F4, expected uint8 0 to 255: store it as such")
def _(x):
    safetensors("samples", "F4", [N, 1, 8, 8], x)


@kind("samples of eight-bit floats", "bad.safetensors: 'samples' is F8_E4M3, expected uint8 0 to 255: store it as such")
def _(x):
    safetensors("samples", "F8_E4M3", [N, 1, 8, 8], x)


@kind("labels of four bits", "bad.safetensors: 'labels' is F4 [1000], expected [1000] integers, a class per sample")
def _(x):
    safetensors("labels", "F4", [N], x)


@kind("truncated safetensors", "bad.safetensors: no .safetensors file, or a truncated one: write it again")
def _(x):
    save_file({"samples": x}, "bad.safetensors")
    Path("bad.safetensors").write_bytes(Path("bad.safetensors").read_bytes()[:-1])


@kind(
    "sorted by class",
    "bad.npz: sorted by class, so that scores on pieces of it would see a few classes each: shuffle them (with their labels), or deal "
    "the classes in turn",
)
def _(x):
    npz(channels_last(torch.cat([x[c::10] for c in range(10)])))


@pytest.mark.parametrize("what", KINDS)
def test_a_bad_file_is_refused_in_one_line(what: str, checkout, good, capsys, request):
    make, line = KINDS[what]
    make(good)
    found = sorted(Path.cwd().glob("bad*"))
    code, out, err = run(capsys, "evaluate", found[0].name if found else "bad", *FLAT)
    if request.config.getoption("capture") == "no":
        with capsys.disabled():
            print(f"{what}: {err}", end="")
    assert (code, out, err) == (2, "", f"distillbench: {line}\n")
    assert not list(Path("results").rglob("*.json"))


def test_a_file_that_may_not_be_read(checkout, good, capsys, monkeypatch):
    """Pretended, since the superuser may read everything."""
    npz(channels_last(good))
    allowed = open

    def opened(file, *rest, **how):
        if str(file) == "bad.npz":
            raise PermissionError(13, "Permission denied", str(file))
        return allowed(file, *rest, **how)

    monkeypatch.setattr("builtins.open", opened)
    code, _, err = run(capsys, "evaluate", "bad.npz", *FLAT)
    assert (code, err) == (2, "distillbench: bad.npz: cannot be read (Permission denied): mend that, then rerun\n")


@pytest.mark.parametrize(
    "arguments,line",
    [
        (["tiny"], "evaluate tiny: an arm is missing after the benchmark: `distillbench evaluate tiny teacher`, or `distillbench evaluate "
         "PATH --benchmark tiny` for samples"),
        (["tinny"], "evaluate tinny: neither a path (no such file or folder) nor a benchmark followed by an arm (did you mean 'tiny'?)"),
        (["tiny", "dmd", "--publish"], "--publish belongs to `distillbench evaluate PATH`; 'tiny dmd' names an arm: drop one of them"),
        (["bad.npz", "--seeds", "0"], "--seeds belongs to `distillbench evaluate BENCHMARK ARM`; 'bad.npz' is a path: drop it"),
        (["bad.npz", "--publish", "--name", "x", "--who", "me"],
         "--publish needs --name, --who and --where: a table says whose samples a row is of"),
        (["bad.npz", "--name", "../x"], "--name: '../x' names a file and a row: letters, digits and . _ + -, at most 64, a letter or digit "
         "first"),
        (["bad.npz", "--who", "a\nb"], "--who: one line of text expected, got 'a\\nb'"),
        (["bad.npz", "--overwrite"], "--overwrite belongs to --publish: add it or drop this"),
        (["bad.npz", "--output", "x.txt"], "--output: 'x.txt' must end in .json, in a folder that exists"),
        (["bad.npz", "--count", "500"], "--count 500: fewer than the 896 held-out images, and scores need equal numbers: draw more"),
    ],
)  # fmt: skip
def test_a_bad_command_is_refused_in_one_line(arguments: list[str], line: str, checkout, good, capsys):
    npz(channels_last(good))
    flat = FLAT if arguments[0] == "bad.npz" else []
    assert run(capsys, "evaluate", *arguments, *flat) == (2, "", f"distillbench: {line}\n")


# ---------------------------------------------------------------- what the scores are


def scores(capsys, path: str, *more: str) -> dict:
    code, _, err = run(capsys, "evaluate", path, *FLAT, "--output", "found.json", *more)
    assert code == 0, err
    return json.loads(Path("found.json").read_text())


def test_folder_npz_and_safetensors_of_the_same_images_agree(checkout, digits, good, capsys):
    labels = torch.arange(N) % 10
    save_file({"samples": good, "labels": labels}, "same.safetensors")
    np.savez("same.npz", channels_last(good), labels.numpy().astype(np.uint8))
    Path("same").mkdir()
    for c in range(10):
        folder(good[c::10], f"same/{c}")
    found = [scores(capsys, path, "--name", "same") for path in ("same.safetensors", "same.npz", "same")]
    assert found[0] == found[1] == found[2]
    folder(good, "flat")
    flat = scores(capsys, "flat", "--name", "same")
    assert flat["samples_sha256"] == found[0]["samples_sha256"] and flat["labels_sha256"] is None
    known = {name: value for name, value in flat["row"].items() if value is not None}
    assert known.items() <= found[0]["row"].items()  # scores that need labels are missing, the others are the same
    assert flat["row"]["class_accuracy"] is None and found[0]["row"]["class_accuracy"] > 0.99
    # and they are those of the fixed row whose images these are
    against = evaluate.Against.of(digits, "digits-gelu-64", None)
    rows = {row.pop("name"): row for row in evaluate.fixed_rows(digits, against, N, seed=0)}
    assert found[0]["row"] == rows["memoriser"]
    assert found[0]["row"] != rows["mixup"]


def test_hash_is_of_content_in_order(good):
    found = {content_sha256(x) for x in (good, good.flip(0), good.view(N, 1, 4, 16), good.view(N // 2, 2, 8, 8), good.to(torch.int8))}
    assert len(found) == 5 and content_sha256(good.clone()) in found
    assert content_sha256(good[:, :, :, ::2]) == content_sha256(good[:, :, :, ::2].contiguous())


def test_names_are_read_in_natural_order(tmp_path, good):
    names = ["b1", "a10", "a9", "A2", "a2b", "10", "9", "a0", "a"]
    for i, name in enumerate(names):
        picture(tmp_path / f"{name}.png", good[i, 0].numpy())
    read = read_samples(tmp_path, (1, 8, 8), len(names), 10).images
    wanted = [names.index(name) for name in ("9", "10", "a", "a0", "A2", "a2b", "a9", "a10", "b1")]
    assert torch.equal(read, good[wanted])


def test_unequal_class_folders_are_mixed_in_proportion(tmp_path, good):
    for c, part in ((0, good[:2]), (3, good[2:8])):
        folder(part, str(tmp_path / str(c)))
    read = read_samples(tmp_path, (1, 8, 8), 8, 10)
    assert read.labels is not None and read.labels.tolist() == [3, 0, 3, 3, 3, 0, 3, 3] and torch.equal(read.images[1], good[0])


def test_colour_images_keep_their_channels(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (20, 4, 6, 3), np.uint8)
    for i, image in enumerate(images):
        picture(tmp_path / f"folder/{i}.webp", image, lossless=True)
    np.savez(tmp_path / "x.npz", images)
    found = [read_samples(tmp_path / name, (3, 4, 6), 20, 10) for name in ("folder", "x.npz")]
    assert found[0].sha256 == found[1].sha256 and np.array_equal(found[0].images.numpy(), images.transpose(0, 3, 1, 2))


def test_sixteen_bits_of_colour_are_no_bytes(tmp_path):
    """PIL would hand out the upper halves without a word."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    pixels = zlib.compress((b"\0" + bytes(range(24))) * 4)
    for bits in (8, 16):
        header = struct.pack(">IIBBBBB", 8 // (bits // 8), 4, bits, 2, 0, 0, 0)
        file = tmp_path / f"{bits}/0.png"
        file.parent.mkdir()
        file.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b""))
    assert read_samples(tmp_path / "8", (3, 4, 8), 1, 10, brightest=23).images.max() == 23
    assert Image.open(tmp_path / "16/0.png").mode == "RGB"
    with pytest.raises(ValueError, match=r"0\.png: 16 bits per channel, expected 8: store bytes yourself"):
        read_samples(tmp_path / "16", (3, 4, 4), 1, 10)


def test_held_out_images_score_as_copies(checkout, digits, capsys):
    np.savez("held-out.npz", channels_last(digits.reference), digits.reference_labels.numpy())
    found = scores(capsys, "held-out.npz", "--count", "896")
    row = found["row"]
    assert abs(row["fid"]) < 1e-4 and row["kid"] < 0 and found["count"] == 896
    assert all(row[name] == 1 for name in ("precision", "recall", "density", "coverage", "diversity"))
    assert row["memorisation"] < 0.6 and row["fid_teacher"] is None and row["noise_distance"] is None
    # the same images against the halves mixed up: another answer
    mixed = evaluate.Against.of(data_sets.Images(digits.reference, digits.reference_labels, digits.train, digits.train_labels, 10),
                                "digits-gelu-64", None)  # fmt: skip
    other = evaluate.evaluate_images(digits.reference, digits.reference_labels, mixed)
    assert other["fid"] > 0.1 and other["memorisation"] == 1


def test_order_by_class_is_what_is_refused(good, tmp_path):
    labels = torch.arange(N) % 10

    def refused(index: Tensor, with_labels: bool) -> bool:
        np.savez(tmp_path / "x.npz", channels_last(good[index]), *([labels[index].numpy()] if with_labels else []))
        samples = read_samples(tmp_path / "x.npz", (1, 8, 8), len(index), 10)
        try:
            external.check_order(samples, "digits-gelu-64")
        except ValueError:
            return True
        return False

    in_turn, by_class = torch.arange(N), labels.argsort(stable=True)
    shuffled, one_class = torch.randperm(N, generator=torch.Generator().manual_seed(0)), torch.arange(0, N, 10)
    for with_labels in (False, True):
        assert [refused(i, with_labels) for i in (in_turn, shuffled, one_class, by_class)] == [False, False, False, True]


def test_what_sample_writes_is_accepted(checkout, capsys):
    assert run(capsys, "train", "tiny", "teacher", "--seeds", "0")[0] == 0
    assert run(capsys, "evaluate", "tiny", "teacher", "--seeds", "0")[0] == 0  # two positionals: the arm, as ever
    assert len(list(Path("results/runs/tiny/teacher").glob("seed0-*/metrics.json"))) == 1
    assert run(capsys, "sample", "tiny", "teacher", "--output", "drawn.safetensors", "--count", str(N))[0] == 0
    found = scores(capsys, "drawn.safetensors")
    assert found["name"] == "drawn" and found["row"]["fid"] > 0 and found["row"]["class_accuracy"] is not None
    assert run(capsys, "train", "tiny-ring", "teacher", "--seeds", "0")[0] == 0
    assert run(capsys, "sample", "tiny-ring", "teacher", "--output", "points.safetensors", "--count", "500")[0] == 0
    code, out, err = run(capsys, "evaluate", "points.safetensors", "--benchmark", "tiny-ring", "--output", "points.json")
    assert code == 0 and "sliced W2" in out, err
    points = json.loads(Path("points.json").read_text())
    (file,) = Path("results/runs/tiny-ring/teacher").glob("seed0-*/result.json")
    assert points["row"]["modes_total"] == 3
    assert points["evaluation"]["data"] == json.loads(file.read_text())["provenance"]["hashes"]["data"]  # as tables compare it
    save_file({"samples": torch.full((500, 2), torch.nan)}, "points.safetensors")
    code, _, err = run(capsys, "evaluate", "points.safetensors", "--benchmark", "tiny-ring")
    line = "points.safetensors: 'samples' has 1000 values that are NaN or infinite: the sampler diverged, nothing to score"
    assert (code, err) == (2, f"distillbench: {line}\n")


# ---------------------------------------------------------------- rows of tables

WORDS = ("--name", "theirs", "--who", "A. Author", "--where", "https://example.org/samples")


@pytest.fixture
def published(tmp_path, monkeypatch) -> Path:
    """A copy of the published tables, their records passed off as of the current evaluation."""
    copy_of_the_published(tmp_path)
    monkeypatch.chdir(tmp_path)
    from distillbench import config

    b = config.benchmark("digits")
    for file in (tmp_path / "results/records/table2/digits").rglob("metrics.json"):
        found = json.loads(file.read_text())
        found["evaluation"]["key"] = records.evaluation_key(b.extractor, b.cross_extractor)
        file.write_text(json.dumps(found))
    return tmp_path


def twins(folder: Path) -> dict[str, bytes]:
    return {suffix: (folder / f"results/table2.{suffix}").read_bytes() for suffix in ("md", "csv", "json")}


def test_a_published_row_is_in_all_twins_and_checked(published, good, capsys, monkeypatch):
    monkeypatch.setattr(scoring.out, "width", 80)
    assert run(capsys, "table", "table2", "--render")[0] == 0
    before = twins(published)
    save_file({"samples": good, "labels": torch.arange(N) % 10}, "x.safetensors")
    code, out, err = run(capsys, "evaluate", "x.safetensors", "--count", str(N), *WORDS, "--publish")
    assert code == 0 and "`distillbench table table2 --render` shows it" in err
    heads = ("samples", "floor", "class", "means", "gaussian", "mixup", "memoriser", "teacher,")
    assert set(heads) <= set(out.split()) and "…" not in out and "extractor ↓" in out
    assert f"theirs: {N} samples (digits takes 20000: not comparable)" in out
    assert run(capsys, "table", "table2", "--check")[0] == 1  # the row is missing
    assert run(capsys, "table", "table2", "--render")[0] == 0 and run(capsys, "table", "table2", "--check")[0] == 0
    file = published / "results/external/digits/theirs.json"
    found = json.loads(file.read_text())
    assert tuple(found) == external.KEYS and found["evaluation"]["extractor_sha256"] and found["evaluation"]["published_weights"]
    page = (published / "results/table2.md").read_text()
    after = page.index("**Distillation**")
    assert page.index("**External samples (made elsewhere; budget, data and teacher unknown)**") > after
    line = next(li for li in page.splitlines() if li.startswith("| theirs"))
    assert f"{found['row']['fid']:.3f}" in line and "1000 samples, not 20000: not comparable" in line
    assert f"theirs: A. Author, https://example.org/samples (1000 samples, sha256 {found['samples_sha256'][:12]})." in page
    (row,) = [r for r in json.loads((published / "results/table2.json").read_text())["rows"] if r["group"] == "external"]
    assert (row["who"], row["samples_sha256"], row["nfe"], row["budget"]) == ("A. Author", found["samples_sha256"], None, None)
    assert row["fid_mean"] == pytest.approx(found["row"]["fid"], rel=1e-5) and row["fid_teacher_mean"] is None
    assert ",external,theirs," in (published / "results/table2.csv").read_text()
    # an edited digit of the record, and of the table
    digit = f"{found['row']['fid']:.3f}"[-1]
    wrong = found["row"] | {"fid": found["row"]["fid"] + 0.01}
    content = file.read_bytes()
    file.write_text(json.dumps(found | {"row": wrong}))
    assert run(capsys, "table", "table2", "--check")[0] == 1
    file.write_bytes(content)
    assert run(capsys, "table", "table2", "--check")[0] == 0
    at = page.index(line) + line.index(f"{found['row']['fid']:.3f}") + len(f"{found['row']['fid']:.3f}") - 1
    (published / "results/table2.md").write_text(page[:at] + str((int(digit) + 1) % 10) + page[at + 1 :])
    assert run(capsys, "table", "table2", "--check")[0] == 1
    # without the record: the bytes of before
    file.unlink()
    assert run(capsys, "table", "table2", "--render")[0] == 0 and twins(published) == before


def test_publishing_again(published, good, capsys):
    file = published / "results/external/digits/theirs.json"
    np.savez("x.npz", channels_last(good))
    np.savez("y.npz", channels_last(good.flip(0)))
    again = ["--count", str(N), *WORDS, "--publish"]
    assert run(capsys, "evaluate", "x.npz", *again)[0] == 0
    first = file.read_bytes()
    assert run(capsys, "evaluate", "x.npz", *again)[0] == 0 and file.read_bytes() == first
    code, out, err = run(capsys, "evaluate", "y.npz", *again)
    sha = json.loads(first)["samples_sha256"]
    line = f"{file}: published with another samples_sha256 ({sha}): choose another --name, or say --overwrite"
    assert (code, out, err) == (2, "", f"distillbench: {line}\n") and file.read_bytes() == first
    code, _, err = run(capsys, "evaluate", "x.npz", *again[:-2], "https://elsewhere.org", "--publish")
    assert code == 2 and "published with another where (https://example.org/samples)" in err
    old = json.loads(first)  # the same samples after a change of the evaluation: no question asked
    old["evaluation"]["key"], old["row"]["fid"] = "0" * 12, 9.0
    file.write_text(json.dumps(old))
    assert run(capsys, "evaluate", "x.npz", *again)[0] == 0 and file.read_bytes() == first
    assert run(capsys, "evaluate", "y.npz", *again, "--overwrite")[0] == 0 and file.read_bytes() != first


MADE = {
    "format": 1, "name": "x", "benchmark": "digits", "who": "w", "where": "v", "samples_sha256": "a" * 64, "labels_sha256": None,
    "count": 20000, "evaluation": {"key": "0" * 12, "reference_sha256": "b" * 64}, "row": {"fid": 1.0, "is": None},
}  # fmt: skip


@pytest.mark.parametrize("benchmark,data,score", [("digits", "reference_sha256", "fid"), ("gaussians-ring", "data", "sliced_w2")])
def test_a_record_of_another_evaluation_or_of_other_data_has_a_row_without_numbers(benchmark, data, score):
    given = records.read(ROOT / f"results/records/{'table2' if benchmark == 'digits' else 'gaussians'}")
    shared = protocol(given)[benchmark]
    about = {"key": shared["evaluation"], data: shared[data]}
    made = MADE | {"benchmark": benchmark, "row": {score: 1.0}, "count": shared["samples"]}
    plain, (current,), (stale,), (elsewhere,) = (
        build_rows(given),
        *([r for r in build_rows(given, [made | {"evaluation": about | other}]) if r["group"] == "external"]
          for other in ({}, {"key": "0" * 12}, {data: "0" * 64})),
    )  # fmt: skip
    assert (current["status"], current[f"{score}_mean"], current["seeds"]) == ("done", 1.0, 1)
    assert stale["status"] == "evaluated under another protocol: run evaluate again" and stale["seeds"] == 0
    assert elsewhere["status"] == "scored against other data: run evaluate again" and elsewhere["seeds"] == 0
    for row in (stale, elsewhere):
        assert not [value for name, value in row.items() if name.endswith(("_mean", "_sd")) and value is not None]
    assert build_rows(given, [made | {"benchmark": "elsewhere"}]) == plain  # another benchmark's record changes nothing
    assert set(plain[0]) <= set(current)


def test_words_that_are_not_known(published, capsys):
    file = published / "results/external/digits/x.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(MADE | {"who": None, "where": None}))
    assert run(capsys, "table", "table2", "--render")[0] == 0
    page = (published / "results/table2.md").read_text()
    assert "x: maker not stated, source not stated (20000 samples" in page


@pytest.mark.parametrize(
    "spoilt",
    [
        "{}", "[]", "null", "[" * 10**5, "\udcff", *(json.dumps(MADE | wrong) for wrong in (
            {"row": None}, {"row": {"fid": "1"}}, {"evaluation": {}}, {"evaluation": {"key": "k"}}, {"evaluation": None}, {"count": "9"},
            {"who": 7}, {"where": "two\nlines"}, {"samples_sha256": None}, {"name": "y"}, {"format": 2})),
    ],
)  # fmt: skip
def test_a_spoilt_record_is_named(spoilt: str, published, capsys):
    file = published / "results/external/digits/x.json"
    file.parent.mkdir(parents=True)
    file.write_text(spoilt, errors="surrogateescape")
    code, _, err = run(capsys, "table", "table2", "--check")
    line = f"{file}: no record of external samples: remove it, or publish it again with `distillbench evaluate`"
    assert (code, err) == (2, f"distillbench: {line}\n")


def test_the_command_itself(checkout):
    """In a process of its own: no traceback, exit code 2."""
    done = checkout.run("distillbench", "evaluate", "nowhere", *FLAT)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not done.stdout
