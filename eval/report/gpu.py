"""The part of table 1 that was measured on a GPU: perf/gpu.json, written by `python -m perf.gpu`, as a table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tabulate import tabulate

HEAD = ["arm", "TFLOP", "ms, TF32", "× flow matching", "GiB", "ms, bf16", "GiB", "ms, fp32"]


def tf32_update(row: dict[str, Any]) -> tuple[float, float] | None:
    """(TFLOP, milliseconds) for one update of the student with all that goes with it; None where it was not measured."""
    if row.get("status") != "measured":
        return None
    steps = row["ms_per_student_update"] / row["ms_per_step"]
    return row["tflop_per_cycle"] / row["cycle"] * steps, row["ms_per_student_update"]


def section(path: Path) -> list[str]:
    """Lines of markdown; none where nothing was measured. A row of perf/gpu.json is one method in one precision."""
    if not path.is_file():
        return []
    found = json.loads(path.read_text())
    rows: dict[str, dict[str, Any]] = {}
    for row in found["rows"]:
        rows.setdefault(row["method"], {})[row["precision"]] = row
    unit = rows["flow matching"]["tf32"]["ms_per_student_update"]

    def cell(row: dict[str, Any], key: str, digits: int) -> str:
        return f"{row[key]:.{digits}f}" if key in row else "–"

    lines = []
    for name, by in rows.items():
        tf32, bf16, update = by.get("tf32", {}), by.get("bf16", {}), tf32_update(by.get("tf32", {}))
        lines.append(
            [
                name,
                "–" if update is None else f"{update[0]:.1f}",
                "–" if update is None else f"{update[1]:.0f}",
                "–" if update is None else f"{update[1] / unit:.2f}",
                cell(tf32, "peak_gib", 1),
                bf16.get("status")
                if bf16.get("status") == "fp32 only"
                else cell(bf16, "ms_per_student_update", 0),
                cell(bf16, "peak_gib", 1),
                cell(by.get("fp32", {}), "ms_per_student_update", 0),
            ]
        )
    about, scale = found["environment"], found["scale"]
    net = scale["network"]
    return [
        "",
        "## One update of the student at image scale",
        "",
        tabulate(lines, HEAD, "github", disable_numparse=True),
        "",
        f"A transformer of width {net['width']}, depth {net['depth']}, {net['heads']} heads, patches of {net['patch']} (DiT-B) on latents "
        f"{'x'.join(map(str, scale['shape']))}, {scale['classes']} classes, batch {scale['batch']} in each loss, eager, on one "
        f"{about['device']}, torch {about['torch']}; median of five cycles, the critic’s updates included, memory at its highest. "
        "bf16: autocast, which a derivative along "
        "(x, t, s) refuses. `python -m perf.gpu` measures it.",
    ]
