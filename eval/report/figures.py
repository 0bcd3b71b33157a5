"""The picture under a table: samples of teacher and students on the same noise, from published records."""

from __future__ import annotations

import base64
import io
from typing import Any

import matplotlib
import numpy as np

from eval.report.records import Record

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import SubFigure

COLUMNS = 4  # of scatter plots


def decode(entry: dict[str, Any]) -> np.ndarray:
    """A gallery entry of metrics.json -> array of its shape."""
    return np.frombuffer(base64.b64decode(entry["base64"]), entry["dtype"]).reshape(entry["shape"])


def picture(records: list[Record]) -> bytes:
    """PNG of the lowest seed: a strip of images, or a scatter of points, per teacher and student at every NFE."""
    strips = []
    done = [(r, r.metrics["gallery"]) for r in records if r.metrics is not None]
    seeds = {
        b: min(r.result["seed"] for r, _ in done if r.result["benchmark"] == b)
        for b in {r.result["benchmark"] for r, _ in done}
    }
    order = {"teacher": 0, "from_scratch": 1, "distillation": 2}
    for r, gallery in sorted(
        done,
        key=lambda one: (one[0].result["benchmark"], order[one[0].result["group"]], one[0].arm),
    ):
        if r.result["seed"] != seeds[r.result["benchmark"]]:
            continue
        nfes = sorted(r.result["nfe"], reverse=r.result["group"] == "teacher")
        for nfe in nfes:
            label = (
                f"{r.result['benchmark']}: {r.arm}, {nfe} NFE"
                if len(seeds) > 1
                else f"{r.arm}, {nfe} NFE"
            )
            strips.append((label, decode(gallery[f"nfe{nfe}"])))
    images = [(label, a) for label, a in strips if a.ndim == 4]
    points = [(label, a) for label, a in strips if a.ndim == 2]
    heights = [2.6 * -(-len(points) // COLUMNS), 0.46 * len(images) + 0.1 * bool(images)]
    fig = plt.figure(figsize=(10, sum(heights) or 0.5))  # blank where every cell failed
    parts = [
        (draw, own, h)
        for draw, own, h in zip((_scatters, _strips), (points, images), heights)
        if own
    ]
    if parts:
        for part, (draw, own, _) in zip(
            fig.subfigures(len(parts), 1, squeeze=False, height_ratios=[h for *_, h in parts])[
                :, 0
            ],
            parts,
        ):
            draw(part, own)
    out = io.BytesIO()
    fig.savefig(out, format="png", dpi=110, metadata={"Software": None})
    plt.close(fig)
    return out.getvalue()


def _strips(fig: SubFigure, strips: list[tuple[str, np.ndarray]]) -> None:
    axes = fig.subplots(len(strips), 1, squeeze=False)
    for ax, (label, images) in zip(axes[:, 0], strips):
        grey = (
            images[:, 0].astype(float) / 255
            if images.dtype == np.uint8
            else images[:, 0].astype(float) / 3 + 0.5
        )
        padded = np.pad(grey, ((0, 0), (0, 0), (1, 1)))  # background between images
        ax.imshow(
            np.concatenate(list(padded), axis=1),
            cmap="gray_r",
            vmin=0,
            vmax=1,
            interpolation="nearest",
        )
        ax.set_yticks([padded.shape[1] / 2], [label], fontsize=9)
        ax.set_xticks([])
        ax.tick_params(length=0)
        ax.set_frame_on(False)
    fig.subplots_adjust(left=0.28, right=0.995, top=0.99, bottom=0.01, hspace=0.12)


def _scatters(fig: SubFigure, scatters: list[tuple[str, np.ndarray]]) -> None:
    axes = fig.subplots(-(-len(scatters) // COLUMNS), COLUMNS, squeeze=False)
    for ax in axes.flat:
        ax.axis("off")
    for ax, (label, x) in zip(axes.flat, scatters):
        ax.scatter(x[:, 0].astype(float), x[:, 1].astype(float), s=1.5, lw=0, color="black")
        ax.set(xlim=(-3, 3), ylim=(-3, 3), aspect="equal")
        ax.set_title(label, fontsize=8)
    fig.subplots_adjust(left=0.01, right=0.99, top=0.95, bottom=0.01, wspace=0.05, hspace=0.2)
