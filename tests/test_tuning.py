"""`distillbench tune`: which trials, on what, and what is kept of them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from distillbench.cli import tune
from distillbench.config import DigitsData
from distillbench.data import kinds
from distillbench.errors import UserError
from distillbench.registry import folders
from distillbench.registry.folders import MethodFolder
from tests.conftest import DIGITS, Checkout
from tests.test_cells import edit

SEARCH = "search: {student.lr: [1.0e-3, 2.0e-3]}\nvariants:"


@pytest.fixture
def tunable(checkout: Checkout) -> Checkout:
    tiny = (
        DIGITS.replace("tiny", "digits-tuning")
        .replace("kind: digits", "kind: digits, inner: true")
        .replace("[0, 1]", "[100]")
    )
    checkout.write(
        "workflows/benchmarks/digits-tuning.yaml",
        tiny.replace("digits-gelu-64", "digits-simclr-64"),
    )
    path = checkout.folder / "methods/dmd/config.yaml"
    path.with_name("tuning.json").unlink(missing_ok=True)
    if "search:" not in path.read_text():
        edit(path, "variants:", SEARCH)
    return checkout


def folder(name: str = "dmd") -> MethodFolder:
    return folders.discover()[name]


def with_search(**space: list) -> MethodFolder:
    found = folder()
    return MethodFolder(
        found.name, found.path, found.file.model_copy(update={"search": space}), found.claims
    )


def changes_tried(method: MethodFolder) -> list[dict]:
    return [trial.changes for trial in tune.trials(method)]


def test_at_most_twelve_trials_and_the_first_changes_nothing(tunable: Checkout):
    few = changes_tried(with_search(**{"student.lr": [1e-3, 2e-3], "batch": [32, 64]}))
    # as in config.yaml: 2e-3, 64
    assert few == [
        {},
        {"student.lr": 1e-3, "batch": 32},
        {"student.lr": 1e-3},
        {"batch": 32},
    ]
    many = with_search(
        **{"student.lr": [1e-4 * i for i in range(1, 9)], "batch": [16, 32, 64, 128]}
    )
    trials = changes_tried(many)
    assert (
        len(trials) == 12 == len({json.dumps(t) for t in trials})
        and trials[0] == {}
        and trials == changes_tried(many)
    )
    for space, why in {
        "student.rl": "is no setting of config, did you mean 'student.lr'?",
        "batch": "is empty",
    }.items():
        with pytest.raises(UserError, match=why):
            tune.trials(with_search(**{space: [] if space == "batch" else [1]}))
    with pytest.raises(UserError, match="'search' is missing"):
        tune.trials(with_search())


def test_the_inner_split_sees_no_reported_digit():
    whole, inner = (kinds.load(DigitsData(kind="digits", inner=flag)) for flag in (False, True))

    def rows(x):
        return {t.numpy().tobytes() for t in x}

    assert (
        len(inner.train) + len(inner.reference) == len(whole.train)
        and abs(len(inner.train) - len(inner.reference)) <= 10
    )
    assert torch.equal(torch.cat([inner.train, inner.reference]).sum(0), whole.train.sum(0))
    # Planted: an exchanged split shares all of them
    assert not rows(whole.reference) & (rows(inner.train) | rows(inner.reference))
    assert np.all(
        np.abs(np.bincount(inner.train_labels) - np.bincount(inner.reference_labels)) <= 1
    )


def test_every_trial_is_kept_and_the_winner_named(tunable: Checkout):
    done = tunable.run("distillbench", "tune", "dmd")
    assert done.returncode == 0, done.stderr
    found = json.loads((tunable.folder / "methods/dmd/tuning.json").read_text())
    trials = found["trials"]
    assert (
        len(trials) == len(tune.trials(folder()))
        and found["seeds"] == [100]
        and found["extractor"] == "digits-simclr-64"
    )
    assert found["winner"] == min(trials, key=lambda t: t["fid"])["changes"]
    assert found["cost"]["flops"] == sum(t["flops"] for t in trials) > 0
    for trial in trials:  # traceable to its cell, whose metrics it repeats
        (path,) = tunable.folder.glob(
            f"results/runs/digits-tuning/dmd/seed100-{trial['key'][0]}/metrics.json"
        )
        assert json.loads(path.read_text())["rows"][0]["fid"] == pytest.approx(
            trial["fid"], rel=1e-4
        )
    # nothing is trained twice, and what it finds is the same
    again = tunable.run("distillbench", "tune", "dmd")
    assert again.returncode == 0 and "training" not in again.stderr
    assert json.loads((tunable.folder / "methods/dmd/tuning.json").read_text()) == found
    shown = tunable.run("distillbench", "tune", "dmd", "--show")
    assert (
        shown.returncode == 0
        and "student.lr: 0.001" in shown.stdout
        and "to do" not in shown.stdout
    )

    # ends before it has a plan
    edit(tunable.folder / "methods/dmd/config.yaml", "pairs: 2048", "pairs: 100000000")
    assert tunable.run("distillbench", "tune", "dmd").returncode == 0
    later = json.loads((tunable.folder / "methods/dmd/tuning.json").read_text())
    assert later["earlier"] == trials and {t["status"] for t in later["trials"]} != {"done"}, (
        "no trial is lost"
    )
    edit(tunable.folder / "methods/dmd/config.yaml", "pairs: 100000000", "pairs: 2048")

    cell = tune.Trial(folder(), {}).cells[0]
    assert cell.key in trials[0]["key"], "the file beside the code is no part of a cell's key"
