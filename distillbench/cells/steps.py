"""One train step of a cell: its batch, its randomness, and what was the first to go wrong in it."""

from __future__ import annotations

import traceback

import torch
from torch import Tensor

from distillbench.cells.build import Run
from distillbench.errors import Diverged
from distillbench.method import Batch, Condition, Step
from distillbench.seeds import derive, ranks


def own_rows(batch: int) -> int:
    """This rank's share of a global batch; ValueError where it does not divide."""
    world = ranks()[1]
    if batch % world:
        raise ValueError(f"a batch of {batch} does not divide among {world} ranks")
    return batch // world


def batch_of(run: Run, step: Step) -> Batch:
    """The batch of a step: only what the method's needs name."""
    n = own_rows(run.needs.batch)
    guidance = run.cell.benchmark.guidance
    x: Tensor | None = None
    labels: Tensor | None = None
    if run.needs.data:
        x, labels = run.data.draw(step.rng("data"), n)
        x = x.to(run.device)
        if labels is not None:
            labels = labels.to(run.device)
    elif run.data.classes:
        labels = step.rng("labels").integers(n, run.data.classes)
    pairs = None if run.pairs is None else drawn_pairs(run, step, run.pairs)
    return Batch(n, Condition(labels, guidance), x, pairs)


def drawn_pairs(run: Run, step: Step, made: dict[str, Tensor]) -> tuple[Tensor, Tensor, Condition]:
    """The step's own rows of the regression pairs, with replacement."""
    assert run.needs.pairs is not None
    index = step.rng("pairs").integers(own_rows(run.needs.pairs.batch), len(made["z"]))
    labels = made["labels"][index] if "labels" in made else None
    return made["z"][index], made["y"][index], Condition(labels, run.cell.benchmark.guidance)


def one_step(run: Run, index: int, total: int) -> dict[str, Tensor]:
    """Train step `index` of `total`, its randomness derived from (seed, index); scalars to log.

    Raises Diverged, with the step, on a loss, a gradient or a scalar that is not finite.
    """
    step = Step(index, total, run.cell.seed, run.device)
    rank = ranks()[0]
    own = (rank,) if rank else ()  # rank 0 draws what one rank alone would
    # Not for the suite, which draws from named streams, but so that an author's randn_like resumes.
    torch.manual_seed(derive(run.cell.seed, "global", index, *own))
    try:
        logged = run.method.train_step(batch_of(run, step), step)
    except Diverged as e:  # by a player
        raise Diverged(f"{e}, step {index}{first_bad(e)}") from e
    for name, value in logged.items():
        if not torch.isfinite(value).all():
            raise Diverged(f"{name} is {value.item():.3g} at step {index}")
    return logged


def first_bad(error: BaseException) -> str:
    """The first local variable of `train_step`, in the order of its code, that is not finite."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_name != "train_step":
            continue
        for name, value in frame.f_locals.items():
            entries = value.items() if isinstance(value, dict) else [("", value)]
            for key, entry in entries:
                if is_bad(entry):
                    return f", first in `{key or name}`"
    return ""


def is_bad(value: object) -> bool:
    """Whether it is a tensor of floats that are not all finite."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return False
    return not bool(value.isfinite().all())
