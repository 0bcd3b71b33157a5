"""The picture under a table: which rows it has, and that the same records give the same bytes."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from matplotlib import pyplot as plt

from eval.report import figures
from eval.report.records import Record
from tests.test_tables import record


def shown(arm: str, nfes: list[int], shape: tuple[int, ...], dtype: str, **labels: Any) -> Record:
    """A record whose gallery has samples of that shape at every NFE."""
    found = record(arm, 0, labels.pop("group", "distillation"), dict.fromkeys(nfes, 1.0), **labels)
    found.result["headline_nfe"] = nfes[0]
    data = (np.arange(np.prod(shape)) % 7).astype(dtype).tobytes()
    entry = {"shape": list(shape), "dtype": dtype, "base64": base64.b64encode(data).decode()}
    assert found.metrics is not None
    found.metrics["gallery"] = {f"nfe{n}": entry for n in nfes}
    return found


def of_a_table(shape: tuple[int, ...] = (20, 1, 8, 8), dtype: str = "uint8") -> list[Record]:
    return [
        shown("b", [2, 1, 4], shape, dtype),
        shown("b", [2], shape, dtype, variant="other"),
        shown("teacher", [1, 4, 32], shape, dtype, group="teacher"),
        record("failed", 0, "distillation", None),
    ]


def labels(rows: list[figures.Strip]) -> list[tuple[str, str]]:
    return [(row.title, row.note) for row in rows]


def test_rows_are_teacher_and_students_at_their_headline_nfe():
    records = [r for r in of_a_table() if r.metrics is not None]
    plain = [("teacher", "32 NFE"), ("teacher", "1 NFE"), ("b", "2 NFE")]
    assert labels(figures.strips(records, with_variants=False)) == plain
    every = [*plain, ("b", "other, 2 NFE")]
    assert labels(figures.strips(records, with_variants=True)) == every


def test_images_are_enlarged_pixel_by_pixel():
    pixels = np.array([[[0, 255], [51, 0]]], np.uint8)
    large = figures.enlarged(pixels)
    half = figures.TILE // 2
    assert large.shape == (figures.TILE, figures.TILE, 3)
    assert np.all(large[:half, :half] == 0.95) and np.allclose(large[:half, half:], 0.08)
    assert np.allclose(large[half:, :half], 0.95 - 0.87 * 0.2)
    colour = np.zeros((3, 2, 2), np.uint8)
    colour[1] = 255
    assert np.all(figures.enlarged(colour) == [0, 1, 0])


def test_the_same_records_give_the_same_picture():
    mixtures = of_a_table((800, 2), "float16")
    for one in mixtures:
        one.result["benchmark"] = "ring"
    records = of_a_table() + mixtures
    first = figures.picture(records, with_variants=True)
    assert figures.picture(records, with_variants=True) == first
    pixels = plt.imread(io.BytesIO(first))
    assert pixels.shape[1] == figures.WIDTH and b"Software" not in first
    assert len(figures.picture(records, with_variants=False)) < len(first)


def test_a_table_without_samples_has_an_empty_picture():
    empty = figures.picture([record("failed", 0, "distillation", None)], with_variants=True)
    assert np.all(plt.imread(io.BytesIO(empty)) == 1)
