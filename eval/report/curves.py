"""Training curves: published thinned beside the records of a table, and drawn. Thinning imports no
torch.

results/records/<table>/curves/<benchmark>/<arm>.json holds the logged scalars of the lowest seed of
an arm:

    format     1
    benchmark, arm, seed, key    of the cell
    steps      of the run
    at         middle of each piece, as a share of the run, in [0, 1]
    scalars    name -> mean over each piece; null where a piece has no value

A piece is a run of consecutive logged steps, at most POINTS pieces. Floats with 6 significant
digits, no times: bytes repeat.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.report.text import significant

if TYPE_CHECKING:
    from matplotlib.axes import Axes

POINTS = 50
COLUMNS = 3  # of a picture
Curve = dict[str, Any]  # the content of a file above
Curves = dict[tuple[str, str], Curve]  # by benchmark and arm


def thinned(lines: list[dict[str, Any]]) -> Curve | None:
    """`steps`, `at` and `scalars` of a journal's lines (`distillbench/cells/journal.py`).

    None without a logged step. A step that was logged again after a resume counts once, as it was
    logged last.
    """
    logged: dict[int, dict[str, Any]] = {}
    names: set[str] = set()
    steps = None
    for line in lines:
        if "step" in line:
            logged[line["step"]] = line
        if "start" in line:
            steps = line["steps"]
    if not logged or steps is None:
        return None
    for line in logged.values():
        names.update(line)
    order = sorted(logged)
    size = -(-len(order) // POINTS)
    pieces = [order[i : i + size] for i in range(0, len(order), size)]
    scalars: dict[str, list[float | None]] = {}
    for name in sorted(names - {"step"}):
        scalars[name] = []
        for piece in pieces:
            values = [logged[step][name] for step in piece if name in logged[step]]
            scalars[name].append(significant(sum(values) / len(values)) if values else None)
    middles = [significant(sum(piece) / len(piece) / steps) for piece in pieces]
    return {"steps": steps, "at": middles, "scalars": scalars}


def read_journal(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a train.jsonl; none where there is no such file."""
    if not path.is_file():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:  # unfinished
            continue
    return lines


def publish_curve(folder: Path, cell: Path, result: dict[str, Any], arm: str) -> None:
    """Write the curve of a finished cell under the records in `folder`.

    Nothing is written where a lower seed of the arm has one there.
    """
    target = folder / "curves" / result["benchmark"] / f"{arm}.json"
    if target.is_file():
        there = json.loads(target.read_text(encoding="utf-8"))
        if there["seed"] <= result["seed"]:
            return
    found = thinned(read_journal(cell / "train.jsonl"))
    if found is None:
        return
    about = {
        "format": 1,
        "benchmark": result["benchmark"],
        "arm": arm,
        "seed": result["seed"],
        "key": result["key"],
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(about | found, ensure_ascii=False) + "\n"
    target.write_text(text, encoding="utf-8")


def read_curves(folder: Path) -> Curves:
    """The curves of the records in `folder`; ValueError names a damaged file."""
    out = {}
    for path in sorted((folder / "curves").glob("*/*.json")):
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            out[found["benchmark"], found["arm"]] = found
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"{path}: not valid JSON of a curve: "
                "take it from git again, or publish the table anew"
            ) from None
    return out


def picture(curve: Curve) -> bytes:
    """PNG: a panel for each scalar over the share of the run.

    The axis is logarithmic where all values are positive and spread.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = list(curve["scalars"])
    rows = -(-len(names) // COLUMNS)
    columns = min(COLUMNS, len(names))
    size = (3.3 * columns, 2.1 * rows)
    fig, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for ax in axes.flat[len(names) :]:
        ax.axis("off")
    for ax, name in zip(axes.flat, names):
        _panel(ax, name, curve["at"], curve["scalars"][name])
    out = io.BytesIO()
    fig.savefig(out, format="png", dpi=100, metadata={"Software": None})
    plt.close(fig)
    return out.getvalue()


def _panel(ax: Axes, name: str, at: list[float], values: list[float | None]) -> None:
    """One scalar over the share of the run; pieces without a value are left out."""
    xs = []
    ys = []
    for x, y in zip(at, values):
        if y is not None:
            xs.append(x)
            ys.append(y)
    ax.plot(xs, ys, color="black", lw=1)
    if ys and min(ys) > 0 and max(ys) > 5 * min(ys):
        ax.set_yscale("log")
    ax.set_title(name.replace("_", " "), fontsize=8)
    ax.set_xlim(0, 1)
    ax.tick_params(labelsize=7, which="both")
