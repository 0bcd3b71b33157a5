"""Training and sampling of one cell: meter a cycle, buy steps with the budget, loop, resume, sample, judge failures."""

from __future__ import annotations

import copy
import errno
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
import yaml
from torch import Tensor

from distillbench import data as data_sets
from distillbench import features, watch
from distillbench.build import Run, build, saved_player, weights_file
from distillbench.cell import Cell, describe, remove_leftovers, remove_progress, write_atomically
from distillbench.checkpoint import load_progress, save_progress, write_tensors
from distillbench.errors import Diverged, OverBudget, Refused, UserError, nearest
from distillbench.journal import Journal
from distillbench.meter import Meter, peak_memory_mb
from distillbench.method import Batch, Condition, Step
from distillbench.seeds import Rng, derive, ranks
from distillbench.teachers import make_pairs
from distillbench.watch import Pulse

Progress = Callable[[str, int, int], None]  # (what, done, total)
CHECKPOINTS = 20  # per run, and
CHECKPOINT_SECONDS = 600.0  # after the last one, for a machine that may be taken away at any time
FEATURES_SHARE = 0.05  # of the budget, for training a discriminator's features without labels
REFERENCE = "reference"  # the teacher's own set of samples, from a noise stream of its own
RANK_SECONDS = 3.0  # that a rank waits for the first one's record of a failure that both had
# Errors of files and terminals, not of the code that meets them.
MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EPIPE, errno.EIO, errno.EROFS, errno.ESTALE)


Prepared = dict[str, dict[str, Tensor]]  # what set-up makes and is charged for: regression `pairs`, weights of the `features`


def own_rows(batch: int) -> int:
    """This rank's share of a global batch."""
    world = ranks()[1]
    if batch % world:
        raise ValueError(f"a batch of {batch} does not divide among {world} ranks")
    return batch // world


def batch_of(run: Run, step: Step) -> Batch:
    """The batch of a step: only what the method's needs name."""
    n, guidance, data = own_rows(run.needs.batch), run.cell.benchmark.guidance, run.data
    x = pairs = None
    if run.needs.data:
        x, labels = data.draw(step.rng("data"), n)
        x, labels = x.to(run.device), None if labels is None else labels.to(run.device)
    else:
        labels = step.rng("labels").integers(n, data.classes) if data.classes else None
    if run.pairs is not None:
        assert run.needs.pairs is not None
        index = step.rng("pairs").integers(own_rows(run.needs.pairs.batch), len(run.pairs["z"]))
        own = run.pairs["labels"][index] if "labels" in run.pairs else None
        pairs = run.pairs["z"][index], run.pairs["y"][index], Condition(own, guidance)
    return Batch(n, Condition(labels, guidance), x, pairs)


def one_step(run: Run, index: int, total: int) -> dict[str, Tensor]:
    """Train step `index` with all its randomness derived from (seed, index); raises Diverged on a scalar that is not finite."""
    step = Step(index, total, run.cell.seed, run.device)
    own = ranks()[:1] if ranks()[0] else ()  # rank 0 draws what one rank alone would
    torch.manual_seed(derive(run.cell.seed, "global", index, *own))  # so that an author's randn_like resumes too
    try:
        logged = run.method.train_step(batch_of(run, step), step)
    except Diverged as e:  # by a player: the step, and what was the first to go wrong in it
        raise Diverged(f"{e}, step {index}{first_bad(e)}") from e
    for name, value in logged.items():
        if not torch.isfinite(value).all():
            raise Diverged(f"{name} is {value.item():.3g} at step {index}")
    return logged


def first_bad(error: BaseException) -> str:
    """The first local variable of `train_step`, in the order of its code, that is not finite."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_name == "train_step":
            for name, value in frame.f_locals.items():
                for key, one in value.items() if isinstance(value, dict) else [("", value)]:
                    if isinstance(one, Tensor) and one.is_floating_point() and not one.isfinite().all():
                        return f", first in `{key or name}`"
    return ""


def prepare(run: Run, progress: Progress, pulse: Pulse) -> Prepared:
    """Regression pairs and trained features, as the needs say; metered, since a method pays for what it asks for."""
    cell, made = run.cell, Prepared()
    if (wanted := run.needs.pairs) is not None:
        progress("regression pairs", 0, wanted.count)
        with run.meter.measured(), pulse.patience():
            made["pairs"] = make_pairs(
                run.task.teacher, wanted, run.data.shape, run.data.classes, cell.benchmark.guidance,
                Rng(cell.seed, "pairs", device=run.device),
            )  # fmt: skip
    if run.needs.features == "self_supervised" and isinstance(run.data, data_sets.Images):  # else it stays random
        progress("features", 0, 1)
        network, data = run.task.features, run.data
        assert network is not None

        def pretrain(network: torch.nn.Module, updates: int) -> None:
            torch.manual_seed(derive(cell.seed, "pretrain"))
            features.pretrain(network, data, Rng(cell.seed, "pretrain", device=run.device), run.device, updates)

        with pulse.patience():
            with (one := Meter()).measured():
                pretrain(copy.deepcopy(network), 1)
            with run.meter.measured():
                pretrain(network, int(FEATURES_SHARE * cell.budget // one.flops))
        made["features"] = network.state_dict()
    return made


def furnish(run: Run, made: Prepared) -> Run:
    """A built run with what `prepare` made."""
    run.pairs = made.get("pairs")
    if "features" in made:
        assert run.task.features is not None
        run.task.features.load_state_dict(made["features"])
    return run


def price(cell: Cell, progress: Progress, pulse: Pulse | None = None) -> tuple[dict[str, Any], Prepared]:
    """Meter set-up and one cycle on a throw-away copy; returns the plan (steps the budget buys) and what set-up made."""
    pulse, meter = pulse or Pulse(), Meter()
    with meter.measured():  # whatever a method computes in its constructor counts
        run = build(cell, meter)
    made = prepare(run, progress, pulse)
    furnish(run, made)
    metered, setup_rows = run.meter.flops, dict(run.meter.rows)
    start = None if cell.start is None else cell.start.result()
    spent = {key: start["cost"][key] for key in ("flops", "seconds")} if start else {}
    setup_flops = metered + spent.get("flops", 0)
    run.meter.calls.clear()
    run.meter.rows.clear()
    with run.meter.measured():
        for i in range(run.needs.cycle):
            one_step(run, i, run.needs.cycle)
            pulse.beat(watch.SETUP, i + 1)
    world = ranks()[1]  # each trains its share of a batch; set-up, which each repeats, is charged once
    cycle_flops = (run.meter.flops - metered) * world
    if cycle_flops == 0:
        raise ValueError("train_step computed nothing that the meter counts")
    limit: float | None = None
    if cell.arm is None:
        steps = cell.benchmark.teacher.updates
    else:
        limit = cell.budget
        if cell.arm.attribute("group") == "from_scratch":  # its budget is that of teacher plus distillation
            teacher = cell.teacher.result()
            assert teacher is not None
            limit += teacher["cost"]["flops"]
        cycles = int((limit - setup_flops) // cycle_flops)
        if cycles < 1:
            raise OverBudget(f"one cycle costs {cycle_flops:.3g} FLOPs after {setup_flops:.3g} of set-up and start, budget {limit:.3g}")
        steps = cycles * run.needs.cycle
    share = steps / run.needs.cycle  # a teacher's updates need not be whole cycles
    return {
        "steps": steps,
        "limit_flops": limit,
        "flops": int(setup_flops + share * cycle_flops),
        "setup_flops": setup_flops,  # with all that its start has cost
        **({"start": spent} if spent else {}),
        "calls_per_cycle": dict(sorted(run.meter.calls.items())),
        "rows": {
            role: int(setup_rows.get(role, 0) + share * world * run.meter.rows.get(role, 0))
            for role in sorted({*setup_rows, *run.meter.rows})
            if not role.endswith(".backward")
        },
        "updates": {name: int(player.updates * share) for name, player in run.task.players.items()},
        "images": int(steps * run.needs.batch),
    }, made  # fmt: skip


def train(run: Run, plan: dict[str, Any], progress: Progress, pulse: Pulse | None = None) -> None:
    """The loop: resumes from the checkpoint if there is one, and equals an uninterrupted run bit for bit.

    Asked to leave (`Pulse.leaving`), it saves what it has after the step it is at and raises KeyboardInterrupt. Rank 0 alone saves.
    """
    pulse, cell, steps, first = pulse or Pulse(), run.cell, plan["steps"], ranks()[0] == 0
    for name, player in run.task.players.items():
        player.total_updates = plan["updates"][name]
    journal, players = Journal(cell.folder), run.task.players
    start, pulse.earlier = load_progress(cell.folder, cell.key, players, run.method, run.device)
    if first:
        journal.start(start, steps)
    pulse.begin(start)
    every, save_every, saved = max(1, steps // 200), max(1, steps // CHECKPOINTS), time.monotonic()
    for i in range(start, steps):
        logged = one_step(run, i, steps)
        pulse.beat(watch.TRAINING, i + 1)
        if not first:
            continue
        if i % every == 0:
            journal.add(step=i, **{k: float(f"{v.item():.6g}") for k, v in logged.items()})
            progress("training", i, steps)
        late = time.monotonic() - saved > CHECKPOINT_SECONDS
        if (i + 1) % save_every == 0 or i + 1 == steps or late or pulse.leaving:
            with pulse.patience():
                save_progress(cell.folder, cell.key, i + 1, pulse.seconds(), players, run.method.state_dict())
            journal.add(checkpoint=i + 1)
            saved = time.monotonic()
        if pulse.leaving:
            raise KeyboardInterrupt
    progress("training", steps, steps)


@torch.no_grad()
def sample(run: Run, nfe: int, count: int, progress: Progress, name: str = "evaluation", pulse: Pulse | None = None) -> Tensor:
    """[count, *shape] samples at `nfe` from the noise that every method of this seed gets, in class-balanced order.

    uint8 for images, float32 for mixtures. Raises ValueError on a wrong shape or a sampler that does not use exactly
    `nfe` evaluations, Diverged on values that are not finite, UserError on an NFE the method does not declare.
    """
    if nfe not in run.needs.nfe:
        raise UserError(f"{run.cell.arm_name}: nfe {nfe} is not supported, {nearest(str(nfe), map(str, run.needs.nfe))}")
    shape, classes, b = run.data.shape, run.data.classes, run.cell.benchmark
    rng, noise_rng = Rng(run.cell.seed, name, "method", nfe, device=run.device), Rng(run.cell.seed, name, "noise")
    if pulse is not None:
        pulse.beat(watch.SAMPLING, 0)
    noise, parts = noise_rng.normal(count, *shape), []
    for i in range(0, count, b.sampling.batch):
        part = noise[i : i + b.sampling.batch].to(run.device)
        labels = (torch.arange(i, i + len(part), device=run.device) % classes) if classes else None
        run.meter.rows.clear()
        with run.meter.counting():
            x = run.method.sample(part, Condition(labels, b.guidance), nfe, rng)
        used = sum(run.meter.rows.values()) / len(part)  # a doubled batch is two evaluations
        if not isinstance(x, Tensor) or x.shape != part.shape:
            raise ValueError(f"sample returned {getattr(x, 'shape', type(x))}, expected {tuple(part.shape)}")
        if used != nfe:
            raise ValueError(f"sample made {used:g} network evaluations at nfe={nfe}")
        if not torch.isfinite(x).all():
            raise Diverged(f"samples at nfe={nfe} are not finite")
        parts.append(data_sets.to_bytes(x).cpu() if isinstance(run.data, data_sets.Images) else x.cpu())
        if pulse is not None:
            pulse.beat(watch.SAMPLING, i // b.sampling.batch + 1)
        progress(f"sampling nfe {nfe}", i + len(part), count)
    return torch.cat(parts)


def run_cell(cell: Cell, progress: Progress, pulse: Pulse | None = None) -> dict[str, Any]:
    """Train and sample a cell and write its record; what the method does wrong becomes the record's status.

    Of several ranks the first samples and writes. Another one that fails writes the record in its place and raises UserError.
    """
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
        torch.set_flush_denormal(True)
        watch.limit_memory()
    pulse, plan = pulse or Pulse(), None
    pulse.started = time.monotonic()
    rank, record = ranks()[0], describe(cell)
    if rank == 0:
        remove_leftovers(cell.folder)
    try:
        with pulse.limits():
            for one in cell.needed:
                if (other := one.result()) is not None and other["status"] != "done":
                    what = "teacher" if one.arm is None else f"start {one.arm_name}"
                    raise Refused(f"its {what} ended as {other['status']}: {other['reason']}")
            plan, made = price(cell, progress, pulse)
            frozen = {"cell": cell.label, "key": cell.key, "plan": plan, "recipe": cell.recipe}
            if rank == 0:
                write_atomically(cell.folder / "config.yaml", yaml.safe_dump(frozen, sort_keys=False).encode())
            run = furnish(build(cell), made)
            train(run, plan, progress, pulse)
            if rank:
                return record
            network, count = saved_player(run).averaged(), cell.benchmark.sampling.count
            samples = {f"nfe{n}": sample(run, n, count, progress, pulse=pulse) for n in run.needs.nfe}
            if cell.arm is None:  # what `FID to teacher` compares with: independent of the noise that students get
                samples[REFERENCE] = sample(run, run.needs.headline_nfe, count, progress, REFERENCE, pulse)
        write_tensors(cell.folder / weights_file(cell), network.state_dict(), key=cell.key)
        write_tensors(cell.folder / "samples.safetensors", samples, key=cell.key)
        record |= {
            "nfe": list(run.needs.nfe),
            "headline_nfe": run.needs.headline_nfe,
            "params": sum(p.numel() for p in network.parameters()),
        }
    except BaseException as e:  # a method may raise anything; that costs its own row and nothing else
        record["status"], record["reason"] = judged(e, cell, pulse)
        if rank == 0 and record["status"] in ("failed", "oom"):
            write_atomically(cell.folder / "traceback.txt", traceback.format_exc().encode())
    if rank:
        time.sleep(RANK_SECONDS)
        if cell.result() is None:  # the first rank has not failed, and would wait for this one
            watch.finish(cell, record, plan, pulse.seconds(), None)
        raise UserError(f"{cell.label}: rank {rank} ended: {record['status']}: {record['reason']}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    watch.finish(cell, record, plan, pulse.seconds(), peak_memory_mb(device))
    if record["status"] == "done":
        remove_progress(cell.folder)
    return record


def judged(error: BaseException, cell: Cell, pulse: Pulse) -> tuple[str, str]:
    """Status and reason of a cell that ended with `error`; raises where the user or the machine ended it, not the method."""
    if isinstance(error, UserError):
        raise error
    if pulse.interrupted or pulse.leaving:  # whatever the method made of it; a KeyboardInterrupt of its own is a failure
        raise KeyboardInterrupt from None
    if any("torch/distributed/" in frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)):
        raise UserError(f"{cell.label}: lost another rank ({one_line(error, cell)}); the same command continues") from None
    if isinstance(error, OSError) and error.errno in MACHINE:
        raise UserError(f"{cell.label}: {one_line(error, cell)}: mend the disk or terminal, then rerun") from None
    if isinstance(error, (watch.TimedOut, watch.Hung)):
        verdict = watch.TIMED_OUT if isinstance(error, watch.TimedOut) else watch.HUNG
        return watch.reason_of(verdict, cell, pulse, watch.line_of(error, cell))
    for kind, status in ((OverBudget, "over_budget"), (Refused, "refused"), (Diverged, "diverged"), (FloatingPointError, "diverged")):
        if isinstance(error, kind):
            return status, " ".join(str(error).split())
    oom = isinstance(error, torch.OutOfMemoryError) or watch.is_out_of_memory(error)
    return "oom" if oom else "failed", one_line(error, cell)


def one_line(error: BaseException, cell: Cell) -> str:
    """Type, message and the innermost line of the method's code, for a table's row."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200] + f" ({watch.line_of(error, cell)})"
