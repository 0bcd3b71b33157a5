"""`distillbench evaluate PATH`: the scores of released samples, and their rows in tables."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from distillbench.cli.options import out as terminal
from distillbench.data.images import Images
from eval.metrics import evaluate, key
from eval.metrics.evaluate import Against
from eval.report import external, records
from eval.report.external import KEYS
from eval.report.rows import build_rows, protocol
from eval.samples import content_sha256, read_samples
from tests.released import FLAT, N, channels_last, digits, folder, memorised, picture, run
from tests.test_tables import ROOT, copy_of_the_published


@pytest.fixture
def good() -> Tensor:
    return memorised()


@pytest.fixture(name="digits")
def digits_() -> Images:
    return digits()


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
    found = [
        scores(capsys, path, "--name", "same") for path in ("same.safetensors", "same.npz", "same")
    ]
    assert found[0] == found[1] == found[2]
    folder(good, "flat")
    flat = scores(capsys, "flat", "--name", "same")
    assert flat["samples_sha256"] == found[0]["samples_sha256"] and flat["labels_sha256"] is None
    known = {name: value for name, value in flat["row"].items() if value is not None}
    # scores that need labels are missing, the others are the same
    assert known.items() <= found[0]["row"].items()
    assert flat["row"]["class_accuracy"] is None and found[0]["row"]["class_accuracy"] > 0.99
    # and they are those of the fixed row whose images these are
    against = Against.of(digits, "digits-gelu-64", None)
    rows = {row.pop("name"): row for row in evaluate.fixed_rows(digits, against, N, seed=0)}
    assert found[0]["row"] == rows["memoriser"]
    assert found[0]["row"] != rows["mixup"]


def test_hash_is_of_content_in_order(good):
    found = {
        content_sha256(x)
        for x in (
            good,
            good.flip(0),
            good.view(N, 1, 4, 16),
            good.view(N // 2, 2, 8, 8),
            good.to(torch.int8),
        )
    }
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
    assert (
        read.labels is not None
        and read.labels.tolist() == [3, 0, 3, 3, 3, 0, 3, 3]
        and torch.equal(read.images[1], good[0])
    )


def test_colour_images_keep_their_channels(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (20, 4, 6, 3), np.uint8)
    for i, image in enumerate(images):
        picture(tmp_path / f"folder/{i}.webp", image, lossless=True)
    np.savez(tmp_path / "x.npz", images)
    found = [read_samples(tmp_path / name, (3, 4, 6), 20, 10) for name in ("folder", "x.npz")]
    assert found[0].sha256 == found[1].sha256 and np.array_equal(
        found[0].images.numpy(), images.transpose(0, 3, 1, 2)
    )


def test_sixteen_bits_of_colour_are_no_bytes(tmp_path):
    """PIL would hand out the upper halves without a word."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content))
            + name
            + content
            + struct.pack(">I", zlib.crc32(name + content))
        )

    pixels = zlib.compress((b"\0" + bytes(range(24))) * 4)
    for bits in (8, 16):
        header = struct.pack(">IIBBBBB", 8 // (bits // 8), 4, bits, 2, 0, 0, 0)
        file = tmp_path / f"{bits}/0.png"
        file.parent.mkdir()
        file.write_bytes(
            b"\x89PNG\r\n\x1a\n"
            + chunk(b"IHDR", header)
            + chunk(b"IDAT", pixels)
            + chunk(b"IEND", b"")
        )
    assert read_samples(tmp_path / "8", (3, 4, 8), 1, 10, brightest=23).images.max() == 23
    assert Image.open(tmp_path / "16/0.png").mode == "RGB"
    with pytest.raises(ValueError, match=r"0\.png: 16 bits per channel, expected 8"):
        read_samples(tmp_path / "16", (3, 4, 4), 1, 10)


def test_held_out_images_score_as_copies(checkout, digits, capsys):
    np.savez("held-out.npz", channels_last(digits.reference), digits.reference_labels.numpy())
    found = scores(capsys, "held-out.npz", "--count", "896")
    row = found["row"]
    assert abs(row["fid"]) < 1e-4 and row["kid"] < 0 and found["count"] == 896
    assert all(
        row[name] == 1 for name in ("precision", "recall", "density", "coverage", "diversity")
    )
    assert (
        row["memorisation"] < 0.6 and row["fid_teacher"] is None and row["noise_distance"] is None
    )
    # the same images against the halves mixed up: another answer
    mixed = Against.of(
        Images(digits.reference, digits.reference_labels, digits.train, digits.train_labels, 10),
        "digits-gelu-64",
        None,
    )
    other = evaluate.evaluate_images(digits.reference, digits.reference_labels, mixed)
    assert other["fid"] > 0.1 and other["memorisation"] == 1


def test_order_by_class_is_what_is_refused(good, tmp_path):
    labels = torch.arange(N) % 10

    def refused(index: Tensor, with_labels: bool) -> bool:
        np.savez(
            tmp_path / "x.npz",
            channels_last(good[index]),
            *([labels[index].numpy()] if with_labels else []),
        )
        samples = read_samples(tmp_path / "x.npz", (1, 8, 8), len(index), 10)
        try:
            external.check_order(samples, "digits-gelu-64")
        except ValueError:
            return True
        return False

    in_turn, by_class = torch.arange(N), labels.argsort(stable=True)
    shuffled, one_class = (
        torch.randperm(N, generator=torch.Generator().manual_seed(0)),
        torch.arange(0, N, 10),
    )
    for with_labels in (False, True):
        assert [refused(i, with_labels) for i in (in_turn, shuffled, one_class, by_class)] == [
            False,
            False,
            False,
            True,
        ]


def test_what_sample_writes_is_accepted(checkout, capsys):
    assert run(capsys, "train", "tiny", "teacher", "--seeds", "0")[0] == 0
    # two positionals: the arm, as ever
    assert run(capsys, "evaluate", "tiny", "teacher", "--seeds", "0")[0] == 0
    assert len(list(Path("results/runs/tiny/teacher").glob("seed0-*/metrics.json"))) == 1
    assert (
        run(
            capsys, "sample", "tiny", "teacher", "--output", "drawn.safetensors", "--count", str(N)
        )[0]
        == 0
    )
    found = scores(capsys, "drawn.safetensors")
    assert (
        found["name"] == "drawn"
        and found["row"]["fid"] > 0
        and found["row"]["class_accuracy"] is not None
    )
    assert run(capsys, "train", "tiny-ring", "teacher", "--seeds", "0")[0] == 0
    assert (
        run(
            capsys,
            "sample",
            "tiny-ring",
            "teacher",
            "--output",
            "points.safetensors",
            "--count",
            "500",
        )[0]
        == 0
    )
    code, out, err = run(
        capsys,
        "evaluate",
        "points.safetensors",
        "--benchmark",
        "tiny-ring",
        "--output",
        "points.json",
    )
    assert code == 0 and "sliced W2" in out, err
    points = json.loads(Path("points.json").read_text())
    (file,) = Path("results/runs/tiny-ring/teacher").glob("seed0-*/result.json")
    assert points["row"]["modes_total"] == 3
    # as tables compare it
    assert (
        points["evaluation"]["data"] == json.loads(file.read_text())["provenance"]["hashes"]["data"]
    )
    save_file({"samples": torch.full((500, 2), torch.nan)}, "points.safetensors")
    code, _, err = run(capsys, "evaluate", "points.safetensors", "--benchmark", "tiny-ring")
    fault = "points.safetensors: 'samples' has 1000 values that are NaN or infinite"
    assert code == 2 and err.startswith(f"distillbench: {fault}: ") and err.count("\n") == 1


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
        found["evaluation"]["key"] = key.evaluation_key(b.extractor, b.cross_extractor)
        file.write_text(json.dumps(found))
    return tmp_path


def twins(folder: Path) -> dict[str, bytes]:
    return {
        suffix: (folder / f"results/table2.{suffix}").read_bytes()
        for suffix in ("md", "csv", "json")
    }


def test_a_published_row_is_in_all_twins_and_checked(published, good, capsys, monkeypatch):
    monkeypatch.setattr(terminal, "width", 80)
    assert run(capsys, "table", "table2", "--render")[0] == 0
    before = twins(published)
    save_file({"samples": good, "labels": torch.arange(N) % 10}, "x.safetensors")
    code, out, err = run(
        capsys, "evaluate", "x.safetensors", "--count", str(N), *WORDS, "--publish"
    )
    assert code == 0 and "`distillbench table table2 --render` shows it" in err
    heads = ("samples", "floor", "class", "means", "gaussian", "mixup", "memoriser", "teacher,")
    assert set(heads) <= set(out.split()) and "…" not in out and "extractor ↓" in out
    assert f"theirs: {N} samples (digits takes 20000: not comparable)" in out
    assert run(capsys, "table", "table2", "--check")[0] == 1  # the row is missing
    assert (
        run(capsys, "table", "table2", "--render")[0] == 0
        and run(capsys, "table", "table2", "--check")[0] == 0
    )
    file = published / "results/external/digits/theirs.json"
    found = json.loads(file.read_text())
    assert (
        tuple(found) == KEYS
        and found["evaluation"]["extractor_sha256"]
        and found["evaluation"]["published_weights"]
    )
    page = (published / "results/table2.md").read_text()
    after = page.index("**Distillation**")
    assert (
        page.index("**External samples (made elsewhere; budget, data and teacher unknown)**")
        > after
    )
    line = next(li for li in page.splitlines() if li.startswith("| theirs"))
    assert (
        f"{found['row']['fid']:.3f}" in line and "1000 samples, not 20000: not comparable" in line
    )
    assert (
        f"theirs: A. Author, https://example.org/samples "
        f"(1000 samples, sha256 {found['samples_sha256'][:12]})." in page
    )
    (row,) = [
        r
        for r in json.loads((published / "results/table2.json").read_text())["rows"]
        if r["group"] == "external"
    ]
    assert (row["who"], row["samples_sha256"], row["nfe"], row["budget"]) == (
        "A. Author",
        found["samples_sha256"],
        None,
        None,
    )
    assert (
        row["fid_mean"] == pytest.approx(found["row"]["fid"], rel=1e-5)
        and row["fid_teacher_mean"] is None
    )
    assert ",external,theirs," in (published / "results/table2.csv").read_text()
    # an edited digit of the record, and of the table
    digit = f"{found['row']['fid']:.3f}"[-1]
    wrong = found["row"] | {"fid": found["row"]["fid"] + 0.01}
    content = file.read_bytes()
    file.write_text(json.dumps(found | {"row": wrong}))
    assert run(capsys, "table", "table2", "--check")[0] == 1
    file.write_bytes(content)
    assert run(capsys, "table", "table2", "--check")[0] == 0
    at = (
        page.index(line)
        + line.index(f"{found['row']['fid']:.3f}")
        + len(f"{found['row']['fid']:.3f}")
        - 1
    )
    (published / "results/table2.md").write_text(
        page[:at] + str((int(digit) + 1) % 10) + page[at + 1 :]
    )
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
    assert (code, out) == (2, "") and file.read_bytes() == first
    assert err.startswith(f"distillbench: {file}: published with another samples_sha256 ({sha})")
    assert "--name" in err and "--overwrite" in err and err.count("\n") == 1
    code, _, err = run(
        capsys, "evaluate", "x.npz", *again[:-2], "https://elsewhere.org", "--publish"
    )
    assert code == 2 and "published with another where (https://example.org/samples)" in err
    old = json.loads(first)  # the same samples after a change of the evaluation: no question asked
    old["evaluation"]["key"], old["row"]["fid"] = "0" * 12, 9.0
    file.write_text(json.dumps(old))
    assert run(capsys, "evaluate", "x.npz", *again)[0] == 0 and file.read_bytes() == first
    assert (
        run(capsys, "evaluate", "y.npz", *again, "--overwrite")[0] == 0
        and file.read_bytes() != first
    )


MADE = {
    "format": 1,
    "name": "x",
    "benchmark": "digits",
    "who": "w",
    "where": "v",
    "samples_sha256": "a" * 64,
    "labels_sha256": None,
    "count": 20000,
    "evaluation": {"key": "0" * 12, "reference_sha256": "b" * 64},
    "row": {"fid": 1.0, "is": None},
}


@pytest.mark.parametrize(
    "benchmark,data,score",
    [("digits", "reference_sha256", "fid"), ("gaussians-ring", "data", "sliced_w2")],
)
def test_a_record_of_another_evaluation_or_of_other_data_has_a_row_without_numbers(
    benchmark, data, score
):
    given = records.read(
        ROOT / f"results/records/{'table2' if benchmark == 'digits' else 'gaussians'}"
    )
    shared = protocol(given)[benchmark]
    about = {"key": shared["evaluation"], data: shared[data]}
    made = MADE | {"benchmark": benchmark, "row": {score: 1.0}, "count": shared["samples"]}
    plain, (current,), (stale,), (elsewhere,) = (
        build_rows(given),
        *(
            [
                r
                for r in build_rows(given, [made | {"evaluation": about | other}])
                if r["group"] == "external"
            ]
            for other in ({}, {"key": "0" * 12}, {data: "0" * 64})
        ),
    )
    assert (current["status"], current[f"{score}_mean"], current["seeds"]) == ("done", 1.0, 1)
    assert (
        stale["status"] == "evaluated under another protocol: run evaluate again"
        and stale["seeds"] == 0
    )
    assert (
        elsewhere["status"] == "scored against other data: run evaluate again"
        and elsewhere["seeds"] == 0
    )
    for row in (stale, elsewhere):
        assert not [
            value
            for name, value in row.items()
            if name.endswith(("_mean", "_sd")) and value is not None
        ]
    # another benchmark's record changes nothing
    assert build_rows(given, [made | {"benchmark": "elsewhere"}]) == plain
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
        "{}",
        "[]",
        "null",
        "[" * 10**5,
        "\udcff",
        *(
            json.dumps(MADE | wrong)
            for wrong in (
                {"row": None},
                {"row": {"fid": "1"}},
                {"evaluation": {}},
                {"evaluation": {"key": "k"}},
                {"evaluation": None},
                {"count": "9"},
                {"who": 7},
                {"where": "two\nlines"},
                {"samples_sha256": None},
                {"name": "y"},
                {"format": 2},
            )
        ),
    ],
)
def test_a_spoilt_record_is_named(spoilt: str, published, capsys):
    file = published / "results/external/digits/x.json"
    file.parent.mkdir(parents=True)
    file.write_text(spoilt, errors="surrogateescape")
    code, _, err = run(capsys, "table", "table2", "--check")
    assert code == 2 and err.startswith(f"distillbench: {file}: no record of external samples: ")
    assert err.count("\n") == 1


def test_the_command_itself(checkout):
    """In a process of its own: no traceback, exit code 2."""
    done = checkout.run_anew("distillbench", "evaluate", "nowhere", *FLAT)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not done.stdout
