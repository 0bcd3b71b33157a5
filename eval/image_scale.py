"""The part of table 1 that was measured on a GPU: perf/gpu.json, written by `python -m perf.gpu`, as a table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tabulate import tabulate

HEAD = ["method", "TFLOP/step", "ms/step, TF32", "× flow matching", "GiB", "ms/step, bf16", "GiB", "ms/step, fp32"]


def section(path: Path) -> list[str]:
    """Lines of markdown; none where nothing was measured. A row of perf/gpu.json is one method in one precision."""
    if not path.is_file():
        return []
    found = json.loads(path.read_text())
    rows: dict[str, dict[str, Any]] = {}
    for row in found["rows"]:
        rows.setdefault(row["method"], {})[row["precision"]] = row
    unit = rows["flow matching"]["tf32"]["ms_per_step"]

    def cell(row: dict[str, Any] | None, key: str, digits: int) -> str:
        return "–" if row is None or key not in row else f"{row[key]:.{digits}f}"

    lines = []
    for name, by in rows.items():
        tf32, bf16 = by.get("tf32"), by.get("bf16")
        measured = tf32 is not None and "ms_per_step" in tf32
        lines.append(
            [
                name,
                f"{tf32['tflop_per_cycle'] / tf32['cycle']:.1f}" if measured else "–",
                cell(tf32, "ms_per_step", 0),
                f"{tf32['ms_per_step'] / unit:.2f}" if measured else "–",
                cell(tf32, "peak_gib", 1),
                bf16["status"] if bf16 is not None and "ms_per_step" not in bf16 else cell(bf16, "ms_per_step", 0),
                cell(bf16, "peak_gib", 1),
                cell(by.get("fp32"), "ms_per_step", 0),
            ]
        )
    about, scale = found["environment"], found["scale"]
    net = scale["network"]
    return [
        "",
        "## One train step at image scale",
        "",
        tabulate(lines, HEAD, "github", disable_numparse=True),
        "",
        f"A transformer of width {net['width']}, depth {net['depth']}, {net['heads']} heads and patches of {net['patch']} (DiT-B) on "
        f"latents {'x'.join(map(str, scale['shape']))}, {scale['classes']} classes, batch {scale['batch']}, eager, on one {about['device']} "
        f"with torch {about['torch']}; means over a cycle of updates, memory at its highest. bf16: autocast, which a derivative along "
        "(x, t, s) refuses. `python -m perf.gpu` measures it.",
    ]
