"""What scores on features cost: our engine and torch-fidelity on the same features, in one process, on one thread.

python -m perf.evaluation STEP FOLDER ROWS runs one step, each in a process of its own so that memory is its own, and prints
JSON: `features` (writes them), `speed`, `memory`. Times are seconds of this process on the processor, so that other work on
the machine counts little.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

WIDTH, CLASSES = 2048, 1008  # of Inception
SMALL = (20000, 896, 64)  # generated and held-out rows and width on digits


def like_inception(rows: int, seed: int, width: int = WIDTH) -> torch.Tensor:
    """float32 [rows, width] with mean 0.4 and a power-law spectrum, along the axes: scores do not see a rotation."""
    spectrum = torch.arange(1, width + 1).pow(-0.5) * 3
    return (
        torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
        .mul_(spectrum)
        .add_(0.4 + 0.02 * seed)
    )


def seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def load(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    gen, ref = (
        torch.from_numpy(np.load(folder / f"{name}.npy", allow_pickle=False))
        for name in ("gen", "ref")
    )
    return gen, ref


def write_features(folder: Path, rows: int) -> dict[str, float]:
    for seed, name in enumerate(("ref", "gen")):
        np.save(folder / f"{name}.npy", like_inception(rows, seed).numpy())
    return {}


def speed(folder: Path, rows: int) -> dict[str, float]:
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    from eval.metrics.inception_score import inception_score
    from eval.metrics.scores import feature_scores
    from eval.metrics.statistics import Reference

    gen, ref = load(folder)
    logits = 2 * like_inception(rows, 2, CLASSES)

    def ours(reference: Reference) -> Callable[[], object]:
        return lambda: (feature_scores(gen, reference), inception_score(logits))

    theirs = {
        "fid": lambda: fid_statistics_to_metric(
            *map(fid_features_to_statistics, (gen, ref)), verbose=False
        ),
        "kid": lambda: kid_features_to_metric(gen, ref, verbose=False),
        "is": lambda: isc_features_to_metric(logits),
        "prc": lambda: prc_features_to_metric(gen, ref, verbose=False),
    }
    reference = Reference(ref, "")
    first = seconds(ours(reference))  # with everything the reference needs
    known = seconds(ours(reference))
    parts = {name: seconds(run) for name, run in theirs.items()}
    again = seconds(ours(Reference(ref, "")))

    n, m, width = SMALL
    small, small_ref = like_inception(n, 1, width), like_inception(m, 0, width)
    digits = sorted(
        seconds(lambda: feature_scores(small, Reference(small_ref, ""))) for _ in range(3)
    )[1]
    return {
        "ours": (first + again) / 2,
        "ours_known": known,
        "digits": digits,
        "theirs": sum(parts.values()),
    } | parts


def resident(field: str) -> float:
    """A memory counter of this process in GB: VmRSS now, VmHWM its peak (Linux)."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024 / 1e9


def memory(folder: Path, rows: int) -> dict[str, float]:
    from eval.metrics.scores import feature_scores
    from eval.metrics.statistics import Reference

    imports = resident("VmRSS")
    gen, ref = load(folder)
    loaded = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # peak := now
    spent = seconds(lambda: feature_scores(gen, Reference(ref, "")))
    return {"imports": imports, "loaded": loaded, "peak": resident("VmHWM"), "seconds": spent}


if __name__ == "__main__":
    torch.set_num_threads(1)
    step = {"features": write_features, "speed": speed, "memory": memory}[sys.argv[1]]
    print(json.dumps(step(Path(sys.argv[2]), int(sys.argv[3]))))
