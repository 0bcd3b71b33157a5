"""`distillbench check`: does a method keep the contract?

On the CPU in less than a minute, on tiny benchmarks of its own. Every check notes broken promises,
one line each: where, what was expected, what was seen. Training runs are real: the same `build`,
`price`, `one_step`, checkpoints and `sample` that a cell goes through.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distillbench import config, reading
from distillbench.audits import questions
from distillbench.audits.questions import KnownMetrics
from distillbench.cells.build import Run, build, restore
from distillbench.cells.cell import Cell
from distillbench.cells.checkpoint import load_progress, save_progress
from distillbench.cells.progress import Report
from distillbench.cells.pulse import Pulse
from distillbench.cells.sampling import sample
from distillbench.cells.setup import Plan, Prepared, attach, prepare, price
from distillbench.cells.steps import one_step
from distillbench.cells.train import in_one_line, run_cell
from distillbench.config import Benchmark
from distillbench.conformance.instruments import (
    FlopCounter,
    WatchedBatch,
    WatchingMeter,
    fingerprint,
    first_difference,
    global_state,
    opened_files,
    weights,
)
from distillbench.errors import Refused, UserError
from distillbench.method import Batch, Condition, Step
from distillbench.registry import folders, source
from distillbench.registry.folders import Arm, MethodFolder
from distillbench.seeds import Rng

# Benchmarks of workflows/benchmarks.
MIXTURE = "check-mixture"
DIGITS = "check-digits"
STEPS = 200  # of training
EARLY = 20  # steps after which a second run with the same seed is compared
COUNT = 1000  # samples whose distance to the teacher's is measured
FEW = 64  # samples at every NFE of every arm
# Share of the budget of an arm that this one starts from: its set-up and a few cycles.
START_SHARE = {MIXTURE: 0.03, DIGITS: 0.1}
# Tolerated share of forward FLOPs outside the networks that the harness knows, and of cost above
# the plan.
UNMETERED = 0.01
# The distance to the teacher's samples must fall to this share of itself, or be at most this many
# times that of two draws of them.
PROGRESS = 0.95
AT_FLOOR = 1.5
LARGEST = 30  # absolute value in samples of data whose size is about 1
OTHER_SEED = 12345  # of the global streams in a repeated run
LONGEST_SEEN = 300  # characters
SAME_COST = (
    "all cycles of needs.cycle steps to cost what the first does: "
    "it is what the budget is divided by"
)
SAME_SEED = "two runs with one seed to agree"
Distance = Callable[[Tensor, Tensor], float]


@dataclass(frozen=True)
class BrokenPromise:
    """What a method does against the contract: where, what was expected, what was seen."""

    where: str
    expected: str
    seen: str

    def __str__(self) -> str:
        return f"{self.where}: expected {self.expected}; saw {self.seen}"


class BriefCell(Cell):
    """A cell whose start gets next to none of the budget."""

    @cached_property
    def start(self) -> Cell | None:
        """The cell of its start with a share of START_SHARE."""
        start = super().start
        if start is None or start.arm is None:
            return None
        arm = replace(start.arm, share=START_SHARE[self.benchmark.name])
        return Cell(self.benchmark, arm, self.seed)


@dataclass(frozen=True)
class Course:
    """A cell's training in the check: what it is priced at, and its steps in whole cycles."""

    cell: Cell
    plan: Plan
    made: Prepared
    cycle: int
    total: int  # steps
    early: int  # steps after which a second run with the same seed is compared
    updates: dict[str, int]  # of each player in a cycle

    @property
    def middle(self) -> int:
        """Steps after which it is resumed, within a cycle: real checkpoints fall anywhere."""
        return self.total // 2 + self.cycle // 2

    @property
    def cycles(self) -> int:
        """Cycles of the check's training."""
        return self.total // self.cycle

    @property
    def cycle_flops(self) -> float:
        """FLOPs of a cycle by the plan."""
        bought = self.plan.steps // self.cycle
        return (self.plan.flops - self.plan.setup_flops) / bought


@dataclass
class Watched:
    """What was seen in a run of a course."""

    counter: FlopCounter
    logs: list[dict[str, Tensor]] = field(default_factory=list)  # of each step
    weights: dict[int, dict[str, Tensor]] = field(default_factory=dict)  # after so many steps
    read: set[str] = field(default_factory=set)  # fields of batches
    global_streams: bool = False  # whether a step drew from one


class Check:
    """One method under examination; `broken` collects what it does against the contract.

    distance: between two sets of samples [n, numbers]; metrics: names that a claim may use.
    """

    def __init__(
        self, folder: MethodFolder, distance: Distance, metrics: KnownMetrics, report: Report
    ):
        self.folder = folder
        self.report = report
        self.metrics = metrics
        self.broken: list[BrokenPromise] = []
        self.refused: dict[str, str] = {}  # by benchmark: why
        self._distance = distance
        root = config.root()
        inside = folder.path.is_relative_to(root)
        self.where = str(folder.path.relative_to(root) if inside else folder.path)
        self.code = f"{self.where}/method.py"

    def note(self, where: str, expected: str, seen: object) -> None:
        """Note a broken promise, once: variants mostly repeat what the method itself does."""
        words = " ".join(str(seen).split())[:LONGEST_SEEN]
        if all((b.expected, b.seen) != (expected, words) for b in self.broken):
            self.broken.append(BrokenPromise(where, expected, words))

    @contextmanager
    def no_file_opened(self, where: str) -> Iterator[None]:
        """A block of a method's code that must not open a file."""
        with opened_files() as paths:
            yield
        if paths:
            expected = "no file opened: data come in batch.x, if `needs` asks for them"
            self.note(where, expected, paths[0])

    # What stands in the files.

    def files(self) -> None:
        """Examine imports, the README's table of equations, and claims."""
        self.imports()
        self.equations()
        self.claims()

    def imports(self) -> None:
        """Examine what the method's files import."""
        siblings = set(folders.discover()) - {self.folder.name}
        for path in sorted(self.folder.path.rglob("*.py")):
            place = f"{self.where}/{path.relative_to(self.folder.path)}"
            for line, name, why in source.forbidden(path, siblings):
                self.note(f"{place}:{line}", f"no import of {name}", f"one ({why})")

    def equations(self) -> None:
        """Examine whether the README's equations name code that exists."""
        where = f"{self.where}/README.md"
        readme = self.folder.path / "README.md"
        if not readme.is_file() or not source.targets(readme):
            expected = "a table from equations to code, `method.py:function`"
            self.note(where, expected, "no such entry")
            return
        for target in source.unresolved(readme, config.root()):
            expected = "every entry of the equation table to exist"
            self.note(where, expected, f"`{target}`, which does not")

    def claims(self) -> None:
        """Examine whether claims and reported numbers name what exists."""
        where = f"{self.where}/claims.yaml"
        for index, claim in enumerate(self.folder.claims.claims):
            for expected, seen in questions.misfits(claim, self.metrics, self.exists):
                line = questions.line_of_claim(self.folder, index).rpartition(":")[2]
                self.note(f"{where}:{line}", expected, seen)
        for reported in self.folder.claims.reported:
            try:
                self.exists(reported.arm or self.folder.name)
            except UserError as e:
                expected = f"the number of {reported.where} to be beside an arm that exists"
                self.note(where, expected, e)

    def exists(self, name: str) -> None:
        """UserError unless this is an arm, of this method or another."""
        method, _, variant = name.partition("@")
        if method != self.folder.name or (variant and variant not in self.folder.file.variants):
            folders.arm(name)

    def settings(self) -> None:
        """Examine whether the settings of every arm fit on every benchmark."""
        with self.no_file_opened(self.code):
            method = folders.load(self.folder)
        for path in sorted((config.root() / "workflows/benchmarks").glob("*.yaml")):
            benchmark = reading.read(path, Benchmark)
            for variant in (None, *self.folder.file.variants):
                arm = Arm(self.folder, variant)
                try:
                    method.needs(folders.configuration(arm, benchmark, method))
                except Refused:
                    pass
                except (UserError, ValueError) as e:
                    of = f" of @{variant}" if variant else ""
                    self.note(f"{self.where}/config.yaml", f"settings{of} that fit", e)
                    return

    # What happens when it runs.

    def cell(self, benchmark: str, variant: str | None = None) -> Cell:
        """The method's cell on a benchmark of the check, with what it needs trained.

        That is a teacher, and hardly trained, what it starts from; UserError where that failed.
        """
        cell = BriefCell(config.benchmark(benchmark), Arm(self.folder, variant), 0)
        for needed in cell.needed:
            with needed.locked():
                record = needed.result() or run_cell(needed, self.report)
                if record["status"] != "done":
                    raise UserError(
                        f"{needed.arm_name}, which it needs, ended as {record['status']}: "
                        f"{record['reason']}"
                    )
        return cell

    def course(self, cell: Cell) -> Course:
        """The training of a cell in STEPS steps, rounded up to whole cycles."""
        plan, made = price(cell, self.report)
        cycle = build(cell).needs.cycle
        bought = plan.steps // cycle
        return Course(
            cell=cell,
            plan=plan,
            made=made,
            cycle=cycle,
            total=-(-STEPS // cycle) * cycle,
            early=-(-EARLY // cycle) * cycle,
            updates={name: count // bought for name, count in plan.updates.items()},
        )

    def started(self, course: Course) -> Run:
        """A fresh run of a course."""
        run = attach(build(course.cell, WatchingMeter()), course.made)
        for name, player in run.task.players.items():
            player.total_updates = max(1, course.updates[name] * course.total // run.needs.cycle)
        return run

    def distance(self, x: Tensor, y: Tensor, classes: int) -> float:
        """Mean over classes of the distance between samples whose labels come in turn."""
        every = max(1, classes)
        return sum(self._distance(x[c::every], y[c::every]) for c in range(every)) / every

    def training(self) -> None:
        """Examine a run of 200 steps, which is then repeated and resumed.

        Its cost, streams, files, needs, teacher and progress.
        """
        if MIXTURE in self.refused:
            return
        course = self.course(self.cell(MIXTURE))
        run = self.started(course)
        if "student" not in run.task.players:
            expected = "a player named 'student': it is the one that is saved and sampled"
            return self.note(self.code, expected, sorted(run.task.players))
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            frozen = fingerprint(run)
            before = self.samples(run)
            watched = self.trained(run, course, folder)
            self.logged(watched.logs)
            if watched.global_streams:
                expected = (
                    "numbers from step.rng(name) alone, which differ between ranks and repeat"
                )
                self.note(self.code, expected, "draws from a global stream")
            self.cost(run, course, watched.counter)
            self.update_counts(run, course)
            self.declared(run, course.plan, watched.read)
            if frozen != fingerprint(run):
                seen = f"other weights after {course.total} steps on {MIXTURE}"
                self.note(self.code, "teacher and features as they were", seen)
            self.progress(run, course, before)
            self.late_cost(run, course)
            self.repeated(course, watched)
            self.resumed(course, watched, folder)

    def trained(self, run: Run, course: Course, folder: Path) -> Watched:
        """What was seen while a run was trained, its checkpoint in the middle kept in `folder`."""
        meter = run.meter
        assert isinstance(meter, WatchingMeter)
        watched = Watched(FlopCounter(meter.depth))
        inner = run.method.train_step

        def train_step(batch: Batch, step: Step) -> dict[str, Tensor]:
            values = {f.name: getattr(batch, f.name) for f in fields(batch)}
            state = global_state()
            out = inner(WatchedBatch(**values, read=watched.read), step)
            watched.global_streams = watched.global_streams or global_state() != state
            return out

        run.method.train_step = train_step  # type: ignore[method-assign]
        with meter.counting(), watched.counter:
            for i in range(course.total):
                with self.no_file_opened(self.code):
                    watched.logs.append(one_step(run, i, course.total))
                done = i + 1
                if done in (course.early, course.total):
                    watched.weights[done] = weights(run)
                if done == course.middle:
                    key = course.cell.key
                    state = run.method.state_dict()
                    save_progress(folder, key, done, 0.0, run.task.players, state)
                self.report("training", i, course.total)
        del run.method.train_step
        return watched

    def logged(self, logs: list[dict[str, Tensor]]) -> None:
        """Examine the values that steps log, the last of each name."""
        last: dict[str, Tensor] = {}
        for log in logs:
            last |= log
        for name, value in last.items():
            if not isinstance(value, Tensor) or value.numel() != 1 or value.requires_grad:
                expected = f"'{name}' in the log to be a detached scalar"
                self.note(self.code, expected, type(value).__name__)

    def cost(self, run: Run, course: Course, counter: FlopCounter) -> None:
        """Examine whether every network is metered, and whether a run costs what is planned."""
        if counter.outside > UNMETERED * counter.forward:
            seen = f"{counter.outside / counter.forward:.1%} of the forward FLOPs elsewhere"
            self.note(self.code, "every network to be of task.network or in a task.player", seen)
        planned = course.cycle_flops * course.cycles
        # The meter's own are what an exact teacher is charged for.
        spent = counter.all + run.meter.flops
        if spent > (1 + UNMETERED) * planned:
            seen = f"{spent / planned:.2f} times that over {course.total} steps"
            self.note(self.code, SAME_COST, seen)

    def update_counts(self, run: Run, course: Course) -> None:
        """Examine whether players are updated as often as in the first cycle."""
        for name, player in run.task.players.items():
            count = course.updates[name] * course.total // course.cycle
            if player.updates != count:
                steps = f"{course.total} steps, by the first cycle"
                self.note(self.code, f"{count} updates of '{name}' in {steps}", player.updates)

    def declared(self, run: Run, plan: Plan, read: set[str]) -> None:
        """Examine whether the method uses what it asks for; read: fields of batches it read."""
        needs = run.needs
        roles = plan.calls_per_cycle
        teacher_alone = needs.teacher and needs.pairs is None and "teacher" not in roles
        unused = {
            "data=True": needs.data and "x" not in read,
            "pairs": needs.pairs is not None and "pairs" not in read,
            "features": needs.features is not None and "features" not in roles,
            "teacher=True": teacher_alone and not self.from_teacher(run),
        }
        for name, idle in unused.items():
            if idle:
                expected = f"needs({name}) to be used: a table says what a method was given"
                self.note(self.code, expected, "it is not")
        if run.data.classes and "cond" not in read and "pairs" not in read:
            self.note(self.code, "batch.cond to be read: the data have classes", "it is not")

    def from_teacher(self, run: Run) -> bool:
        """Whether some network starts from the teacher's weights."""
        fresh = build(run.cell)
        source_weights = run.task._weights["teacher"]
        if source_weights is None:
            return False
        entry = "enter.weight"
        states = [network.state_dict() for network in fresh.task._roles]
        return any(
            torch.equal(source_weights[entry], state[entry]) for state in states if entry in state
        )

    def progress(self, run: Run, course: Course, before: Tensor) -> None:
        """Examine whether samples came closer to the teacher's; before: those of no training."""
        goal = self.goal(run, "goal")
        second_draw = self.goal(run, "again")
        after = self.samples(run)
        classes = run.data.classes
        first = self.distance(before, goal, classes)
        last = self.distance(after, goal, classes)
        floor = self.distance(second_draw, goal, classes)
        if not last <= max(PROGRESS * first, AT_FLOOR * floor):
            seen = (
                f"sliced W2 to its samples {first:.3f} at first, "
                f"{last:.3f} after {course.total} steps"
            )
            self.note(self.code, "progress towards the teacher", seen)

    def late_cost(self, run: Run, course: Course) -> None:
        """Examine what a cycle costs in the middle and at the end of a real run."""
        meter = run.meter
        assert isinstance(meter, WatchingMeter)
        steps = course.plan.steps
        cycle = course.cycle
        cycles = steps // cycle
        for start in sorted({cycles // 2 * cycle, (cycles - 1) * cycle}):
            counter = FlopCounter(meter.depth)
            before = meter.flops
            with meter.counting(), counter:
                for i in range(start, start + cycle):
                    one_step(run, i, steps)
            spent = counter.all + meter.flops - before
            if spent > (1 + UNMETERED) * course.cycle_flops:
                seen = f"{spent / course.cycle_flops:.2f} times that at step {start} of {steps}"
                self.note(self.code, SAME_COST, seen)

    def repeated(self, course: Course, watched: Watched) -> None:
        """Examine whether the same seed, with other global streams, gives the same run."""
        np.random.seed(OTHER_SEED)
        random.seed(OTHER_SEED)
        run = self.started(course)
        for i in range(course.early):
            name = first_difference(watched.logs[i], one_step(run, i, course.total))
            if name is not None:
                return self.note(self.code, SAME_SEED, f"another '{name}' at step {i}")
        name = first_difference(watched.weights[course.early], weights(run))
        if name is not None:
            self.note(self.code, SAME_SEED, f"another {name} after {course.early} steps")

    def resumed(self, course: Course, watched: Watched, folder: Path) -> None:
        """Examine whether a run from the checkpoint in `folder` ends as the one without."""
        run = self.started(course)
        load_progress(folder, course.cell.key, run.task.players, run.method, run.device)
        for i in range(course.middle, course.total):
            one_step(run, i, course.total)
            self.report("resumed training", i, course.total)
        name = first_difference(watched.weights[course.total], weights(run))
        if name is not None:
            seen = (
                f"another {name} at step {course.total} after a resume at {course.middle}: "
                "keep what changes in a player, or in state_dict"
            )
            self.note(self.code, "a resumed run to equal an uninterrupted one", seen)

    def samples(self, run: Run) -> Tensor:
        """COUNT student samples [COUNT, numbers] at the headline NFE."""
        return sample(run, run.needs.headline_nfe, COUNT, self.report).flatten(1)

    def goal(self, run: Run, name: str) -> Tensor:
        """The teacher's own samples [COUNT, numbers] from the noise stream `name`."""
        teacher = restore(run.cell.teacher)
        return sample(teacher, teacher.needs.headline_nfe, COUNT, self.report, name).flatten(1)

    def sampling(self) -> None:
        """Examine a cycle of updates and every NFE of every arm, on images and on mixtures."""
        for benchmark in (DIGITS, MIXTURE):
            for variant in (None, *self.folder.file.variants):
                cell = self.cell(benchmark, variant)
                name = f"{self.code} @{variant}" if variant else self.code
                try:
                    self.arm(cell, name)
                except Refused as e:
                    self.refused[benchmark] = str(e)
                except Exception as e:
                    self.note(name, "no error", in_one_line(e, cell))
        if len(self.refused) == 2:
            self.note(self.code, "a benchmark that it does not refuse", self.refused[DIGITS])

    def arm(self, cell: Cell, name: str) -> None:
        """Examine one arm on one benchmark; name: of the arm, as the place of what is broken."""
        run = build(cell)
        made = prepare(run, self.report, Pulse())
        arm = Arm(self.folder, cell.arm.variant if cell.arm else None)
        with self.no_file_opened(name):  # the constructor once more, alone
            method = folders.load(self.folder)  # anew, so that nothing is remembered
            method(run.task, folders.configuration(arm, cell.benchmark, method))
        run = attach(build(cell, WatchingMeter()), made)
        frozen = fingerprint(run)
        for player in run.task.players.values():
            player.total_updates = STEPS
        with self.no_file_opened(name):
            for i in range(run.needs.cycle):
                one_step(run, i, STEPS)
            for nfe in run.needs.nfe:
                self.drawn(run, name, nfe)
        if frozen != fingerprint(run):
            seen = f"other weights after a cycle on {cell.benchmark.name}"
            self.note(name, "teacher and features as they were", seen)

    def drawn(self, run: Run, name: str, nfe: int) -> None:
        """Examine what the method's sampler returns, and on what its draws depend."""
        asked = f"sample at nfe={nfe}"
        noise = Rng(0, "check").normal(FEW, *run.data.shape)
        kept = noise.clone()
        labels = torch.arange(FEW) % run.data.classes if run.data.classes else None
        cond = Condition(labels, run.cell.benchmark.guidance)
        assert isinstance(run.meter, WatchingMeter)
        counter = FlopCounter(run.meter.depth)
        draws = []
        for _ in range(2):
            state = global_state()
            with torch.no_grad(), counter:
                draws.append(run.method.sample(noise, cond, nfe, Rng(0, "check sampler")))
            if global_state() != state:
                expected = f"{asked} to draw from its rng alone"
                return self.note(name, expected, "draws from a global stream")
        if counter.outside > UNMETERED * counter.forward:
            seen = f"{counter.outside / counter.forward:.0%} of the FLOPs elsewhere"
            expected = f"{asked} to call its networks as such, so that they are counted"
            self.note(name, expected, seen)
        x: Any = draws[0]
        if not isinstance(x, Tensor) or x.shape != noise.shape or x.dtype != noise.dtype:
            got = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            expected = f"{asked} to return {noise.dtype} {list(noise.shape)}"
            return self.note(name, expected, got)
        if not torch.equal(*draws):
            self.note(name, f"{asked} to repeat with the same noise and rng", "another result")
        if not torch.equal(kept, noise):
            expected = f"{asked} to leave the noise it is given alone"
            self.note(name, expected, "it was changed in place")
        largest = float(x.abs().max())
        if not largest < LARGEST:
            expected = f"samples at nfe={nfe} of the data's size, about 1"
            self.note(name, expected, f"values up to {largest:.3g}")
        sample(run, nfe, FEW, self.report)  # counts the evaluations, looks at values


def examine(
    folder: MethodFolder, distance: Distance, metrics: KnownMetrics, report: Report
) -> Iterator[tuple[str, list[BrokenPromise]]]:
    """(what was examined, broken promises) of each stage in turn.

    Whatever a method raises is one of them. Arguments as of `Check`.
    """
    check = Check(folder, distance, metrics, report)
    stages: tuple[tuple[str, Callable[[], None]], ...] = (
        ("imports, README, claims", check.files),
        ("settings of every arm on every benchmark", check.settings),
        ("every arm: a cycle of updates, samples at every NFE", check.sampling),
        (
            f"{STEPS} steps on a mixture: cost, streams, needs, teacher, progress, repeat, resume",
            check.training,
        ),
    )
    for about, stage in stages:
        before = len(check.broken)
        try:
            stage()
        except UserError as e:
            check.note(check.where, "what the harness can use", e)
        except (Exception, SystemExit) as e:
            cell = Cell(config.benchmark(MIXTURE), Arm(folder, None), 0)
            check.note(check.code, "no error", in_one_line(e, cell))
        yield about, check.broken[before:]
