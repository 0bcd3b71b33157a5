"""Frozen features of discriminators: how they are trained without labels, and who pays.

The budget is that of design.md, 'Benchmarks'.
"""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from distillbench import config, features
from distillbench.cells.build import build
from distillbench.cells.cell import Cell
from distillbench.cells.loop import train
from distillbench.cells.sampling import sample
from distillbench.cells.setup import attach, price
from distillbench.config import DigitsData
from distillbench.data import kinds
from distillbench.seeds import Rng
from tests.conftest import captured
from tests.test_meter import cell, quiet

DIGITS = kinds.load(DigitsData(kind="digits"))
CPU = torch.device("cpu")


def weights(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten().clone() for p in module.parameters()])


@pytest.mark.parametrize(
    "shape,expected",
    [
        ((1, 8, 8), [(64, 32), (16, 64), (4, 64)]),
        ((1, 4, 4), [(16, 32), (4, 64), (1, 64)]),
        ((3, 8, 8), [(64, 32), (16, 64), (4, 64)]),
        ((2,), [(1, 64)] * 3),
    ],
)
def test_tokens_of_every_shape_of_data(shape, expected):
    network = features.untrained(shape).requires_grad_(False)
    x = torch.randn(5, *shape).requires_grad_()
    tokens = network(x)
    assert [tuple(f.shape) for f in tokens] == [(5, *e) for e in expected]
    for f in tokens:  # the gradient reaches x from every layer, and rows do not see each other
        (gradient,) = torch.autograd.grad(f[0].sum(), x, retain_graph=True)
        assert gradient[0].abs().max() > 0 and gradient[1:].abs().max() == 0
    with pytest.raises(RuntimeError):  # planted: under no_grad nothing would
        with torch.no_grad():
            lost = network(x)
        torch.autograd.grad(lost[0].sum(), x)


def test_a_token_is_a_place_in_the_picture():
    network, x = features.untrained((1, 8, 8)), torch.zeros(1, 1, 8, 8)
    changed = x.clone()
    changed[0, 0, 0, 7] = 1.0  # first row, last column
    moved = (network(changed)[0] - network(x)[0])[0].abs().amax(1).nonzero()[:, 0].tolist()
    # its 3 x 3 neighbourhood, row by row; planted: column by column it would be 48, 49, 56, 57
    assert moved == [
        6,
        7,
        14,
        15,
    ]


# Views


class Middle:
    """A stream whose every number is `value`."""

    def __init__(self, *values: float):
        self.values = itertools.cycle(values)

    def uniform(self, n: int) -> Tensor:
        return torch.full((n,), next(self.values))


def test_a_view_without_magnitude_is_the_image():
    x = DIGITS.train[:32]
    torch.testing.assert_close(features.view(x, Middle(0.5)), x, rtol=0, atol=1e-5)
    assert (features.view(x, Rng(0, "view")) - x).abs().max() > 0.5  # planted: a real draw


def test_a_view_moves_by_a_share_of_half_the_picture():
    x = DIGITS.train[:32]
    # dx = 1: looks a quarter of 4 pixels, one pixel, to the right
    right = features.view(x, Middle(1.0, 0.5, 0.5, 0.5))
    expected = torch.cat([x[..., 1:], torch.full_like(x[..., :1], -1)], 3)
    torch.testing.assert_close(right, expected, rtol=0, atol=1e-5)
    assert (right - expected.transpose(2, 3)).abs().max() > 0.5  # planted: up instead


def test_views_keep_range_and_background():
    x, blank = DIGITS.train[:256], torch.full((256, 1, 8, 8), -1.0)
    seen = features.view(x, Rng(0, "view"))
    assert seen.shape == x.shape and seen.min() >= -1 - 1e-5 and seen.max() <= 1 + 1e-5
    torch.testing.assert_close(features.view(blank, Rng(0, "view")), blank, rtol=0, atol=1e-5)
    one, two = (
        features.view(x[:1].expand(64, 1, 8, 8), Rng(0, "view")),
        features.view(x[:1].expand(64, 1, 8, 8), Rng(1, "view")),
    )
    # every row its own
    assert len({tuple(v.flatten().tolist()) for v in torch.cat([one, two])}) == 128


# The contrastive loss


def test_contrast_loss_against_its_formula():
    one, two = torch.randn(2, 5, 7, dtype=torch.float64)
    z = [v / v.norm() for v in [*one, *two]]

    def direct(partner) -> float:
        terms = []
        for i in range(10):
            similar = [torch.exp(z[i] @ z[j] / features.TEMPERATURE) for j in range(10)]
            terms.append(-torch.log(similar[partner(i)] / (sum(similar) - similar[i])))
        return (sum(terms) / 10).item()

    found = features.contrast_loss(one, two).item()
    assert found == pytest.approx(direct(lambda i: (i + 5) % 10), rel=1e-12)
    assert abs(found - direct(lambda i: (i + 1) % 10)) > 0.05  # planted: the next row as partner
    # equal views are near each other, others are not
    assert features.contrast_loss(one, one + 1e-3 * two) < 0.5 * found
    assert features.contrast_loss(one, one[[1, 2, 3, 4, 0]]) > found


# Training


def trained(seed: int, updates: int) -> nn.Module:
    torch.manual_seed(seed)
    network = features.untrained((1, 8, 8))
    features.pretrain(
        network.requires_grad_(False),
        DIGITS.draw,
        DIGITS.shape,
        Rng(seed, "pretrain"),
        torch.device("cpu"),
        updates,
    )
    return network


def test_training_lowers_the_loss_and_repeats_to_the_byte(monkeypatch):
    calls = captured(monkeypatch, features, "contrast_loss")
    trained(0, 30)
    losses = [value.item() for _, value in calls]
    assert sum(losses[-5:]) / 5 < losses[0] - 1.0 and len(losses) == 30
    one = weights(trained(0, 4))
    assert torch.equal(one, weights(trained(0, 4))) and not torch.equal(one, weights(trained(1, 4)))
    monkeypatch.setattr(features, "RATE", 0.0)  # planted: nothing is learnt
    calls.clear()
    trained(0, 6)
    assert calls[-1][1].item() > losses[0] - 0.5


def test_what_was_trained_is_frozen_and_passes_gradients_on():
    torch.manual_seed(0)
    network = features.untrained((1, 8, 8)).requires_grad_(False)
    before = weights(network)
    features.pretrain(network, DIGITS.draw, DIGITS.shape, Rng(0, "pretrain"), CPU, 0)
    assert torch.equal(weights(network), before)  # no updates: nothing changes
    features.pretrain(network, DIGITS.draw, DIGITS.shape, Rng(0, "pretrain"), CPU, 2)
    assert not torch.equal(weights(network), before)
    assert all(not p.requires_grad and p.grad is None for p in network.parameters())
    x = DIGITS.train[:4].clone().requires_grad_()
    sum(f.sum() for f in network(x)).backward()
    assert x.grad.abs().max() > 0 and all(p.grad is None for p in network.parameters())


# In a cell

METHOD = """
from typing import Literal
from pydantic import BaseModel
from distillbench.method import Method, Needs
from distillbench.players import PlayerConfig

class Judged(Method):
    class Config(BaseModel):
        features: Literal["self_supervised", "random"] | None

    @classmethod
    def needs(cls, config):
        return Needs(batch=16, nfe=(1,), headline_nfe=1, data=True, features=config.features)

    def __init__(self, task, config):
        self.task, self.net = task, task.network("teacher")
        self.student = task.player("student", PlayerConfig(lr=1e-3), self.net)

    def train_step(self, batch, step):
        x = self.net(batch.x, step.rng("t").uniform(16), batch.cond.labels)
        features = [x] if self.task.features is None else self.task.features(x)
        loss = sum(f.square().mean() for f in features)
        self.student.update(loss)
        return {"loss": loss.detach()}

    def sample(self, noise, cond, nfe, rng):
        return noise - self.student.averaged()(noise, noise.new_ones(len(noise)), cond.labels)
"""
SETTINGS = """
title: Judged
paper: none
fidelity: reconstruction
config: {features: self_supervised}
variants:
  random: {config: {features: random}}
  without: {config: {features: null}}
"""


@pytest.fixture
def judged(checkout):
    """The checkout with a method that asks for features."""
    checkout.write("methods/judged/method.py", METHOD)
    checkout.write("methods/judged/config.yaml", SETTINGS)
    return checkout


def with_budget(flops: float, name: str = "judged", benchmark: str = "tiny"):
    budget = config.benchmark(benchmark).budget.model_copy(update={"flops": flops})
    return cell(name, benchmark, budget=budget)


def test_training_of_the_features_is_charged(judged):
    made = with_budget(1e11)
    plan, prepared = price(made, quiet)
    assert 0.04e11 < plan.setup_flops <= 0.05e11 * 1.001 and plan.flops <= 1e11
    assert plan.rows["features"] > 16 * plan.steps  # those of its training come on top
    free, nothing = price(with_budget(1e11, "judged@random"), quiet)
    assert free.setup_flops == 0 and not nothing and set(prepared) == {"features"}
    cycle = free.flops / free.steps
    # Planted: uncharged, they would be equal
    assert free.steps - plan.steps == pytest.approx(plan.setup_flops / cycle, abs=1)


def test_a_rebuilt_run_gets_the_same_features(judged):
    made = with_budget(3e10)
    plan, prepared = price(made, quiet)
    _, again = price(made, quiet)
    assert all(torch.equal(again["features"][k], v) for k, v in prepared["features"].items())
    raw = build(made).task.features
    run = attach(build(made), prepared)
    assert all(
        torch.equal(v, prepared["features"][k]) for k, v in run.task.features.state_dict().items()
    )
    # Planted: a run that is built only
    assert not torch.equal(weights(run.task.features), weights(raw))
    assert all(not p.requires_grad for p in run.task.features.parameters())
    before = weights(run.task.features)
    train(run, replace(plan, steps=3, updates={"student": 3}), quiet)
    assert torch.equal(weights(run.task.features), before)


def test_a_budget_without_room_for_an_update_leaves_them_as_they_are(judged):
    made = with_budget(1.5e9)
    _, prepared = price(made, quiet)
    assert torch.equal(
        weights(attach(build(made), prepared).task.features),
        weights(build(made).task.features),
    )


def test_random_features_repeat_by_seed_and_are_withheld_unless_asked_for(judged):
    made = with_budget(1e11, "judged@random")
    one, two = (weights(build(made).task.features) for _ in range(2))
    other = Cell(made.benchmark, made.arm, 1)
    other.teacher.folder.mkdir(parents=True, exist_ok=True)
    (other.teacher.folder / "teacher.safetensors").write_bytes(
        (made.teacher.folder / "teacher.safetensors").read_bytes()
    )
    assert torch.equal(one, two) and not torch.equal(one, weights(build(other).task.features))
    assert build(with_budget(1e11, "judged@without")).task.features is None


def test_points_keep_random_features(judged):
    made = with_budget(1e11, benchmark="tiny-ring")
    plan, prepared = price(made, quiet)
    assert prepared == {} and plan.setup_flops < 1e-6 * plan.flops
    run = build(made)
    assert isinstance(run.task.features, features.PointFeatures)
    assert sample(run, 1, 10, quiet).shape == (10, 2)
