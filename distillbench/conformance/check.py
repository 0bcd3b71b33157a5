"""`distillbench check`: does a method keep the contract? On CPU in less than a minute, on tiny benchmarks of its own.

Every check yields findings, one line each: where, what was expected, what was seen. Training runs are real: the same `build`,
`price`, `one_step`, checkpoints and `sample` that a cell goes through.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
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
    Counting,
    Seen,
    Watching,
    fingerprint,
    first_difference,
    global_state,
    method_code,
    weights,
)
from distillbench.errors import Refused, UserError
from distillbench.method import Batch, Condition
from distillbench.registry import folders, source
from distillbench.registry.folders import Arm, MethodFolder
from distillbench.seeds import Rng

MIXTURE, DIGITS = "check-mixture", "check-digits"  # workflows/benchmarks
STEPS, EARLY = 200, 20  # of training; after how many a second run with the same seed is compared
COUNT = 1000  # samples
START_SHARE = {
    MIXTURE: 0.03,
    DIGITS: 0.1,
}  # of the budget, for an arm that this one starts from: its set-up and a few cycles
UNMETERED = 0.01  # tolerated share of forward FLOPs outside the networks that the harness knows, and of cost above the plan
PROGRESS, AT_FLOOR = (
    0.95,
    1.5,
)  # the distance to the teacher's samples must fall to this share, or be near that of two draws of them
SAME_COST = "all cycles of needs.cycle steps to cost what the first does: it is what the budget is divided by"
Distance = Callable[[Tensor, Tensor], float]


@dataclass(frozen=True)
class Finding:
    """One broken promise."""

    where: str
    expected: str
    seen: str

    def __str__(self) -> str:
        return f"{self.where}: expected {self.expected}; saw {self.seen}"


class Brief(Cell):
    """A cell whose start gets next to none of the budget."""

    @cached_property
    def start(self) -> Cell | None:
        start = super().start
        return (
            None
            if start is None or start.arm is None
            else Cell(
                self.benchmark,
                replace(start.arm, share=START_SHARE[self.benchmark.name]),
                self.seed,
            )
        )


class Check:
    """One method under examination; `findings` collects what is wrong."""

    def __init__(
        self, folder: MethodFolder, distance: Distance, metrics: KnownMetrics, report: Report
    ):
        self.folder, self.report, self.findings, self.refused = (
            folder,
            report,
            list[Finding](),
            dict[str, str](),
        )
        self._distance, self.metrics = distance, metrics
        root = config.root()
        self.where = (
            str(folder.path.relative_to(root))
            if folder.path.is_relative_to(root)
            else str(folder.path)
        )
        self.code = f"{self.where}/method.py"

    def find(self, where: str, expected: str, seen: object) -> None:
        """Note a finding, once: variants mostly repeat what the method itself does."""
        words = " ".join(str(seen).split())[:300]
        if (expected, words) not in [(f.expected, f.seen) for f in self.findings]:
            self.findings.append(Finding(where, expected, words))

    @contextmanager
    def no_file_opened(self, where: str) -> Iterator[None]:
        with method_code() as opened:
            yield
        for path in opened[:1]:
            self.find(where, "no file opened: data come in batch.x, if `needs` asks for them", path)

    # What stands in the files.

    def files(self) -> None:
        siblings = set(folders.discover()) - {self.folder.name}
        for path in sorted(self.folder.path.rglob("*.py")):
            for line, name, why in source.forbidden(path, siblings):
                self.find(
                    f"{self.where}/{path.relative_to(self.folder.path)}:{line}",
                    f"no import of {name}",
                    f"one ({why})",
                )
        readme = self.folder.path / "README.md"
        if not readme.is_file() or not source.targets(readme):
            self.find(
                f"{self.where}/README.md",
                "a table from equations to code, `method.py:function`",
                "no such entry",
            )
        else:
            for target in source.unresolved(readme, config.root()):
                self.find(
                    f"{self.where}/README.md",
                    "every entry of the equation table to exist",
                    f"`{target}`, which does not",
                )
        claims = f"{self.where}/claims.yaml"
        for index, claim in enumerate(self.folder.claims.claims):
            for expected, seen in questions.misfits(claim, self.metrics, self.exists):
                self.find(
                    f"{claims}:{questions.line_of_claim(self.folder, index).rpartition(':')[2]}",
                    expected,
                    seen,
                )
        for reported in self.folder.claims.reported:
            try:
                self.exists(reported.arm or self.folder.name)
            except UserError as e:
                self.find(
                    claims, f"the number of {reported.where} to be beside an arm that exists", e
                )

    def exists(self, name: str) -> None:
        """UserError unless this is an arm, of this method or another."""
        method, _, variant = name.partition("@")
        if method != self.folder.name or (variant and variant not in self.folder.file.variants):
            folders.arm(name)

    def settings(self) -> None:
        """The configuration of every arm fits on every benchmark."""
        with self.no_file_opened(self.code):
            cls = folders.load(self.folder)
        for path in sorted((config.root() / "workflows/benchmarks").glob("*.yaml")):
            benchmark = reading.read(path, Benchmark)
            for variant in (None, *self.folder.file.variants):
                try:
                    cls.needs(folders.configuration(Arm(self.folder, variant), benchmark, cls))
                except Refused:
                    pass
                except (UserError, ValueError) as e:
                    self.find(
                        f"{self.where}/config.yaml",
                        f"settings{f' of @{variant}' if variant else ''} that fit",
                        e,
                    )
                    return

    # What happens when it runs.

    def cell(self, benchmark: str, variant: str | None = None) -> Cell:
        """Its cell on a benchmark of the check, with a trained teacher and, hardly trained, what it starts from."""
        cell = Brief(config.benchmark(benchmark), Arm(self.folder, variant), 0)
        for one in cell.needed:
            with one.locked():
                record = one.result() or run_cell(one, self.report)
                if record["status"] != "done":
                    raise UserError(
                        f"{one.arm_name}, which it needs, ended as {record['status']}: {record['reason']}"
                    )
        return cell

    def started(self, cell: Cell, made: Prepared, total: int, per_cycle: dict[str, int]) -> Run:
        """A fresh run of `total` steps."""
        run = attach(build(cell, Watching()), made)
        for name, player in run.task.players.items():
            player.total_updates = max(1, per_cycle[name] * total // run.needs.cycle)
        return run

    def distance(self, x: Tensor, y: Tensor, classes: int) -> float:
        """Between samples of labels in turn: the mean over classes."""
        every = max(1, classes)
        return sum(self._distance(x[c::every], y[c::every]) for c in range(every)) / every

    def training(self) -> None:
        """A run of 200 steps: cost, streams, files, needs, teacher, progress; then repeated and resumed."""
        if MIXTURE in self.refused:
            return
        cell = self.cell(MIXTURE)
        plan, made = price(cell, self.report)
        cycle = build(cell).needs.cycle
        bought = plan.steps // cycle
        per_cycle = {name: count // bought for name, count in plan.updates.items()}
        total, early = (-(-steps // cycle) * cycle for steps in (STEPS, EARLY))
        middle = total // 2 + cycle // 2  # within a cycle: real checkpoints fall anywhere
        run = self.started(cell, made, total, per_cycle)
        if "student" not in run.task.players:
            return self.find(
                self.code,
                "a player named 'student': it is the one that is saved and sampled",
                sorted(run.task.players),
            )
        meter = run.meter
        assert isinstance(meter, Watching)
        frozen = fingerprint(run)
        before, read = self.samples(run), set[str]()
        counting, streams, snapshots, logs, saved = (
            Counting(meter.depth),
            False,
            {},
            [],
            tempfile.TemporaryDirectory(),
        )
        inner = run.method.train_step

        def train_step(batch: Batch, step: Any) -> dict[str, Tensor]:
            nonlocal streams
            state = global_state()
            out = inner(
                Seen(**{f.name: getattr(batch, f.name) for f in fields(batch)}, read=read), step
            )
            streams = streams or global_state() != state
            return out

        run.method.train_step = train_step  # type: ignore[method-assign]
        with meter.counting(), counting:
            for i in range(total):
                with self.no_file_opened(self.code):
                    logs.append(one_step(run, i, total))
                if i + 1 in (early, total):
                    snapshots[i + 1] = weights(run)
                if i + 1 == middle:
                    save_progress(
                        Path(saved.name),
                        cell.key,
                        middle,
                        0.0,
                        run.task.players,
                        run.method.state_dict(),
                    )
                self.report("training", i, total)
        del run.method.train_step
        self.logged(logs)
        if streams:
            self.find(
                self.code,
                "numbers from step.rng(name) alone, which differ between ranks and repeat",
                "draws from a global stream",
            )
        if counting.outside > UNMETERED * counting.forward:
            share = f"{counting.outside / counting.forward:.1%} of the forward FLOPs elsewhere"
            self.find(self.code, "every network to be of task.network or in a task.player", share)
        planned = (plan.flops - plan.setup_flops) / bought * (total // cycle)
        spent = counting.all + meter.flops  # the latter is what an exact teacher is charged for
        if spent > (1 + UNMETERED) * planned:
            seen = f"{spent / planned:.2f} times that over {total} steps"
            self.find(self.code, SAME_COST, seen)
        for name, player in run.task.players.items():
            if player.updates != (expected := per_cycle[name] * total // cycle):
                self.find(
                    self.code,
                    f"{expected} updates of '{name}' in {total} steps, by the first cycle",
                    player.updates,
                )
        self.declared(run, plan, read)
        if frozen != fingerprint(run):
            self.find(
                self.code,
                "teacher and features as they were",
                f"other weights after {total} steps on {MIXTURE}",
            )
        goal, again, after = self.goal(run, "goal"), self.goal(run, "again"), self.samples(run)
        first, last, floor = (
            self.distance(x, goal, run.data.classes) for x in (before, after, again)
        )
        if not last <= max(PROGRESS * first, AT_FLOOR * floor):
            self.find(
                self.code,
                "progress towards the teacher",
                f"sliced W2 to its samples {first:.3f} at first, {last:.3f} after {total} steps",
            )
        self.late(run, plan, planned / (total // cycle))
        self.repeated(cell, made, total, per_cycle, snapshots[early], logs, early)
        with saved:
            self.resumed(cell, made, total, per_cycle, snapshots[total], Path(saved.name), middle)

    def late(self, run: Run, plan: Plan, cycle_flops: float) -> None:
        """What a cycle costs in the middle and at the end of a real run."""
        cycle, cycles = run.needs.cycle, plan.steps // run.needs.cycle
        for start in sorted({cycles // 2 * cycle, (cycles - 1) * cycle}):
            meter = run.meter
            assert isinstance(meter, Watching)
            counting, before = Counting(meter.depth), meter.flops
            with meter.counting(), counting:
                for i in range(start, start + cycle):
                    one_step(run, i, plan.steps)
            spent = counting.all + meter.flops - before
            if spent > (1 + UNMETERED) * cycle_flops:
                seen = f"{spent / cycle_flops:.2f} times that at step {start} of {plan.steps}"
                self.find(self.code, SAME_COST, seen)

    def logged(self, logs: list[dict[str, Tensor]]) -> None:
        for name, value in {k: v for log in logs for k, v in log.items()}.items():
            if not isinstance(value, Tensor) or value.numel() != 1 or value.requires_grad:
                self.find(
                    self.code, f"'{name}' in the log to be a detached scalar", type(value).__name__
                )

    def declared(self, run: Run, plan: Plan, read: set[str]) -> None:
        needs, roles = run.needs, plan.calls_per_cycle
        unused = {
            "data=True": needs.data and "x" not in read,
            "pairs": needs.pairs is not None and "pairs" not in read,
            "features": needs.features is not None and "features" not in roles,
            "teacher=True": needs.teacher
            and needs.pairs is None
            and "teacher" not in roles
            and not self.from_teacher(run),
        }
        for name, idle in unused.items():
            if idle:
                self.find(
                    self.code,
                    f"needs({name}) to be used: a table says what a method was given",
                    "it is not",
                )
        if run.data.classes and "cond" not in read and "pairs" not in read:
            self.find(self.code, "batch.cond to be read: the data have classes", "it is not")

    def from_teacher(self, run: Run) -> bool:
        """Some network starts from the teacher's weights."""
        fresh, source = build(run.cell), run.task._weights["teacher"]
        parts = [source["enter.weight"]] if source is not None else []
        own = [n.state_dict() for n in fresh.task._roles]
        return any(
            torch.equal(p, o["enter.weight"]) for p in parts for o in own if "enter.weight" in o
        )

    def repeated(
        self,
        cell: Cell,
        made: Prepared,
        total: int,
        per_cycle: dict[str, int],
        expected: dict[str, Tensor],
        logs: list[dict[str, Tensor]],
        early: int,
    ) -> None:
        """The same seed again, with other global streams."""
        np.random.seed(12345)
        random.seed(12345)
        run = self.started(cell, made, total, per_cycle)
        for i in range(early):
            if (name := first_difference(logs[i], one_step(run, i, total))) is not None:
                return self.find(
                    self.code, "two runs with one seed to agree", f"another '{name}' at step {i}"
                )
        if (name := first_difference(expected, weights(run))) is not None:
            self.find(
                self.code, "two runs with one seed to agree", f"another {name} after {early} steps"
            )

    def resumed(
        self,
        cell: Cell,
        made: Prepared,
        total: int,
        per_cycle: dict[str, int],
        expected: dict[str, Tensor],
        folder: Path,
        start: int,
    ) -> None:
        """From the checkpoint in `folder` to the end."""
        run = self.started(cell, made, total, per_cycle)
        load_progress(folder, cell.key, run.task.players, run.method, run.device)
        for i in range(start, total):
            one_step(run, i, total)
            self.report("resumed training", i, total)
        if (name := first_difference(expected, weights(run))) is not None:
            seen = f"another {name} at step {total} after a resume at {start}: keep what changes in a player, or in state_dict"
            self.find(self.code, "a resumed run to equal an uninterrupted one", seen)

    def samples(self, run: Run) -> Tensor:
        """At the headline NFE."""
        return sample(run, run.needs.headline_nfe, COUNT, self.report).flatten(1)

    def goal(self, run: Run, name: str) -> Tensor:
        """The teacher's own samples from the noise stream `name`."""
        teacher = restore(run.cell.teacher)
        return sample(teacher, teacher.needs.headline_nfe, COUNT, self.report, name).flatten(1)

    def sampling(self) -> None:
        """A cycle of updates and every NFE of every arm, on images and on mixtures."""
        for benchmark in (DIGITS, MIXTURE):
            for variant in (None, *self.folder.file.variants):
                cell, name = (
                    self.cell(benchmark, variant),
                    f"{self.code}{f' @{variant}' if variant else ''}",
                )
                try:
                    self.arm(cell, name)
                except Refused as e:
                    self.refused[benchmark] = str(e)
                except Exception as e:
                    self.find(name, "no error", in_one_line(e, cell))
        if len(self.refused) == 2:
            self.find(self.code, "a benchmark that it does not refuse", self.refused[DIGITS])

    def arm(self, cell: Cell, name: str) -> None:
        run = build(cell)
        made = prepare(run, self.report, Pulse())
        with self.no_file_opened(name):  # the constructor once more, alone
            cls = folders.load(self.folder)  # anew, so that nothing is remembered
            cls(
                run.task,
                folders.configuration(
                    Arm(self.folder, cell.arm.variant if cell.arm else None), cell.benchmark, cls
                ),
            )
        run = attach(build(cell, Watching()), made)
        frozen = fingerprint(run)
        for player in run.task.players.values():
            player.total_updates = STEPS
        with self.no_file_opened(name):
            for i in range(run.needs.cycle):
                one_step(run, i, STEPS)
            for nfe in run.needs.nfe:
                self.drawn(run, name, nfe)
        if frozen != fingerprint(run):
            self.find(
                name,
                "teacher and features as they were",
                f"other weights after a cycle on {cell.benchmark.name}",
            )

    def drawn(self, run: Run, name: str, nfe: int) -> None:
        shape, classes = run.data.shape, run.data.classes
        noise = Rng(0, "check").normal(64, *shape)
        labels = torch.arange(64) % classes if classes else None
        kept, draws = noise.clone(), []
        assert isinstance(run.meter, Watching)
        counting = Counting(run.meter.depth)
        for _ in range(2):
            state = global_state()
            with torch.no_grad(), counting:
                draws.append(
                    run.method.sample(
                        noise,
                        Condition(labels, run.cell.benchmark.guidance),
                        nfe,
                        Rng(0, "check sampler"),
                    )
                )
            if global_state() != state:
                return self.find(
                    name,
                    f"sample at nfe={nfe} to draw from its rng alone",
                    "draws from a global stream",
                )
        if counting.outside > UNMETERED * counting.forward:
            share = f"{counting.outside / counting.forward:.0%} of the FLOPs elsewhere"
            self.find(
                name,
                f"sample at nfe={nfe} to call its networks as such, so that they are counted",
                share,
            )
        x = draws[0]
        if not isinstance(x, Tensor) or x.shape != noise.shape or x.dtype != noise.dtype:
            got = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            return self.find(
                name, f"sample at nfe={nfe} to return {noise.dtype} {list(noise.shape)}", got
            )
        if not torch.equal(*draws):
            self.find(
                name, f"sample at nfe={nfe} to repeat with the same noise and rng", "another result"
            )
        if not torch.equal(kept, noise):
            self.find(
                name,
                f"sample at nfe={nfe} to leave the noise it is given alone",
                "it was changed in place",
            )
        largest = float(x.abs().max())
        if not largest < 30:
            self.find(
                name,
                f"samples at nfe={nfe} of the data's size, about 1",
                f"values up to {largest:.3g}",
            )
        sample(run, nfe, 64, self.report)  # counts the evaluations, looks at values


STAGES: tuple[tuple[str, str], ...] = (
    ("files", "imports, README, claims"),
    ("settings", "settings of every arm on every benchmark"),
    ("sampling", "every arm: a cycle of updates, samples at every NFE"),
    (
        "training",
        f"{STEPS} steps on a mixture: cost, streams, needs, teacher, progress, repeat, resume",
    ),
)


def run(
    folder: MethodFolder, distance: Distance, metrics: KnownMetrics, report: Report
) -> Iterator[tuple[str, list[Finding]]]:
    """(what was examined, findings) of each stage in turn. Whatever a method raises is a finding."""
    check = Check(folder, distance, metrics, report)
    for name, about in STAGES:
        before = len(check.findings)
        try:
            getattr(check, name)()
        except UserError as e:
            check.find(check.where, "what the harness can use", e)
        except (Exception, SystemExit) as e:
            check.find(
                check.code,
                "no error",
                in_one_line(e, Cell(config.benchmark(MIXTURE), Arm(folder, None), 0)),
            )
        yield about, check.findings[before:]
