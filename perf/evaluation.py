"""What scores on features cost: our engine and torch-fidelity on the same features, on one thread.

python -m perf.evaluation STEP FOLDER ROWS runs one step, each in a process of its own so that
memory is its own, and prints JSON: `features` (writes them), `speed`, `memory`. Times are seconds
of this process on the processor, so that other work on the machine counts little.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

WIDTH = 2048  # of Inception's features
CLASSES = 1008  # of Inception's logits
SMALL = (20000, 896, 64)  # generated and held-out rows and width on digits


def like_inception(rows: int, seed: int, width: int = WIDTH) -> torch.Tensor:
    """float32 [rows, width] with mean 0.4 and a power-law spectrum.

    The spectrum lies along the axes: scores do not see a rotation.
    """
    spectrum = torch.arange(1, width + 1).pow(-0.5) * 3
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=rng).mul_(spectrum).add_(0.4 + 0.02 * seed)


def seconds(run: Callable[[], object]) -> float:
    """Seconds of this process on the processor that `run` takes."""
    start = time.process_time()
    run()
    return time.process_time() - start


def load(file: Path) -> torch.Tensor:
    """Features [rows, WIDTH] that `write_features` wrote."""
    return torch.from_numpy(np.load(file, allow_pickle=False))


def write_features(folder: Path, rows: int) -> dict[str, float]:
    """Write ref.npy and gen.npy, features like Inception's."""
    for seed, name in enumerate(("ref", "gen")):
        np.save(folder / f"{name}.npy", like_inception(rows, seed).numpy())
    return {}


def speed(folder: Path, rows: int) -> dict[str, float]:
    """Seconds of our scores and of torch-fidelity's, and of ours on the digits."""
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    from eval.metrics.inception_score import inception_score
    from eval.metrics.scores import feature_scores
    from eval.metrics.statistics import Reference

    gen = load(folder / "gen.npy")
    ref = load(folder / "ref.npy")
    logits = 2 * like_inception(rows, 2, CLASSES)

    def ours(reference: Reference) -> None:
        feature_scores(gen, reference)
        inception_score(logits)

    def their_fid() -> None:
        generated = fid_features_to_statistics(gen)
        fid_statistics_to_metric(generated, fid_features_to_statistics(ref), verbose=False)

    theirs: dict[str, Callable[[], object]] = {
        "fid": their_fid,
        "kid": partial(kid_features_to_metric, gen, ref, verbose=False),
        "is": partial(isc_features_to_metric, logits),
        "prc": partial(prc_features_to_metric, gen, ref, verbose=False),
    }
    reference = Reference(ref, "")
    first = seconds(partial(ours, reference))  # with everything the reference needs
    known = seconds(partial(ours, reference))
    parts = {name: seconds(run) for name, run in theirs.items()}
    second = seconds(partial(ours, Reference(ref, "")))

    n, m, width = SMALL
    small = like_inception(n, 1, width)
    small_ref = like_inception(m, 0, width)

    def digits() -> None:
        feature_scores(small, Reference(small_ref, ""))

    costs = {
        "ours": (first + second) / 2,
        "ours_known": known,
        "digits": statistics.median(seconds(digits) for _ in range(3)),
        "theirs": sum(parts.values()),
    }
    return costs | parts


def resident(field: str) -> float:
    """A memory counter of this process in GB: VmRSS now, VmHWM its peak (Linux)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    lines = dict(line.split(":", 1) for line in status.splitlines())
    kibibytes = int(lines[field].split()[0])
    return kibibytes * 1024 / 1e9


def memory(folder: Path, rows: int) -> dict[str, float]:
    """GB after the imports, with both sets loaded and at the peak of scoring them, and seconds."""
    from eval.metrics.scores import feature_scores
    from eval.metrics.statistics import Reference

    imports = resident("VmRSS")
    gen = load(folder / "gen.npy")
    ref = load(folder / "ref.npy")
    loaded = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # peak := now
    spent = seconds(lambda: feature_scores(gen, Reference(ref, "")))
    return {"imports": imports, "loaded": loaded, "peak": resident("VmHWM"), "seconds": spent}


STEPS = {"features": write_features, "speed": speed, "memory": memory}

if __name__ == "__main__":
    torch.set_num_threads(1)
    name, folder, rows = sys.argv[1:]
    print(json.dumps(STEPS[name](Path(folder), int(rows))))
