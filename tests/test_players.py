"""What moves a player: design.md 'The interface'.

Own parameters, schedule, clipping, moving averages, checkpoints, ranks.
"""

import copy
import math
import os
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from distillbench.meter import Meter
from distillbench.method import Step
from distillbench.players import Player, PlayerConfig


def player(*networks: nn.Module, total: int = 100, **config) -> Player:
    made = Player("p", networks, PlayerConfig.model_validate({"lr": 1e-2} | config), Meter())
    made.total_updates = total
    return made


class Scalar(nn.Module):
    """One parameter: the loss `self.p` has gradient 1, and AdamW moves it by exactly -lr."""

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.p


# a loss may pass through a critic without touching it
def test_an_update_differentiates_its_own_parameters_only():
    student, critic = nn.Linear(4, 4), nn.Linear(4, 4)
    s, c = player(student), player(critic)
    x = torch.randn(8, 4)
    before = copy.deepcopy(critic.state_dict())
    s.update(critic(student(x)).square().mean())
    assert all(p.grad is None for p in [*student.parameters(), *critic.parameters()])
    c.update(critic(x).square().mean())
    alone = nn.Linear(4, 4)
    alone.load_state_dict(before)
    player(alone).update(alone(x).square().mean())
    assert all(torch.equal(a, b) for a, b in zip(alone.parameters(), critic.parameters()))
    gradient, own = 10 * c.optimizer.state[critic.weight]["exp_avg"], nn.Linear(4, 4)
    own.load_state_dict(before)
    own(x).square().mean().backward()
    torch.testing.assert_close(gradient, own.weight.grad)
    own(student(x)).square().mean().backward()
    # Planted: loss.backward() of the student reaches the critic as well.
    assert not torch.allclose(gradient, own.weight.grad)


def test_a_player_of_several_networks_moves_together_and_unused_parameters_stay():
    a, b, unused = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
    made = player(a, b, unused)
    before = [copy.deepcopy(net.weight) for net in (a, b, unused)]
    made.update(b(a(torch.randn(4, 3))).square().mean())
    moved = [not torch.equal(net.weight, old) for net, old in zip((a, b, unused), before)]
    assert moved == [True, True, False] and made.updates == 1


def test_frozen_parameters_are_no_part_of_a_player():
    net = nn.Linear(3, 3)
    net.bias.requires_grad_(False)
    made = player(net, weight_decay=0.1)
    before = net.bias.clone()
    made.update(net(torch.randn(4, 3)).square().mean())
    assert len(made.parameters) == 1 and torch.equal(net.bias, before)


def test_schedule_over_the_players_own_updates():
    net = Scalar()
    made, positions = player(net, lr=1.0, warmup=0.1, final_lr=0.02), [0.0]
    for _ in range(100):
        made.update(net.p.sum())
        positions.append(-float(net.p.detach()))
    rates = [b - a for a, b in pairwise(positions)]  # the lr that was really used

    def cosine(i):
        return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * i / 100))

    # linear warm-up over the first tenth: 1/10, 2/10, ...
    assert rates[0] == pytest.approx(0.1, rel=1e-6)
    assert rates[4] == pytest.approx(0.5 * cosine(4), rel=1e-6)
    assert rates[9] == pytest.approx(cosine(9), rel=1e-6)
    assert rates[50] == pytest.approx(0.51, rel=1e-6)
    assert rates[99] == pytest.approx(0.02, abs=1e-3) and made.learning_rate() == pytest.approx(
        0.02
    )
    # Planted: a warm-up that starts at 0
    assert rates[9] != pytest.approx(0.9 * cosine(9), rel=1e-3)


def test_default_rate_is_constant():
    made = player(Scalar(), lr=0.3)
    for made.updates in (0, 37, 99):
        assert made.learning_rate() == 0.3


# AdamW forgets the scale of a gradient, but its first moment does not
@pytest.mark.parametrize(("clip", "factor"), [(0.5, 0.1), (10.0, 1.0), (None, 1.0)])
def test_clipping(clip, factor):
    net = Scalar()
    made = player(net, clip=clip, betas=(0.9, 0.99))
    made.update(5 * net.p.sum())
    assert float(made.optimizer.state[net.p]["exp_avg"]) == pytest.approx(
        0.1 * 5 * factor, rel=1e-4
    )


# a share of the player's own updates: half of the weight is on the last such share
@pytest.mark.parametrize("half_life", [0.01, 0.03, 0.1, 0.2])
def test_half_life_at_the_end(
    half_life,
):
    net, total = Scalar(), 1000
    made = player(net, total=total, half_lives={"evaluation": half_life, "double": 2 * half_life})
    for i in range(total):
        if i == total - round(half_life * total):
            net.p.data.fill_(1.0)
        made.update(0 * net.p.sum())
    assert float(made.averaged("evaluation").p) == pytest.approx(0.5, abs=2e-3)
    # Planted: twice the half-life is not 0.5
    assert float(made.averaged("double").p) == pytest.approx(1 - 0.5**0.5, abs=2e-3)


@pytest.mark.parametrize("half_life", [0.01, 0.03])
def test_average_of_a_ramp(half_life):  # the average of a ramp lags by decay / (1 - decay) updates
    net, total = Scalar(), 1000
    made = player(net, lr=1.0, total=total, half_lives={"evaluation": half_life})
    for _ in range(total):
        made.update(net.p.sum())
    decay = 0.5 ** (1 / (half_life * total))
    assert (made.averaged().p - net.p).item() == pytest.approx(decay / (1 - decay), rel=2e-3)
    assert net.p.item() == pytest.approx(-total, rel=1e-6)


def test_the_first_average_is_the_network_itself():
    net = Scalar()
    made = player(net, lr=1.0, half_lives={"evaluation": 0.5})
    made.update(net.p.sum())
    assert (
        torch.equal(made.averaged().p, net.p) and made.averaged().p.data_ptr() != net.p.data_ptr()
    )
    assert made.averaged("none such") is net


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 4))


CONFIG = {
    "lr": 1e-2,
    "warmup": 0.2,
    "final_lr": 0.1,
    "clip": 0.5,
    "half_lives": {"evaluation": 0.2, "short": 0.05},
    "weight_decay": 0.01,
}


def move(made: Player, start: int, end: int) -> None:
    for i in range(start, end):
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(i))
        made.update((made.networks[0](x) - x.flip(1)).square().mean())


def test_a_state_dict_continues_bit_for_bit():
    whole, first = player(network(), total=20, **CONFIG), player(network(), total=20, **CONFIG)
    move(whole, 0, 20)
    move(first, 0, 9)
    state = {k: v.clone() for k, v in first.state_dict().items()}
    torch.manual_seed(9)
    resumed = player(nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 4)), total=20, **CONFIG)
    forgetful = copy.deepcopy(resumed)
    resumed.load_state_dict(copy.deepcopy(state))
    move(resumed, 9, 20)
    one, two = whole.state_dict(), resumed.state_dict()
    assert (
        one.keys() == two.keys()
        and all(torch.equal(one[k], two[k]) for k in one)
        and int(two["updates"]) == 20
    )
    # Planted: moments forgotten
    without = {k: v for k, v in state.items() if not k.startswith("optimizer.")}
    forgetful.load_state_dict(without)
    move(forgetful, 9, 20)
    assert not torch.equal(forgetful.networks[0][0].weight, whole.networks[0][0].weight)


def test_loading_a_state_does_not_tie_two_players_together():
    source = player(network(), **CONFIG)
    move(source, 0, 3)
    state = source.state_dict()
    one, two = player(network(), **CONFIG), player(network(), **CONFIG)
    one.load_state_dict(state)
    two.load_state_dict({k: v.clone() for k, v in state.items()})
    move(source, 3, 6)  # must not change what `one` loaded
    move(one, 3, 6)
    move(two, 3, 6)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters, two.parameters))


def train(rank: int, world: int, folder: str) -> None:
    """Five updates on 16 rows in all, shared by the ranks, beside a network nobody averages."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    if world > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world
        )
    made, local = player(network(), total=5, **CONFIG), network()
    optimizer = torch.optim.AdamW(local.parameters(), lr=1e-2)
    seen, means = [], []
    for i in range(5):
        step = Step(i, 5, 7, torch.device("cpu"))
        x = step.rng("x").normal(16 // world, 4)
        seen.append(x)
        loss = (made.networks[0](x) - x.flip(1)).square().mean()
        means.append(step.mean_across_ranks(loss.detach()))
        made.update(loss)
        optimizer.zero_grad()
        (local(x) - x.flip(1)).square().mean().backward()
        optimizer.step()
    torch.save(
        {"state": made.state_dict(), "rows": seen, "means": means, "local": local.state_dict()},
        f"{folder}/{world}-{rank}.pt",
    )
    if world > 1:
        dist.destroy_process_group()


# meanflow.md test 14; design.md: 1 rank and 2 ranks see the same batch
def test_two_ranks_are_one_rank(
    tmp_path: Path,
):
    torch.multiprocessing.spawn(train, (2, str(tmp_path)), nprocs=2)
    train(0, 1, str(tmp_path))
    one, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    for x, a, b in zip(one["rows"], first["rows"], second["rows"]):
        assert torch.equal(torch.stack([a, b], 1).flatten(0, 1), x) and not torch.equal(a, b)
    for k, value in one["state"].items():
        assert torch.equal(first["state"][k], second["state"][k]), k
        torch.testing.assert_close(first["state"][k], value, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.stack(first["means"]), torch.stack(one["means"]))
    assert torch.equal(torch.stack(first["means"]), torch.stack(second["means"]))
    # Planted: no averaging
    assert not torch.allclose(first["local"]["0.weight"], second["local"]["0.weight"], atol=1e-4)
