"""The part of table 1 that was measured on a GPU: perf/gpu.json, written by `python -m perf.gpu`,
as a table."""

from __future__ import annotations

import json
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from eval.catalogue import MISSING
from eval.report import text
from eval.report.records import grouped

HEAD = ["arm", "TFLOP", "ms, TF32", "× flow matching", "GiB", "ms, bf16", "GiB", "ms, fp32"]
Row = dict[str, Any]  # of perf/gpu.json: one method in one precision


class Update(NamedTuple):
    """One update of the student with all that goes with it."""

    tflop: float
    ms: float


def tf32_update(row: Row) -> Update | None:
    """Cost of one update of the student; None where it was not measured."""
    if row.get("status") != "measured":
        return None
    steps = row["ms_per_student_update"] / row["ms_per_step"]
    return Update(row["tflop_per_cycle"] / row["cycle"] * steps, row["ms_per_student_update"])


def section(path: Path) -> list[str]:
    """Lines of markdown; none where nothing was measured, that is without the file at `path`."""
    if not path.is_file():
        return []
    found = json.loads(path.read_text(encoding="utf-8"))
    methods: dict[str, dict[str, Row]] = {}
    for name, own in grouped(found["rows"], itemgetter("method")).items():
        methods[name] = {row["precision"]: row for row in own}
    unit = methods["flow matching"]["tf32"]["ms_per_student_update"]
    body = [_line(name, rows, unit) for name, rows in methods.items()]
    about = found["environment"]
    scale = found["scale"]
    net = scale["network"]
    shape = "x".join(map(str, scale["shape"]))
    return [
        "",
        "## One update of the student at image scale",
        "",
        text.table(HEAD, body),
        "",
        f"A transformer of width {net['width']}, depth {net['depth']}, {net['heads']} heads, "
        f"patches of {net['patch']} (DiT-B) on latents {shape}, {scale['classes']} classes, batch "
        f"{scale['batch']} in each loss, eager, on one {about['device']}, torch {about['torch']}; "
        "median of five cycles, the critic’s updates included, memory at its highest. bf16: "
        "autocast, which a derivative along (x, t, s) refuses. `python -m perf.gpu` measures it.",
    ]


def _line(name: str, by_precision: dict[str, Row], unit: float) -> list[str]:
    """One method; `unit`: milliseconds of flow matching."""
    tf32 = by_precision.get("tf32", {})
    bf16 = by_precision.get("bf16", {})
    fp32 = by_precision.get("fp32", {})
    update = tf32_update(tf32)
    if update is None:
        line = [name, *[MISSING] * 3]
    else:
        ratio = update.ms / unit
        line = [name, f"{update.tflop:.1f}", f"{update.ms:.0f}", f"{ratio:.2f}"]
    line.append(text.fixed(tf32.get("peak_gib"), 1))
    if bf16.get("status") == "fp32 only":
        line.append("fp32 only")
    else:
        line.append(text.fixed(bf16.get("ms_per_student_update"), 0))
    line.append(text.fixed(bf16.get("peak_gib"), 1))
    return [*line, text.fixed(fp32.get("ms_per_student_update"), 0)]
