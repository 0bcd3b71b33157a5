"""The training loop: steps, checkpoints and the journal, from where an earlier process stopped."""

from __future__ import annotations

import time

from distillbench.cells.build import Run
from distillbench.cells.checkpoint import (
    CHECKPOINT_SECONDS,
    CHECKPOINTS,
    load_progress,
    save_progress,
)
from distillbench.cells.journal import LOGGED, Journal
from distillbench.cells.progress import Report
from distillbench.cells.pulse import TRAINING, Pulse
from distillbench.cells.setup import Plan
from distillbench.cells.steps import one_step
from distillbench.seeds import ranks


def train(run: Run, plan: Plan, report: Report, pulse: Pulse | None = None) -> None:
    """Train a run by its plan, from its checkpoint if there is one, to the same bytes either way.

    Asked to leave (`Pulse.leaving`), saves what it has after the step it is at and raises
    KeyboardInterrupt. Rank 0 alone saves.
    """
    pulse = pulse or Pulse()
    folder = run.cell.folder
    key = run.cell.key
    players = run.task.players
    for name, player in players.items():
        player.total_updates = plan.updates[name]
    first_rank = ranks()[0] == 0
    journal = Journal(folder)
    start, pulse.earlier = load_progress(folder, key, players, run.method, run.device)
    if first_rank:
        journal.start(start, plan.steps)
    pulse.begin(start)
    log_every = max(1, plan.steps // LOGGED)
    save_every = max(1, plan.steps // CHECKPOINTS)
    saved = time.monotonic()
    for i in range(start, plan.steps):
        logged = one_step(run, i, plan.steps)
        pulse.beat(TRAINING, i + 1)
        if not first_rank:
            continue
        if i % log_every == 0:
            journal.add(step=i, **{name: float(f"{v.item():.6g}") for name, v in logged.items()})
            report("training", i, plan.steps)
        due = (i + 1) % save_every == 0 or i + 1 == plan.steps
        late = time.monotonic() - saved > CHECKPOINT_SECONDS
        if due or late or pulse.leaving:
            with pulse.patience():
                seconds = pulse.seconds()
                save_progress(folder, key, i + 1, seconds, players, run.method.state_dict())
            journal.add(checkpoint=i + 1)
            saved = time.monotonic()
        if pulse.leaving:
            raise KeyboardInterrupt
    report("training", plan.steps, plan.steps)
