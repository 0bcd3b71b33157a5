"""What is scored against what: one pass, no two sets mixed up, a key that sees every edit."""

from __future__ import annotations

import ast
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from distillbench import config
from distillbench.cells.cell import Cell
from distillbench.cli import evaluate as scoring
from distillbench.cli.extractors import check_extractors
from distillbench.data import kinds
from distillbench.errors import UserError
from eval.features import weights
from eval.metrics import evaluate, key
from eval.metrics.evaluate import SCORES, Against, evaluate_images, in_turn
from eval.metrics.key import NOT_NUMERICAL, followed
from eval.metrics.statistics import Reference
from eval.report.protocol import CROSS_EXTRACTOR, EXTRACTOR, Digits

EVAL = Path(evaluate.__file__).parents[1]


@pytest.fixture(scope="module")
def data() -> Digits:
    return Digits.split()


@pytest.fixture(scope="module")
def against(data) -> Against:
    return Against.of(data, EXTRACTOR, CROSS_EXTRACTOR, data.train)


def in_class_order(images: Tensor, labels: Tensor, n: int) -> Tensor:
    """n images, the i-th of class i % 10, each class's in order and from the start again."""
    own = [images[labels == c] for c in range(10)]
    return torch.stack([own[i % 10][(i // 10) % len(own[i % 10])] for i in range(n)])


def test_one_pass_per_extractor_all_scores_eight_digits(data, against, monkeypatch):
    passes = []
    true = type(against.extractor).features
    monkeypatch.setattr(
        type(against.extractor),
        "features",
        lambda self, x: passes.append((self.name, len(x))) or true(self, x),
    )
    images = in_class_order(data.train, data.train_labels, 900)
    scores = evaluate_images(images, in_turn(900, 10), against, images)
    assert passes == [(EXTRACTOR, 900), (CROSS_EXTRACTOR, 900)]
    assert tuple(scores) == SCORES
    assert all(type(value) is float and value == float(f"{value:.8g}") for value in scores.values())
    # all eight digits are kept
    assert any(value != float(f"{value:.7g}") for value in scores.values())
    assert scores["memorisation"] == scores["class_accuracy"] == 1 and scores["noise_distance"] == 0
    assert abs(scores["fid_teacher"]) < 0.1 < scores["fid"]  # the teacher was the training half


def test_a_part_that_is_missing_leaves_its_scores_none(data, against):
    images, labels = in_class_order(data.train, data.train_labels, 200), in_turn(200, 10)
    full = evaluate_images(images, labels, against, images)
    missing = {
        "fid_cross": (
            labels,
            dataclasses.replace(against, cross_extractor=None, cross_held_out=None),
            images,
        ),
        "fid_teacher": (labels, dataclasses.replace(against, teacher=None), images),
        "memorisation": (labels, dataclasses.replace(against, train=None), images),
        "diversity": (labels, dataclasses.replace(against, labels=None), images),
        "noise_distance": (labels, against, None),
        "class_accuracy label_tv": (
            labels,
            dataclasses.replace(against, classes=1000),
            images,
        ),  # a classifier of other classes
        "class_accuracy label_tv diversity noise_distance": (None, against, images),
    }
    for names, arguments in missing.items():
        scores = evaluate_images(images, *arguments)
        assert scores == full | dict.fromkeys(names.split())
    # it has no class head
    blind = evaluate_images(images, labels, Against.of(data, CROSS_EXTRACTOR, None))
    assert {m for m in SCORES if blind[m] is None} == {
        "fid_cross",
        "fid_teacher",
        "is",
        "class_accuracy",
        "label_tv",
        "noise_distance",
    }


def test_scores_under_two_extractors_never_mix(data, against):
    other = Reference.of(data.reference, against.cross_extractor)
    for stale in (
        dataclasses.replace(against, held_out=other),
        dataclasses.replace(against, teacher=other),
        dataclasses.replace(against, cross_held_out=against.held_out),
        dataclasses.replace(against, cross_extractor=None),
    ):
        with pytest.raises(ValueError, match="reference features are not by"):
            evaluate_images(data.train, data.train_labels, stale)


def metrics(monkeypatch: pytest.MonkeyPatch, teacher_itself: bool = False) -> dict:
    """metrics.json, by the command line's own code, of a student whose every set is known.

    Its samples are training images; those of its teacher on the same noise are class means at
    1 step and the student's own images at 32; the teacher's from other noise are held-out images.
    images at 32; the teacher's from other noise are held-out images.
    """
    monkeypatch.chdir(EVAL.parent)
    b = config.benchmark("digits")
    b = b.model_copy(
        update={
            "cross_extractor": CROSS_EXTRACTOR,
            "sampling": b.sampling.model_copy(update={"count": 900}),
        }
    )
    digits = Digits.split()
    student = in_class_order(digits.train, digits.train_labels, 900)
    blurred = torch.stack([student[c::10].float().mean(0).to(torch.uint8) for c in range(10)])[
        in_turn(900, 10)
    ]
    again = in_class_order(digits.reference, digits.reference_labels, 900)

    class Known(Cell):
        key, teacher = "key", property(lambda self: teacher)

    teacher = Known(b, None, 0)
    arm = None if teacher_itself else object()
    stored = {True: ({1: blurred, 32: student}, again), False: ({1: student}, None)}
    monkeypatch.setattr(scoring, "samples_of", lambda cell: stored[cell.arm is None])
    monkeypatch.setattr(Cell, "label", "known", raising=False)
    return scoring.metrics_of(Known(b, arm, 0))


def mixed_up(found: dict) -> list[str]:
    """Which sets cannot be what they should be, by the scores of that student."""
    row = found["rows"][-1]
    said = {
        "training images are not the training half": row["memorisation"] == 1,
        "the reference is not held out": row["fid"] > 0.1
        and row["c2st"] > 0.3
        and row["precision"] < 1,
        "second FID: not held out": row["fid_cross"] > 0.1,
        "the teacher's own set is not the held-out images": row["fid_teacher"] > 0.1,
        "labels are not in turn": row["class_accuracy"] == 1 and row["label_tv"] == 0,
        "not the teacher's sample of many steps": row["noise_distance"] in (0, None),
    }
    return [what for what, kept in said.items() if not kept]


def test_every_set_is_where_it_belongs(monkeypatch):
    found = metrics(monkeypatch)
    assert (
        mixed_up(found) == [] and found["rows"][0]["noise_distance"] == 0 and "fixed" not in found
    )
    about = found["evaluation"]
    assert (
        about["key"] == key.evaluation_key(EXTRACTOR, CROSS_EXTRACTOR)
        and about["samples"] == 900
        and about["reference"] == 896
    )
    assert len({about["extractor_sha256"], about["cross_extractor_sha256"]}) == 2
    own = metrics(monkeypatch, teacher_itself=True)
    assert mixed_up(own) == [] and [row["noise_distance"] for row in own["rows"]] == [None, None]
    assert [row["name"] for row in own["fixed"]] == [
        "floor",
        "class_means",
        "class_gaussian",
        "mixup",
        "memoriser",
    ]
    assert json.loads(json.dumps(found)) == found == metrics(monkeypatch)


def test_training_and_reference_exchanged_are_noticed(monkeypatch):
    load, real = kinds.load, Against.of

    def swap(d):
        return dataclasses.replace(
            d,
            train=d.reference,
            train_labels=d.reference_labels,
            reference=d.train,
            reference_labels=d.train_labels,
        )

    both = {
        "training images are not the training half",
        "the reference is not held out",
        "second FID: not held out",
    }
    with monkeypatch.context() as planted:
        planted.setattr(kinds, "load", lambda spec: swap(load(spec)))
        assert both <= set(mixed_up(metrics(planted)))
    with monkeypatch.context() as planted:
        planted.setattr(Against, "of", lambda data, *rest: real(swap(data), *rest))
        assert both <= set(mixed_up(metrics(planted)))


def test_other_mix_ups_are_noticed(monkeypatch):
    real = evaluate.image_metrics

    def planted(change) -> list[str]:
        with monkeypatch.context() as context:
            context.setattr(
                evaluate,
                "image_metrics",
                lambda *arguments, **named: real(*change(*arguments), **named),
            )
            return mixed_up(metrics(context))

    assert planted(lambda *a: a) == []

    def first(d, e, c, s, t, again, *r):
        return (d, e, c, s, {1: t[1]}, again, *r)

    assert planted(first) == ["not the teacher's sample of many steps"]

    def reused(d, e, c, s, t, again, *r):
        return (d, e, c, s, t, t[32], *r)

    assert planted(reused) == ["the teacher's own set is not the held-out images"]

    def one_off(d, e, c, s, t, again, *r):
        return (d, e, c, {1: s[1].roll(1, 0)}, t, again, *r)

    assert set(planted(one_off)) == {
        "labels are not in turn",
        "not the teacher's sample of many steps",
    }


# Of eval's modules that evaluate.py needs, those that decide no number.
OUTSIDE = {
    "eval.features.weights",
    "eval.metrics.key",
    "eval.metrics.reference",
    "eval.samples",
}


def file_of(module: str) -> Path:
    return EVAL.parent.joinpath(*module.split(".")).with_suffix(".py")


def imported(module: str) -> set[str]:
    """eval's modules that this one imports at the top of the file, directly or not, and itself."""
    found = set()
    todo = [module]
    while todo:
        name = todo.pop()
        if name in found:
            continue
        found.add(name)
        for node in ast.parse(file_of(name).read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("eval."):
                todo.append(node.module)
    return found


def test_the_key_covers_every_module_that_makes_a_number():
    unseen = {name for name in imported("eval.metrics.evaluate") if followed(name) is None}
    assert unseen == OUTSIDE
    assert all(file_of(name).is_file() for name in NOT_NUMERICAL)
    assert followed("eval.metrics.another_score") is not None  # whoever adds one edits no list


def test_an_edit_of_any_module_that_makes_a_number_is_another_key(monkeypatch, tmp_path):
    numerical = imported("eval.metrics.evaluate") - OUTSIDE

    def key_with(edited: str | None) -> str:
        copy = tmp_path / str(edited)
        for name in sorted(numerical):
            source = file_of(name)
            text = source.read_text(encoding="utf-8")
            if name == edited:
                text += "\nONE_MORE = 1\n"
            file = copy / source.relative_to(EVAL)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        monkeypatch.setattr(key, "EVAL", copy)
        return key.evaluation_key.__wrapped__(None)  # without its cache

    keys = {key_with(edited) for edited in (None, *numerical)}
    assert len(keys) == 1 + len(numerical)


def test_another_extractor_in_either_place_is_another_key(monkeypatch, tmp_path):
    evaluation_key = key.evaluation_key
    keys = [
        evaluation_key(EXTRACTOR, None),
        evaluation_key(EXTRACTOR, CROSS_EXTRACTOR),
        evaluation_key(CROSS_EXTRACTOR, EXTRACTOR),
        evaluation_key(EXTRACTOR, EXTRACTOR),
        evaluation_key(None, None),
    ]
    assert len(set(keys)) == 5
    files = {name: weights.weight_file(name) for name in (EXTRACTOR, CROSS_EXTRACTOR)}
    for name, file in files.items():  # one other byte in the weights of either
        changed = tmp_path / file.name
        changed.write_bytes(file.read_bytes()[:-1] + b"\x00")
        monkeypatch.setattr(key, "weight_file", (files | {name: changed}).__getitem__)
        evaluation_key.cache_clear()
        keys.append(evaluation_key(EXTRACTOR, CROSS_EXTRACTOR))
    monkeypatch.undo()
    evaluation_key.cache_clear()
    assert len(set(keys)) == 7


def test_metrics_under_another_second_extractor_are_stale(tmp_path):
    file = tmp_path / "metrics.json"
    file.write_text(
        json.dumps({"evaluation": {"key": key.evaluation_key(EXTRACTOR, CROSS_EXTRACTOR)}})
    )
    assert key.is_evaluated(file, EXTRACTOR, CROSS_EXTRACTOR)
    assert not key.is_evaluated(file, EXTRACTOR, None) and not key.is_evaluated(
        file, EXTRACTOR, EXTRACTOR
    )


def test_an_unknown_second_extractor_is_one_line(monkeypatch):
    monkeypatch.chdir(EVAL.parent)
    b = config.benchmark("digits").model_copy(update={"cross_extractor": "digits-simclr"})
    with pytest.raises(
        UserError, match=r"digits\.yaml: key 'cross_extractor': .*did you mean 'digits-simclr-64'"
    ):
        check_extractors([b])


def resident(field: str) -> int:
    """A memory counter of this process, in bytes: VmRSS now, VmHWM its peak."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="resets the peak as Linux does"
)
def test_twenty_thousand_samples_fit_in_little_memory(data, against):
    images = data.train.repeat(23, 1, 1, 1)[:20000]
    Path("/proc/self/clear_refs").write_text("5")  # peak := now
    before = resident("VmRSS")
    evaluate_images(images, in_turn(20000, 10), against, images)
    assert resident("VmHWM") - before < 250e6
    careless = torch.ones(20000, 2000, dtype=torch.float64)
    assert resident("VmHWM") - before > 250e6 and len(careless)  # the counter would have seen it
