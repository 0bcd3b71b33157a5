"""How far the cells of a table are and what is left to pay: the words of `distillbench status` and
`plan`. Imports no torch."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable
from statistics import mean

from rich.console import Group
from rich.table import Column, Table
from rich.text import Text

from distillbench import config
from distillbench.cells.cell import Cell
from distillbench.cells.jobs import Job
from distillbench.cells.provenance import hardware
from distillbench.cluster import control
from distillbench.cluster.control import JobState
from distillbench.registry import resources
from distillbench.registry.resources import Resources
from distillbench.tables.states import COLOURS, State, duration, state_of

IsEvaluated = Callable[[Cell], bool]
CellStates = list[tuple[Cell, State]]


def states_of(jobs: list[Job], evaluated: IsEvaluated) -> CellStates:
    """The cells of jobs in their order, each with its state."""
    places = control.job_states(jobs)
    states = []
    for job in jobs:
        for cell in job.cells:
            states.append((cell, state_of(cell, evaluated, places.get(cell.key))))
    return states


def matrix(jobs: list[Job], evaluated: IsEvaluated) -> Group:
    """Rows benchmark/arm, columns seeds, and lines that sum it up."""
    states = states_of(jobs, evaluated)
    rows: dict[str, dict[int, State]] = defaultdict(dict)
    lost = set()
    for cell, state in states:
        name = f"{cell.benchmark.name}/{cell.arm_name}"
        rows[name][cell.seed] = state
        if state.word == "lost":
            lost.add(f"lost: {name}: {state.why}")
    seeds = sorted({cell.seed for cell, _ in states})
    columns = [f"seed {seed}" for seed in seeds]
    table = Table(Column("", overflow="fold"), *columns, box=None)
    for name, row in rows.items():
        table.add_row(name, *(row[seed].text if seed in row else "" for seed in seeds))
    lines = [*sorted(lost), summary(states)]
    price = spent(jobs, states)
    if price:
        lines.append(price)
    return Group(table, *map(Text, lines))


def details(jobs: list[Job], evaluated: IsEvaluated) -> list[str]:
    """A line for each cell: state, reason, pace, seconds, where its job is, folder."""
    places = control.job_states(jobs)
    lines = []
    for job in jobs:
        for cell in job.cells:
            lines.append(_details_of(cell, evaluated, places.get(cell.key) or JobState()))
    return lines


def _details_of(cell: Cell, evaluated: IsEvaluated, place: JobState) -> str:
    result = cell.result()
    state = state_of(cell, evaluated, place)
    line = f"{cell.label}: {state}"
    if result is not None and result.get("reason"):
        line += f": {result['reason']}"
    if state.why and state.word != "queued":
        line += f", {state.why}"
    if state.pace:
        line += f", {state.pace:.3g} steps/s"
    if result is not None:
        line += f", {result['cost']['seconds']:g} s"
    if place.queued:
        line += f", job {place.queued.id}"
    return f"{line}  {cell.folder.relative_to(config.root())}"


def spent(jobs: list[Job], states: CellStates) -> str:
    """GPU-hours of the cells that ended, and about how many are left; '' where none asks for a
    GPU."""
    per_second = {}  # GPU-hours, by the key of a cell
    for job in jobs:
        for cell in job.cells:
            per_second[cell.key], _ = control.hours(job, 1.0)
    if not any(per_second.values()):
        return ""
    done = 0.0
    waiting = []
    for cell, _ in states:
        result = cell.result()
        if result is None:
            waiting.append(cell)
        else:
            done += per_second[cell.key] * result["cost"]["seconds"]
    left = 0.0
    known = True
    for cell, seconds in zip(waiting, seconds_left(states)):
        if seconds is None:
            known = False
        else:
            left += seconds * per_second[cell.key]
    return f"GPU-hours: {done:.3g} spent, {f'about {left:.3g}' if known else 'unknown'} left"


def forecast(jobs: list[Job], trained: Callable[[Cell], bool], profile: str | None) -> list[str]:
    """What is not trained yet, a line for each job: cells and budget.

    profile: of a cluster, where lines also say what is asked of it, the last one in all.
    """
    lines = []
    gpu_hours = 0.0
    core_hours = 0.0
    for job in jobs:
        missing = [cell for cell in job.cells if not trained(cell)]
        if not missing:
            continue
        line = f"{job.benchmark}/{job.arm}: seeds {', '.join(str(cell.seed) for cell in missing)}"
        line += f", {_cost(missing[0])} each"
        if profile:
            asked = resources.of(job.benchmark, job.arm)
            line += f"; a job of {_size(asked)}"
            gpu, core = control.hours(job, 60 * asked.minutes)
            gpu_hours += gpu
            core_hours += core
        lines.append(line)
    if profile and lines:
        site = {}
        for key, value in resources.site(profile).model_dump(exclude={"benchmarks"}).items():
            if value:
                site[key] = value
        lines.append(
            f"{len(lines)} jobs for training, one more each for evaluating; training takes at most "
            f"{gpu_hours:.3g} GPU-hours and {core_hours:.3g} core-hours if no job reaches its time "
            f"limit; sbatch: {site or 'defaults of the cluster'}"
        )
    return lines


def _cost(cell: Cell) -> str:
    if cell.arm is None:
        return f"{cell.benchmark.teacher.updates} updates"
    return f"{cell.own_budget / 1e12:g} TFLOP"


def _size(r: Resources) -> str:
    nodes = f"{r.nodes} node{'s' if r.nodes > 1 else ''}"
    ranks = f"{r.ranks} rank{'s' if r.ranks > 1 else ''}"
    return f"{nodes} x {ranks}, {r.gpus} GPUs, {r.cpus} CPUs, {r.memory_gb:g} GB, {r.minutes} min"


def partial(name: str, jobs: list[Job], evaluated: IsEvaluated) -> str:
    """results/<name>.partial.md: which cells keep a table from being rendered, and why."""
    states = states_of(jobs, evaluated)
    missing = []
    for cell, state in states:
        if state.word in COLOURS and state.word != "done":
            missing.append(f"| {cell.label} | {state} | {state.why or '–'} |")
    ended = f"{len(states) - len(missing)} of {len(states)} cells have ended."
    lines = [
        f"# {name}: not complete",
        "",
        f"{ended} The same command continues.",
        "",
        "| cell | state | why |",
        "|---|---|---|",
        *missing,
    ]
    return "\n".join(lines) + "\n"


def summary(states: CellStates) -> str:
    """n of m cells done, how many only trained or failed, and about how long the rest takes."""
    ended = [state.word for cell, state in states if cell.result() is not None]
    done = ended.count("done")
    trained = ended.count("trained")
    failed = len(ended) - done - trained
    text = f"{done} of {len(states)} cells done"
    if trained:
        text += f", {trained} trained but not evaluated"
    if failed:
        text += f", {failed} failed"
    rest = seconds_left(states)
    if not rest:
        return text
    known = [seconds for seconds in rest if seconds is not None]
    if len(known) < len(rest):
        return f"{text}, time left unknown until a first cell of each kind is done"
    cores = available_cores()
    left = max(sum(known) / cores, *known)  # a cell is trained by one core
    return f"{text}, about {duration(left)} left on {cores} cores"


def available_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def seconds_left(states: CellStates) -> list[float | None]:
    """Seconds of training left of every cell without a record, in their order.

    A cell's own estimate; or from what cells like it took on this machine: the arm's other seeds,
    or (per FLOP of the budget) other arms of its benchmark; None where none has been done.
    """
    by_arm: dict[tuple[str, str], list[float]] = defaultdict(list)
    per_flop: dict[str, list[float]] = defaultdict(list)
    for cell, _ in states:
        record = cell.result()
        if record is None or record["status"] != "done":
            continue
        if record["provenance"]["hardware"] != hardware():
            continue
        cost = record["cost"]
        by_arm[cell.benchmark.name, cell.arm_name].append(cost["seconds"])
        if cell.arm is not None:
            own_flops = cost["flops"] - cost.get("start", {}).get("flops", 0)
            per_flop[cell.benchmark.name].append(cost["seconds"] / own_flops)
    rest: list[float | None] = []
    for cell, state in states:
        if cell.result() is not None:
            continue
        benchmark = cell.benchmark.name
        same = by_arm.get((benchmark, cell.arm_name))
        if state.left is not None:
            rest.append(state.left)
        elif same:
            rest.append(mean(same) * (1 - state.share))
        elif cell.arm is not None and benchmark in per_flop:
            rest.append(mean(per_flop[benchmark]) * cell.own_budget * (1 - state.share))
        else:
            rest.append(None)
    return rest
