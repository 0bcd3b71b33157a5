"""Training curves: published thinned beside the records of a table, and drawn. Thinning imports no torch.

results/records/<table>/curves/<benchmark>/<arm>.json holds the logged scalars of an arm's lowest seed:

    format     1
    benchmark, arm, seed, key    of the cell
    steps      of the run
    at         middle of each piece, as a share of the run, in [0, 1]
    scalars    name -> mean over each piece; null where a piece has no value

A piece is a run of consecutive logged steps, at most POINTS pieces. Floats with 6 significant digits, no times: bytes repeat.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

POINTS = 50
COLUMNS = 3  # of a picture


def thinned(lines: list[dict[str, Any]]) -> dict[str, Any] | None:
    """`steps`, `at` and `scalars` of a journal's lines (`distillbench/journal.py`); None without a logged step.

    A step that was logged again after a resume counts once, as it was logged last.
    """
    logged = {line["step"]: line for line in lines if "step" in line}
    starts = [line["steps"] for line in lines if "start" in line]
    if not logged or not starts:
        return None
    order = sorted(logged)
    size = -(-len(order) // POINTS)
    pieces = [order[i : i + size] for i in range(0, len(order), size)]
    names = sorted({name for line in logged.values() for name in line} - {"step"})
    digits = lambda v: float(f"{v:.6g}")
    scalars: dict[str, list[float | None]] = {}
    for name in names:
        values = [[logged[i][name] for i in piece if name in logged[i]] for piece in pieces]
        scalars[name] = [digits(sum(v) / len(v)) if v else None for v in values]
    return {
        "steps": starts[-1],
        "at": [digits(sum(p) / len(p) / starts[-1]) for p in pieces],
        "scalars": scalars,
    }


def read_journal(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a train.jsonl; none where there is no such file."""
    lines = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(line))
        except ValueError:  # unfinished
            continue
    return lines


def publish_curve(folder: Path, cell: Path, result: dict[str, Any], arm: str) -> None:
    """Write the curve of a finished cell under the records in `folder`, unless a lower seed of the arm has one there."""
    target = folder / "curves" / result["benchmark"] / f"{arm}.json"
    if target.is_file() and json.loads(target.read_text())["seed"] <= result["seed"]:
        return
    found = thinned(read_journal(cell / "train.jsonl"))
    if found is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
        about = {
            "format": 1,
            "benchmark": result["benchmark"],
            "arm": arm,
            "seed": result["seed"],
            "key": result["key"],
        }
        target.write_text(json.dumps(about | found, ensure_ascii=False) + "\n")


def read_curves(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """(benchmark, arm) -> curve, of the records in `folder`; ValueError names a damaged file."""
    out = {}
    for path in sorted((folder / "curves").glob("*/*.json")):
        try:
            found = json.loads(path.read_text())
            out[found["benchmark"], found["arm"]] = found
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"{path}: not valid JSON of a curve: take it from git again, or publish the table anew"
            ) from None
    return out


def picture(curve: dict[str, Any]) -> bytes:
    """PNG: a panel for each scalar over the share of the run, on a logarithmic axis where all values are positive and spread."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = list(curve["scalars"])
    rows = -(-len(names) // COLUMNS)
    columns = min(COLUMNS, len(names))
    fig, axes = plt.subplots(
        rows, columns, figsize=(3.3 * columns, 2.1 * rows), squeeze=False, layout="constrained"
    )
    for ax in axes.flat[len(names) :]:
        ax.axis("off")
    for ax, name in zip(axes.flat, names):
        points = [(x, y) for x, y in zip(curve["at"], curve["scalars"][name]) if y is not None]
        x, y = zip(*points) if points else ((), ())
        ax.plot(x, y, color="black", lw=1)
        if y and min(y) > 0 and max(y) > 5 * min(y):
            ax.set_yscale("log")
        ax.set_title(name.replace("_", " "), fontsize=8)
        ax.set_xlim(0, 1)
        ax.tick_params(labelsize=7, which="both")
    out = io.BytesIO()
    fig.savefig(out, format="png", dpi=100, metadata={"Software": None})
    plt.close(fig)
    return out.getvalue()
