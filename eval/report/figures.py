"""The picture under a table: samples of the teacher and of students, from published records.

A row per student at its headline NFE, below the teacher at its most and at one evaluation. All of a
benchmark are of the lowest seed and start from the same noise: what differs down a column, or from
panel to panel, is the model.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np

from eval.report.records import Record

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

# Lengths are in pixels of the picture.
DPI = 100
WIDTH = 960
MARGIN = 16
LABEL = 226  # left of a row of images
TILE = 64  # an image; whole pixels of it, so images of 8x8 are enlarged eightfold
GAP = 8
IMAGES = 10  # of a row: one of each class where classes are drawn in turn
HEADING = 44
PANELS = 4  # scatter plots in a row
CAPTION = 26  # above a scatter plot
EXTENT = 3.0  # of a scatter plot, to all sides
INK = "#1a1a1a"
PALE = "#767676"
FRAME = "#d0d0d0"


@dataclass(frozen=True)
class Strip:
    """Samples of one model at one NFE: images [N, C, H, W], or points [N, 2]."""

    title: str
    note: str
    is_teacher: bool
    samples: np.ndarray


class Canvas:
    """A figure addressed in pixels from its upper left corner, filled downwards."""

    def __init__(self, height: int):
        self.height = height
        self.figure: Figure = plt.figure(figsize=(WIDTH / DPI, height / DPI), dpi=DPI)
        self.top = MARGIN

    def text(self, x: float, y: float, words: str, size: float, **style: Any) -> None:
        """Words of `size` pixels whose middle is at height y."""
        style = {"color": INK, "va": "center_baseline"} | style
        points = size * 72 / DPI
        self.figure.text(x / WIDTH, 1 - y / self.height, words, fontsize=points, **style)

    def image(self, x: int, y: int, pixels: np.ndarray) -> None:
        """An image [H, W, 3] in [0, 1], pixel by pixel."""
        self.figure.figimage(pixels, x, self.height - y - len(pixels), origin="upper")

    def axes(self, x: float, y: float, size: float) -> Any:
        """Square axes."""
        box = (x / WIDTH, 1 - (y + size) / self.height, size / WIDTH, size / self.height)
        return self.figure.add_axes(box)

    def png(self) -> bytes:
        """The file; the same figure gives the same bytes."""
        out = io.BytesIO()
        self.figure.savefig(out, format="png", dpi=DPI, metadata={"Software": None})
        plt.close(self.figure)
        return out.getvalue()


def decode(entry: dict[str, Any]) -> np.ndarray:
    """A gallery entry of metrics.json -> array of its shape."""
    return np.frombuffer(base64.b64decode(entry["base64"]), entry["dtype"]).reshape(entry["shape"])


def picture(records: list[Record], with_variants: bool) -> bytes:
    """PNG of the teachers and students of a table, benchmark by benchmark.

    with_variants: every arm and not only methods as they are by default.
    """
    parts = {}
    for benchmark in sorted({r.result["benchmark"] for r in records}):
        own = [r for r in records if r.result["benchmark"] == benchmark and r.metrics is not None]
        rows = strips(own, with_variants)
        if rows:
            parts[benchmark] = rows
    # Points first: a page shows them larger.
    names = sorted(parts, key=lambda name: (parts[name][0].samples.ndim, name))
    headed = len(names) > 1
    height = sum(height_of(parts[name]) + HEADING * headed for name in names)
    canvas = Canvas(height + 2 * MARGIN)
    for name in names:
        if headed:
            canvas.text(MARGIN, canvas.top + HEADING / 2, name, 19, weight="bold")
            canvas.top += HEADING
        draw = draw_points if parts[name][0].samples.ndim == 2 else draw_images
        draw(canvas, parts[name])
    return canvas.png()


def strips(records: list[Record], with_variants: bool) -> list[Strip]:
    """The rows of one benchmark: its lowest seed that finished, the teacher first."""
    seed = min((r.result["seed"] for r in records), default=0)
    own = [r for r in records if r.result["seed"] == seed]
    order = {"teacher": 0, "from_scratch": 1, "distillation": 2}
    found = []
    for record in sorted(own, key=lambda r: (order[r.result["group"]], r.arm)):
        result = record.result
        is_teacher = result["group"] == "teacher"
        if result["variant"] and not with_variants:
            continue
        nfes = [result["headline_nfe"]]
        if is_teacher:
            nfes = sorted({max(result["nfe"]), min(result["nfe"])}, reverse=True)
        for nfe in nfes:
            assert record.metrics is not None
            samples = decode(record.metrics["gallery"][f"nfe{nfe}"])
            note = f"{nfe} NFE"
            if result["variant"]:
                note = f"{result['variant']}, {note}"
            found.append(Strip(result["title"], note, is_teacher, samples))
    return found


def height_of(rows: Sequence[Strip]) -> int:
    """Pixels that the strips of a benchmark take."""
    if rows[0].samples.ndim == 2:
        return -(-len(rows) // PANELS) * (panel_size() + CAPTION + GAP)
    return len(rows) * (TILE + GAP) + 2 * GAP


def panel_size() -> int:
    """Side of a scatter plot."""
    return (WIDTH - 2 * MARGIN - (PANELS - 1) * GAP) // PANELS


def draw_images(canvas: Canvas, rows: Sequence[Strip]) -> None:
    """A row of images per strip; a wider gap between teacher and students."""
    for previous, row in zip([rows[0], *rows], rows):
        if previous.is_teacher and not row.is_teacher:
            canvas.top += 2 * GAP
        middle = canvas.top + TILE / 2
        canvas.text(MARGIN, middle - 9, row.title, 17, weight="bold")
        canvas.text(MARGIN, middle + 12, row.note, 14, color=PALE)
        for i, pixels in enumerate(row.samples[:IMAGES]):
            canvas.image(LABEL + i * (TILE + GAP), canvas.top, enlarged(pixels))
        canvas.top += TILE + GAP
    if rows[0].is_teacher == rows[-1].is_teacher:
        canvas.top += 2 * GAP


def enlarged(pixels: np.ndarray) -> np.ndarray:
    """An image [C, H, W] as [TILE, TILE, 3] in [0, 1] by nearest neighbours, grey as ink on paper.

    Bytes are of [0, 255]; floats, of mixtures, are shown from -1.5 to 1.5.
    """
    if pixels.dtype == np.uint8:
        shown = pixels.astype(float) / 255
    else:
        shown = np.clip(pixels.astype(float) / 3 + 0.5, 0, 1)
    if len(shown) == 1:
        shown = np.repeat(0.95 - 0.87 * shown, 3, axis=0)
    at = np.arange(TILE) * shown.shape[-1] // TILE
    return shown[:, at][:, :, at].transpose(1, 2, 0)


def draw_points(canvas: Canvas, rows: Sequence[Strip]) -> None:
    """A scatter plot per strip."""
    size = panel_size()
    for i, row in enumerate(rows):
        column = i % PANELS
        if i and not column:
            canvas.top += size + CAPTION + GAP
        x = MARGIN + column * (size + GAP)
        middle = canvas.top + CAPTION / 2
        canvas.text(x, middle, row.title, 15, weight="bold")
        canvas.text(x + size, middle, row.note, 14, color=PALE, ha="right")
        ax = canvas.axes(x, canvas.top + CAPTION, size)
        points = row.samples.astype(float)
        ax.scatter(points[:, 0], points[:, 1], s=4, lw=0, color=INK, alpha=0.6)
        ax.set(xlim=(-EXTENT, EXTENT), ylim=(-EXTENT, EXTENT), xticks=[], yticks=[])
        ax.spines[:].set_color(FRAME)
    canvas.top += size + CAPTION + GAP
