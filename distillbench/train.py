"""Training and sampling of one cell: meter a cycle, buy steps with the budget, loop, resume, sample, judge failures."""

from __future__ import annotations

import json
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from torch import Tensor

from distillbench import data as data_sets
from distillbench import registry
from distillbench.cell import Cell, provenance, write_atomically, write_json
from distillbench.checkpoint import load_progress, read_tensors, save_progress, write_tensors
from distillbench.errors import UserError, nearest
from distillbench.meter import Meter, peak_memory_mb
from distillbench.method import Batch, Condition, Method, Needs, Step, Task
from distillbench.networks import VelocityNetwork
from distillbench.seeds import Rng, derive
from distillbench.teachers import MixtureVelocity, Teacher, TeacherConfig, TeacherTraining, make_pairs

Progress = Callable[[str, int, int], None]  # (what, done, total)
CHECKPOINTS = 20  # per run
REFERENCE = "reference"  # the teacher's own set of samples, from a noise stream of its own


class Diverged(Exception):
    """A logged scalar or a sample is not finite."""


class OverBudget(Exception):
    """The budget does not buy one cycle."""


class TimedOut(BaseException):
    """The cell's time is up (raised by a timer, so that no `except Exception` of a method swallows it)."""


@dataclass
class Run:
    """A cell built and ready: what the loop and the sampler work on."""

    cell: Cell
    data: data_sets.Images | data_sets.Mixture
    method: Method
    needs: Needs
    task: Task
    meter: Meter
    device: torch.device
    pairs: dict[str, Tensor] | None = None


def weights_file(cell: Cell) -> str:
    return "teacher.safetensors" if cell.arm is None else "student.safetensors"


def build(cell: Cell, meter: Meter | None = None) -> Run:
    """Data, teacher, task and method of a cell, freshly initialised."""
    meter = meter or Meter()
    b = cell.benchmark
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = data_sets.load(b.data)
    if cell.arm is None:
        cls: type[Method] = TeacherTraining
        config: Any = TeacherConfig(**b.teacher.model_dump(), guidance=b.guidance)
    else:
        cls = registry.load(cell.arm.folder)
        config = registry.configuration(cell.arm, b, cls)
    needs = cls.needs(config)
    exact = MixtureVelocity(data).to(device) if isinstance(data, data_sets.Mixture) else None
    weights: VelocityNetwork | None = None
    teacher: Teacher | None = None
    if needs.teacher:
        weights = VelocityNetwork(data.shape, data.classes, **b.network.model_dump()).to(device)
        weights.load_state_dict(read_tensors(cell.teacher.folder / "teacher.safetensors", device)[0])
    # Withheld unless needed; the teacher's own training is told the exact velocity where there is one.
    network = (exact or weights) if needs.teacher or cell.arm is None else None
    if network is not None:
        teacher = Teacher(network, data.classes)
        # A closed form costs nothing, but stands for a network: it is charged as one.
        stands_for = VelocityNetwork(data.shape, data.classes, **b.network.model_dump())
        meter.watch(network, lambda: "teacher", row_flops(stands_for) if exact is not None else 0)
    task = Task(data.shape, data.classes, b.network.model_dump(), teacher, weights, cell.seed, device, meter)
    torch.manual_seed(derive(cell.seed, "build"))
    method = cls(task, config)
    return Run(cell, data, method, needs, task, meter, device)


def row_flops(network: VelocityNetwork) -> int:
    """FLOPs of one evaluation of one row."""
    meter, one = Meter(), torch.zeros(1)
    with meter.measured(), torch.no_grad():
        network(torch.zeros(1, *network.shape), one, one.long() if network.classes else None)
    return meter.flops


def own_rows(batch: int) -> int:
    """This rank's share of a global batch."""
    world = dist.get_world_size() if dist.is_initialized() else 1
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
    torch.manual_seed(derive(run.cell.seed, "global", index))  # so that an author's randn_like resumes too
    logged = run.method.train_step(batch_of(run, step), step)
    for name, value in logged.items():
        if not torch.isfinite(value).all():
            raise Diverged(f"{name} is {value.item():.3g} at step {index}")
    return logged


def price(cell: Cell, progress: Progress) -> tuple[dict[str, Any], dict[str, Tensor] | None]:
    """Meter set-up and one cycle on a throw-away copy; returns the plan (steps the budget buys) and the pairs."""
    meter, pairs = Meter(), None
    with meter.measured():  # whatever a method computes in its constructor counts
        run = build(cell, meter)
    if (wanted := run.needs.pairs) is not None:
        progress("regression pairs", 0, wanted.count)
        with run.meter.measured():
            pairs = make_pairs(
                run.task.teacher, wanted, run.data.shape, run.data.classes, cell.benchmark.guidance,
                Rng(cell.seed, "pairs", device=run.device),
            )  # fmt: skip
    run.pairs = pairs
    setup_flops, setup_rows = run.meter.flops, dict(run.meter.rows)
    run.meter.calls.clear()
    run.meter.rows.clear()
    with run.meter.measured():
        for i in range(run.needs.cycle):
            one_step(run, i, run.needs.cycle)
    cycle_flops = run.meter.flops - setup_flops
    if cycle_flops == 0:
        raise ValueError("train_step computed nothing that the meter counts")
    limit: float | None = None
    if cell.arm is None:
        steps = cell.benchmark.teacher.updates
    else:
        limit = cell.benchmark.budget.flops
        if cell.arm.attribute("group") == "from_scratch":  # its budget is that of teacher plus distillation
            teacher = cell.teacher.result()
            assert teacher is not None
            limit += teacher["cost"]["flops"]
        cycles = int((limit - setup_flops) // cycle_flops)
        if cycles < 1:
            raise OverBudget(f"one cycle costs {cycle_flops:.3g} FLOPs after {setup_flops:.3g} of set-up, budget {limit:.3g}")
        steps = cycles * run.needs.cycle
    share = steps / run.needs.cycle  # a teacher's updates need not be whole cycles
    return {
        "steps": steps,
        "limit_flops": limit,
        "flops": int(setup_flops + share * cycle_flops),
        "setup_flops": setup_flops,
        "calls_per_cycle": dict(sorted(run.meter.calls.items())),
        "rows": {
            role: int(setup_rows.get(role, 0) + share * run.meter.rows.get(role, 0))
            for role in sorted({*setup_rows, *run.meter.rows})
            if not role.endswith(".backward")
        },
        "updates": {name: int(player.updates * share) for name, player in run.task.players.items()},
        "images": int(steps * run.needs.batch),
    }, pairs  # fmt: skip


def train(run: Run, plan: dict[str, Any], progress: Progress) -> None:
    """The loop: resumes from the checkpoint if there is one, and equals an uninterrupted run bit for bit."""
    cell, steps = run.cell, plan["steps"]
    for name, player in run.task.players.items():
        player.total_updates = plan["updates"][name]
    checkpoint, log = cell.folder / "checkpoint.safetensors", cell.folder / "train.jsonl"
    start = 0
    if checkpoint.is_file():
        start = load_progress(checkpoint, cell.key, run.task.players, run.method, run.device)
    lines = log.read_text().splitlines() if start and log.is_file() else []
    lines = [line for line in lines if json.loads(line)["step"] < start]
    every, save_every = max(1, steps // 200), max(1, steps // CHECKPOINTS)
    for i in range(start, steps):
        logged = one_step(run, i, steps)
        if i % every == 0:
            lines.append(json.dumps({"step": i, **{k: float(f"{v.item():.6g}") for k, v in logged.items()}}))
            progress("training", i, steps)
        if (i + 1) % save_every == 0 and i + 1 < steps:
            write_atomically(log, ("\n".join(lines) + "\n").encode())
            save_progress(checkpoint, cell.key, i + 1, run.task.players, run.method.state_dict())
    progress("training", steps, steps)
    write_atomically(log, ("\n".join(lines) + "\n").encode())
    save_progress(checkpoint, cell.key, steps, run.task.players, run.method.state_dict())


def saved_player(run: Run) -> Any:
    """The player whose average is the result."""
    return run.task.players["teacher" if run.cell.arm is None else "student"]


@torch.no_grad()
def sample(run: Run, nfe: int, count: int, progress: Progress, name: str = "evaluation") -> Tensor:
    """[count, *shape] samples at `nfe` from the noise that every method of this seed gets, in class-balanced order.

    uint8 for images, float32 for mixtures. Raises ValueError on a wrong shape or a sampler that does not use exactly
    `nfe` evaluations, Diverged on values that are not finite, UserError on an NFE the method does not declare.
    """
    if nfe not in run.needs.nfe:
        raise UserError(f"{run.cell.arm_name}: nfe {nfe} is not supported, {nearest(str(nfe), map(str, run.needs.nfe))}")
    shape, classes, b = run.data.shape, run.data.classes, run.cell.benchmark
    rng, noise_rng = Rng(run.cell.seed, name, "method", nfe, device=run.device), Rng(run.cell.seed, name, "noise")
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
        progress(f"sampling nfe {nfe}", i + len(part), count)
    return torch.cat(parts)


def restore(cell: Cell) -> Run:
    """A finished cell with its saved weights, ready to sample."""
    run = build(cell)
    state, _ = read_tensors(cell.folder / weights_file(cell), run.device)
    saved_player(run).averaged().load_state_dict(state)
    return run


def run_cell(cell: Cell, progress: Progress) -> dict[str, Any]:
    """Train and sample a cell and write its record; what the method does wrong becomes the record's status."""
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
        torch.set_flush_denormal(True)
    started, plan = time.monotonic(), None
    record: dict[str, Any] = describe(cell)
    try:
        with time_limit(cell.benchmark.timeout_s):
            plan, pairs = price(cell, progress)
            frozen = {"cell": cell.label, "key": cell.key, "plan": plan, "recipe": cell.recipe}
            write_atomically(cell.folder / "config.yaml", yaml.safe_dump(frozen, sort_keys=False).encode())
            run = build(cell)
            run.pairs = pairs
            train(run, plan, progress)
            network = saved_player(run).averaged()
            write_tensors(cell.folder / weights_file(cell), network.state_dict(), key=cell.key)
            count = cell.benchmark.sampling.count
            samples = {f"nfe{n}": sample(run, n, count, progress) for n in run.needs.nfe}
            if cell.arm is None:  # what `FID to teacher` compares with: independent of the noise that students get
                samples[REFERENCE] = sample(run, run.needs.headline_nfe, count, progress, name=REFERENCE)
            write_tensors(cell.folder / "samples.safetensors", samples, key=cell.key)
            record |= {
                "nfe": list(run.needs.nfe),
                "headline_nfe": run.needs.headline_nfe,
                "params": sum(p.numel() for p in network.parameters()),
            }
    except (UserError, KeyboardInterrupt):
        raise
    except TimedOut:
        record |= {"status": "timeout", "reason": f"more than {cell.benchmark.timeout_s:g} s"}
    except OverBudget as e:
        record |= {"status": "over_budget", "reason": str(e)}
    except (Diverged, FloatingPointError) as e:
        record |= {"status": "diverged", "reason": str(e)}
    except (torch.OutOfMemoryError, MemoryError) as e:
        record |= {"status": "oom", "reason": one_line(e)}
    except (Exception, SystemExit) as e:  # a method may raise anything; that costs its own row and nothing else
        record |= {"status": "failed", "reason": one_line(e)}
        write_atomically(cell.folder / "traceback.txt", traceback.format_exc().encode())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cost = {"seconds": round(time.monotonic() - started, 1), "peak_memory_mb": round(peak_memory_mb(device))}
    record["cost"] = (plan or {}) | cost
    record["provenance"] = provenance(cell)
    write_json(cell.record, record)
    return record


def describe(cell: Cell) -> dict[str, Any]:
    """What is known of a cell before it runs; labels such as its fidelity are not facts of the run (`Arm.labels`)."""
    arm = cell.arm
    return {
        "format": 1,
        "benchmark": cell.benchmark.name,
        "method": cell.arm_name.partition("@")[0],
        "variant": arm.variant if arm else None,
        "seed": cell.seed,
        "key": cell.key,
        "status": "done",
        "reason": None,
        "group": arm.attribute("group") if arm else "teacher",
        "division": "closed",  # the harness enforces teacher, data, budget and evaluator; nothing can be open yet
        "params": None,
        "nfe": [],
        "headline_nfe": None,
    }


def one_line(error: BaseException) -> str:
    """Type, message and the innermost line of code, for a table's row."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:200] + f" ({Path(last.filename).name}:{last.lineno})"


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimedOut in this block after `seconds`."""

    def ring(_signal: int, _frame: Any) -> None:
        raise TimedOut

    previous = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
