"""What `distillbench evaluate PATH` refuses, in one line of the file, the fault and a remedy.

Expected is that line's start, as far as it says what is wrong here and what to do first.
`pytest -s tests/test_external_refused.py -k bad_file` prints the line of every kind of bad file.
"""

from __future__ import annotations

import io
import json
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from tests.released import FLAT, N, channels_last, folder, memorised, npz, picture, run


@pytest.fixture
def good() -> Tensor:
    return memorised()


KINDS: dict[str, tuple[Callable[[Tensor], object], str]] = {}


def kind(what: str, start: str) -> Callable[[Callable[[Tensor], object]], None]:
    """Register a maker of a file `bad*` from good images, and the start of the line against it."""

    def register(make: Callable[[Tensor], object]) -> None:
        KINDS[what] = (make, start)

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


@kind("wrong count", "bad: 3 samples, expected 1000: draw as many\n")
def _(x):
    folder(x[:3])


@kind(
    "another count",
    "bad: 900 samples, expected 1000: draw as many, or say --count 900",
)
def _(x):
    folder(x[:900])


@kind(
    "not an image",
    "bad/notes.txt: no image file (.png, .jpg, .jpeg, .webp): remove it",
)
def _(x):
    folder(x)
    Path("bad/notes.txt").write_text("see paper\n")


@kind(
    "hidden file",
    "bad/.DS_Store: no image file (.png, .jpg, .jpeg, .webp): remove it",
)
def _(x):
    folder(x)
    Path("bad/.DS_Store").write_bytes(b"\0")


@kind("mis-sized", "bad/0.png: 16x16 pixels, expected 8x8: nothing is resized here")
def _(x):
    folder(x.repeat_interleave(2, 2).repeat_interleave(2, 3))


@kind(
    "mixed sizes",
    "bad/7.png: 9x8 pixels, expected 8x8, unlike the images before it: nothing is resized here",
)
def _(x):
    folder(x)
    picture("bad/7.png", np.zeros((8, 9), np.uint8))


@kind(
    "grey stored as RGB",
    "bad/0.png: mode RGB, expected grey (L): save image.convert('L') where that loses nothing",
)
def _(x):
    folder(x)
    picture("bad/0.png", np.repeat(x[0, 0].numpy()[..., None], 3, 2))


@kind(
    "mixed modes",
    "bad/5.png: mode RGBA, expected grey (L), unlike the images before it: save image.convert('L')",
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


@kind(
    "animation",
    "bad/2.png: several frames, unlike the images before it: write one opaque image per file",
)
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


@kind(
    "another format than its name",
    "bad/0.png: no readable PNG: corrupt, or of another format than its name says: write it again",
)
def _(x):
    folder(x)
    os.replace(picture("bad/0.jpg"), "bad/0.png")


@kind(
    "empty file",
    "bad/4.png: no readable PNG: corrupt, or of another format than its name says: write it again",
)
def _(x):
    folder(x)
    Path("bad/4.png").write_bytes(b"")


@kind(
    "endless file",
    "bad/19.png: 8000000000000 bytes, far more than 8x8 pixels take: write the image again",
)
def _(x):
    folder(x)
    os.truncate("bad/19.png", 8 * 10**12)  # sparse


@kind(
    "turned JPEG",
    "bad/0.jpg: stored turned or mirrored (EXIF orientation 6): turn the pixels, drop the tag",
)
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


@kind(
    "symlink loop",
    "bad/0.png: cannot be read (Too many levels of symbolic links): mend that, then rerun",
)
def _(x):
    folder(x[1:])
    os.unlink("bad/0.png")
    os.symlink("0.png", "bad/0.png")


@kind("broken symlink", "bad/0.png: no such file or folder: check the path")
def _(x):
    folder(x)
    os.unlink("bad/0.png")
    os.symlink("../gone.png", "bad/0.png")


@kind(
    "folder in itself",
    "bad/0/0: no image file (.png, .jpg, .jpeg, .webp): remove it, only samples may lie there",
)
def _(x):
    Path("bad").mkdir()
    os.symlink(".", "bad/0")


@kind(
    "folder that is no class",
    "bad/images: folders beside images are classes, named 0, 1, ...",
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


@kind(
    "unknown suffix",
    "bad.npy: files ending in '.npy' are not read: give a folder of images, .npz (arr_0)",
)
def _(x):
    np.save("bad.npy", channels_last(x))


@kind(
    "npz without arr_0",
    "bad.npz: no array 'arr_0' (holds mu, sigma): write the images first",
)
def _(x):
    npz(mu=np.zeros(3), sigma=np.eye(3))


@kind(
    "pickled objects",
    "bad.npz: holds pickled objects, which may run code: store plain arrays, x.astype(np.uint8)",
)
def _(x):
    npz(np.array([{"image": 1}], dtype=object))


@kind(
    "npz that is no archive",
    "bad.npz: no .npz archive, or a truncated one: write it again with np.savez(path, images)",
)
def _(x):
    np.save("bad.npy", channels_last(x))
    os.replace("bad.npy", "bad.npz")


@kind(
    "truncated npz",
    "bad.npz: no .npz archive, or a truncated one: write it again with np.savez(path, images)",
)
def _(x):
    npz(channels_last(x))
    Path("bad.npz").write_bytes(Path("bad.npz").read_bytes()[:-100])


@kind(
    "corrupt npz",
    "bad.npz: a corrupt or truncated .npz archive: write it again with np.savez(path, images)",
)
def _(x):
    npz(channels_last(x))
    content = bytearray(Path("bad.npz").read_bytes())
    content[20000] ^= 1  # one bit: the archive's checksum sees it
    Path("bad.npz").write_bytes(content)


@kind(
    "npz of no array",
    "bad.npz: a corrupt or truncated .npz archive: write it again with np.savez(path, images)",
)
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
    # Else its damage would be told: a few hundred kB may hold ten million images.
    "npz of too many images, not unpacked",
    "bad.npz: 1001 samples, expected 1000: draw as many, or say --count 1001",
)
def _(x):
    npz(channels_last(torch.cat([x, x[:1]])))
    content = bytearray(Path("bad.npz").read_bytes())
    content[20000] ^= 1
    Path("bad.npz").write_bytes(content)


@kind(
    "npz with an array twice",
    "bad.npz: holds 'arr_0' twice: write it again with np.savez(path, images, labels)",
)
def _(x):
    stored = io.BytesIO()
    np.save(stored, channels_last(x))
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile("bad.npz", "w") as f:
        for _ in range(2):
            f.writestr("arr_0.npy", stored.getvalue())


@kind(
    "floats in [0, 1]",
    "bad.npz: 'arr_0' is float32 from 0 to 1, expected uint8 0 to 255: "
    "round to uint8 yourself: (x * 255).round() from [0, 1]",
)
def _(x):
    npz(channels_last(x).astype(np.float32) / 255)


@kind(
    "floats in [-1, 1]",
    "bad.safetensors: 'samples' is float32 from -1 to 1, expected uint8 0 to 255: "
    "round to uint8 yourself: (x * 255).round() from [0, 1], ((x + 1) * 127.5).round() from",
)
def _(x):
    save_file({"samples": x / 127.5 - 1}, "bad.safetensors")


@kind(
    "half-precision floats",
    "bad.safetensors: 'samples' is bfloat16 from -1 to 1, expected uint8 0 to 255: "
    "round to uint8 yourself",
)
def _(x):
    save_file({"samples": (x / 127.5 - 1).bfloat16()}, "bad.safetensors")


@kind(
    "NaN",
    "bad.npz: 'arr_0' has 2 values that are NaN or infinite: the sampler diverged",
)
def _(x):
    images = channels_last(x).astype(np.float32) / 255
    images[3, 0, 0, 0], images[9, 1, 1, 0] = np.nan, np.inf
    npz(images)


@kind(
    "integers that are no bytes",
    "bad.npz: 'arr_0' is int64 from -3 to 300, expected uint8 0 to 255: if it is",
)
def _(x):
    images = channels_last(x).astype(np.int64)
    images[0, 0, 0, 0], images[0, 0, 1, 0] = -3, 300
    npz(images)


@kind(
    "bytes of images in [0, 1]",
    "bad.npz: no pixel is above 1, and the benchmark's reach 255: bytes of another range? "
    "round to uint8 yourself: (x * 255).round() from [0, 1]",
)
def _(x):
    npz((channels_last(x) / 255).round().astype(np.uint8))


@kind(
    "scikit-learn's levels 0 to 16",
    "bad: no pixel is above 16, and the benchmark's reach 255: bytes of another range? "
    "round to uint8 yourself: (x * 255).round() from [0, 1], ((x + 1) * 127.5).round() from "
    "[-1, 1], (x * 255 / 16).round() from 0..16",
)
def _(x):
    folder((x / 255 * 16).round().to(torch.uint8))


@kind(
    "npz in channels-first order",
    "bad.npz: 'arr_0' is [1000,1,8,8], expected [N,H,W,C] of 1 or 3 channels: "
    "np.savez(path, x.transpose(0, 2, 3, 1)) from [N,C,H,W]",
)
def _(x):
    npz(x.numpy())


@kind(
    "mis-sized npz",
    "bad.npz: 'arr_0' is [1000,3,16,16] as N,C,H,W, expected [N,1,8,8]: nothing is resized",
)
def _(x):
    npz(np.zeros((N, 16, 16, 3), np.uint8))


@kind(
    "labels too few",
    "bad.npz: 'arr_1' is int64 [999], expected [1000] integers, a class per sample",
)
def _(x):
    npz(channels_last(x), np.arange(N - 1) % 10)


@kind(
    "one-hot labels",
    "bad.npz: 'arr_1' is float64 [1000,10], expected [1000] integers, a class per sample",
)
def _(x):
    npz(channels_last(x), np.eye(10)[np.arange(N) % 10])


@kind(
    "labels that are words",
    "bad.npz: 'arr_1' is str32 [1000], expected [1000] integers, a class per sample",
)
def _(x):
    npz(channels_last(x), np.array(["0"] * N))


@kind("labels out of range", "bad.npz: labels from 1 to 10: the classes are 0 to 9")
def _(x):
    npz(channels_last(x), np.arange(N) % 10 + 1)


@kind(
    "safetensors without samples", "bad.safetensors: no tensor 'samples' (holds images): name it so"
)
def _(x):
    save_file({"images": x}, "bad.safetensors")


def safetensors(name: str, dtype: str, shape: list[int], x: Tensor) -> None:
    """bad.safetensors with `samples` and another tensor, of a dtype that torch may lack."""
    size = {"F4": 1, "F8_E4M3": 2}[dtype] * int(np.prod(shape)) // 2
    header = (
        {
            "samples": {
                "dtype": "U8",
                "shape": list(x.shape),
                "data_offsets": [size, size + x.numel()],
            }
        }
        if name != "samples"
        else {}
    )
    header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    content = bytes(size) + (x.numpy().tobytes() if name != "samples" else b"")
    Path("bad.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + content)


@kind(
    "samples of four bits",
    "bad.safetensors: 'samples' is F4, expected uint8 0 to 255: store it as such",
)
def _(x):
    safetensors("samples", "F4", [N, 1, 8, 8], x)


@kind(
    "samples of eight-bit floats",
    "bad.safetensors: 'samples' is F8_E4M3, expected uint8 0 to 255: store it as such",
)
def _(x):
    safetensors("samples", "F8_E4M3", [N, 1, 8, 8], x)


@kind(
    "labels of four bits",
    "bad.safetensors: 'labels' is F4 [1000], expected [1000] integers, a class per sample",
)
def _(x):
    safetensors("labels", "F4", [N], x)


@kind(
    "truncated safetensors",
    "bad.safetensors: no .safetensors file, or a truncated one: write it again",
)
def _(x):
    save_file({"samples": x}, "bad.safetensors")
    Path("bad.safetensors").write_bytes(Path("bad.safetensors").read_bytes()[:-1])


@kind(
    "sorted by class",
    "bad.npz: sorted by class, so that scores on pieces of it would see a few classes each: "
    "shuffle them (with their labels)",
)
def _(x):
    npz(channels_last(torch.cat([x[c::10] for c in range(10)])))


@pytest.mark.parametrize("what", KINDS)
def test_a_bad_file_is_refused_in_one_line(what: str, checkout, good, capsys, request):
    make, start = KINDS[what]
    make(good)
    found = sorted(Path.cwd().glob("bad*"))
    code, out, err = run(capsys, "evaluate", found[0].name if found else "bad", *FLAT)
    if request.config.getoption("capture") == "no":
        with capsys.disabled():
            print(f"{what}: {err}", end="")
    assert (code, out) == (2, "")
    assert err.startswith(f"distillbench: {start}") and err.find("\n") == len(err) - 1
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
    assert code == 2 and err.count("\n") == 1
    assert err.startswith("distillbench: bad.npz: cannot be read (Permission denied): ")


@pytest.mark.parametrize(
    "arguments,start",
    [
        (
            ["tiny"],
            "evaluate tiny: an arm is missing after the benchmark: "
            "`distillbench evaluate tiny teacher`",
        ),
        (
            ["tinny"],
            "evaluate tinny: neither a path (no such file or folder) "
            "nor a benchmark followed by an arm (did you mean 'tiny'?)",
        ),
        (
            ["tiny", "dmd", "--publish"],
            "--publish belongs to `distillbench evaluate PATH`; 'tiny dmd' names an arm: drop",
        ),
        (
            ["bad.npz", "--seeds", "0"],
            "--seeds belongs to `distillbench evaluate BENCHMARK ARM`; 'bad.npz' is a path",
        ),
        (
            ["bad.npz", "--publish", "--name", "x", "--who", "me"],
            "--publish needs --name, --who and --where: a table says whose samples a row is of",
        ),
        (
            ["bad.npz", "--name", "../x"],
            "--name: '../x' names a file and a row: letters, digits and . _ + -, at most 64",
        ),
        (["bad.npz", "--who", "a\nb"], "--who: one line of text expected, got 'a\\nb'"),
        (["bad.npz", "--overwrite"], "--overwrite belongs to --publish: add it or drop this"),
        (
            ["bad.npz", "--output", "x.txt"],
            "--output: 'x.txt' must end in .json, in a folder that exists",
        ),
        (
            ["bad.npz", "--count", "500"],
            "--count 500: fewer than the 896 held-out images, and scores need equal numbers",
        ),
    ],
)
def test_a_bad_command_is_refused_in_one_line(
    arguments: list[str], start: str, checkout, good, capsys
):
    npz(channels_last(good))
    flat = FLAT if arguments[0] == "bad.npz" else []
    code, out, err = run(capsys, "evaluate", *arguments, *flat)
    assert (code, out) == (2, "")
    assert err.startswith(f"distillbench: {start}") and err.find("\n") == len(err) - 1
