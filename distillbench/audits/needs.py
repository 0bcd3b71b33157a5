"""What questions need: cells, experiments, and the stamps that Snakemake makes of them."""

from __future__ import annotations

from distillbench import config
from distillbench.audits.experiments import Experiment
from distillbench.audits.questions import Question
from distillbench.cells.cell import Cell
from distillbench.cells.jobs import Job, start_arms
from distillbench.registry import folders, resources
from distillbench.registry.folders import Arm


def jobs(asked: list[Question], seeds: list[int]) -> list[Job]:
    """Teachers, a job each, then every arm once, on as many seeds as any question takes of it."""
    arms: dict[str, Arm] = {}
    wanted: dict[tuple[str, str], int] = {}  # (benchmark, arm) -> seeds
    for q in asked:
        if q.trial is None or q.claim.experiment:
            continue
        assert q.benchmark is not None
        for name in q.claim.arms:
            arm = folders.arm(name).at(q.trial.share)
            for needed in (*start_arms([arm]), arm):
                place = (q.benchmark, needed.name)
                arms[needed.name] = needed
                wanted[place] = max(q.trial.seeds, wanted.get(place, 0))
    out = []
    for benchmark in dict.fromkeys(name for name, _ in wanted):
        b = config.benchmark(benchmark)
        most = max(count for (name, _), count in wanted.items() if name == benchmark)
        out += [Job((Cell(b, None, seed),)) for seed in seeds[:most]]
    for (benchmark, name), count in wanted.items():
        b = config.benchmark(benchmark)
        size = resources.of(benchmark, name).seeds or count
        cells = [Cell(b, arms[name], seed) for seed in seeds[:count]]
        out += [Job(tuple(cells[i : i + size])) for i in range(0, count, size)]
    return out


def experiments_of(asked: list[Question], seeds: list[int]) -> list[Experiment]:
    """Every experiment once, on as many seeds as any question takes of it."""
    wanted: dict[str, int] = {}
    for q in asked:
        if q.trial is not None and q.claim.experiment:
            wanted[q.claim.experiment] = max(q.trial.seeds, wanted.get(q.claim.experiment, 0))
    return [Experiment(name, tuple(seeds[:count])) for name, count in sorted(wanted.items())]


def stamps(every: list[Question], asked: list[Question], seeds: list[int]) -> list[str]:
    """Stamps of those jobs and experiments of a whole audit that some of its questions need."""
    wanted = {(job.benchmark, job.arm) for job in jobs(asked, seeds)}
    found = [
        job.stamp("evaluated") for job in jobs(every, seeds) if (job.benchmark, job.arm) in wanted
    ]
    names = {experiment.name for experiment in experiments_of(asked, seeds)}
    for experiment in experiments_of(every, seeds):
        if experiment.name in names:
            found.append(experiment.stamp)
    return found
