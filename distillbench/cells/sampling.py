"""Samples of a cell, from the noise that every method of its seed gets."""

from __future__ import annotations

import torch
from torch import Tensor

from distillbench.cells.build import Run
from distillbench.cells.progress import Report
from distillbench.cells.pulse import SAMPLING, Pulse
from distillbench.data.images import Images, to_bytes
from distillbench.errors import Diverged, UserError, nearest
from distillbench.method import Condition
from distillbench.seeds import Rng

REFERENCE = "reference"  # the teacher's own set of samples, from a noise stream of its own


def all_samples(run: Run, report: Report, pulse: Pulse) -> dict[str, Tensor]:
    """Samples of a trained cell at every NFE that its method declares, as `nfe<n>`.

    Those of a teacher have `reference` too, what `FID to teacher` compares with: at its headline
    NFE, independent of the noise that students get.
    """
    count = run.cell.benchmark.sampling.count
    samples = {}
    for nfe in run.needs.nfe:
        samples[f"nfe{nfe}"] = sample(run, nfe, count, report, pulse=pulse)
    if run.cell.arm is None:
        samples[REFERENCE] = sample(run, run.needs.headline_nfe, count, report, REFERENCE, pulse)
    return samples


@torch.no_grad()
def sample(
    run: Run,
    nfe: int,
    count: int,
    report: Report,
    name: str = "evaluation",
    pulse: Pulse | None = None,
) -> Tensor:
    """[count, *shape] samples at `nfe` in class-balanced order; uint8 of images, else float32.

    name: of the noise stream. Raises ValueError on a wrong shape or a sampler that does not use
    exactly `nfe` evaluations, Diverged on values that are not finite, UserError on an NFE that the
    method does not declare.
    """
    if nfe not in run.needs.nfe:
        known = nearest(str(nfe), map(str, run.needs.nfe))
        raise UserError(f"{run.cell.arm_name}: nfe {nfe} is not supported, {known}")
    pulse = pulse or Pulse()
    pulse.beat(SAMPLING, 0)
    size = run.cell.benchmark.sampling.batch
    rng = Rng(run.cell.seed, name, "method", nfe, device=run.device)
    noise = Rng(run.cell.seed, name, "noise").normal(count, *run.data.shape)
    parts = []
    for start in range(0, count, size):
        part = noise[start : start + size].to(run.device)
        x = sample_batch(run, part, start, nfe, rng)
        parts.append(to_bytes(x).cpu() if isinstance(run.data, Images) else x.cpu())
        pulse.beat(SAMPLING, start // size + 1)
        report(f"sampling nfe {nfe}", start + len(part), count)
    return torch.cat(parts)


def sample_batch(run: Run, noise: Tensor, start: int, nfe: int, rng: Rng) -> Tensor:
    """The method's samples of rows `start`, `start` + 1, ... of a set, checked; raises as `sample`.

    A doubled batch counts as two evaluations.
    """
    labels: Tensor | None = None
    if run.data.classes:
        rows = torch.arange(start, start + len(noise), device=run.device)
        labels = rows % run.data.classes
    run.meter.rows.clear()
    with run.meter.counting():
        x = run.method.sample(noise, Condition(labels, run.cell.benchmark.guidance), nfe, rng)
    used = sum(run.meter.rows.values()) / len(noise)
    if not isinstance(x, Tensor) or x.shape != noise.shape:
        got = getattr(x, "shape", type(x))
        raise ValueError(f"sample returned {got}, expected {tuple(noise.shape)}")
    if used != nfe:
        raise ValueError(f"sample made {used:g} network evaluations at nfe={nfe}")
    if not torch.isfinite(x).all():
        raise Diverged(f"samples at nfe={nfe} are not finite")
    return x
