"""A method computes on CUDA what it computes on the CPU.

Compared are gradients, scalars and samples of every arm, the derivative, the optimiser and the
features.

The comparison itself is tried here on any machine: against a copy whose weights are off by
float32's rounding, which must pass, and against one with a wrong weight, which must fail. Scores
of `eval/` are computed on the CPU by design (`eval/metrics/pairwise.py` uses numpy's BLAS,
`Extractor.features` takes its images there); what touches a device is the extractors' networks
and three scores of classes.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from distillbench import config, features
from distillbench.jvp import value_and_tangent
from distillbench.meter import Meter
from distillbench.method import Batch, Condition, Method, Needs, Step, Task
from distillbench.networks.dit import DiT
from distillbench.networks.mlp import VelocityMLP
from distillbench.players import Player, PlayerConfig
from distillbench.registry import folders
from distillbench.registry.folders import Arm
from distillbench.seeds import Rng, derive
from perf.gpu import TINY, configured, random_batch
from tests.toys import CLASSES, random_task

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is available")

ROOT = Path(__file__).parents[1]
SHAPE, ROWS = (1, 4, 4), 16
TOLERANCE = 1e-4
SMALL = 1e-5  # of a player's whole gradient: what a tensor's own, next to zero, may differ by
TINIEST = 1e-6  # the same of a scalar
STEPS = 6  # of a cycle, at most
ROUNDING = 2.0**-23


def arm_names() -> list[str]:
    """Every method and variant of the checkout this file is in, wherever pytest runs from."""
    out = []
    for path in sorted((ROOT / "methods").glob("*/method.py")):
        out += [
            path.parent.name,
            *(f"{path.parent.name}@{v}" for v in folders.read_folder(path.parent).file.variants),
        ]
    return out


ARMS = arm_names()


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch):
    """The checkout's root, and float32 without TF32 on either side; autocast is off."""
    monkeypatch.chdir(ROOT)
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


@dataclass
class Made:
    """An arm on a device, with a batch."""

    method: Method
    needs: Needs
    task: Task
    batch: Batch
    device: torch.device

    @property
    def networks(self) -> list[nn.Module]:
        """All that it uses, in one order on every device."""
        own = [*self.task._roles, self.task.teacher.network]
        return own if self.task.features is None else [*own, self.task.features]


def made(arm: Arm, device: str) -> Made:
    """The arm on the toy task with a random teacher.

    One that starts from another arm gets that one's new student, shaken.
    """
    cls, settings = configured(arm, ROWS)
    needs, frozen, start = cls.needs(settings), None, None
    if needs.features is not None:
        torch.manual_seed(2)
        frozen = features.untrained(SHAPE).requires_grad_(False)
    if arm.start is not None:
        first = made(arm.start, "cpu")
        shake(first)
        start = first.task.players["student"].networks[0].state_dict()
    task = random_task(SHAPE, features=frozen, device=device, start=start)
    torch.manual_seed(derive(0, "build"))
    method = cls(task, settings)
    for player in task.players.values():
        player.total_updates = 50
    scale = replace(TINY, shape=SHAPE, classes=CLASSES)
    return Made(
        method, needs, task, random_batch(needs, scale, torch.device(device)), torch.device(device)
    )


def shake(m: Made) -> None:
    """Move networks off the teacher, where they start, so that velocities differ.

    Moving averages stay behind.
    """
    torch.manual_seed(3)
    for p in [p for network in m.task._roles for p in network.parameters()]:
        p.data.add_(0.1 * torch.randn_like(p))


def equalise(source: Made, target: Made) -> None:
    """All weights and averages of `source`, and the optimisers' state, in `target`."""
    for a, b in zip(source.networks, target.networks, strict=True):
        b.load_state_dict(a.state_dict())
    for name, player in source.task.players.items():
        target.task.players[name].load_state_dict(player.state_dict())


def pair(name: str, device: str) -> tuple[Made, Made]:
    """The arm on the CPU and the same on `device`."""
    arm = folders.arm(name)
    one, two = made(arm, "cpu"), made(arm, device)
    shake(one)
    equalise(one, two)
    return one, two


def indices(needs: Needs) -> tuple[list[int], int]:
    """Steps to look at, and of how many: the first ones, and a cycle from the middle.

    By the middle what has a delay is at work.
    """
    total = 4 * needs.cycle
    start = 2 * needs.cycle
    return sorted({0, min(4, total - 1), *range(start, start + min(needs.cycle, STEPS))}), total


def one_step(m: Made, index: int, total: int) -> dict[str, Tensor]:
    torch.manual_seed(derive(0, "global", index))
    return m.method.train_step(m.batch, Step(index, total, 0, m.device))


def observed(m: Made, index: int, total: int) -> tuple[dict[str, float], dict[str, list[Tensor]]]:
    """Logged scalars and, by player, every parameter's clipped gradient in a step without updates.

    AdamW's first move is close to the sign of the gradient: where that is rounding, weights would
    tell nothing.
    """
    gradients: dict[str, list[Tensor]] = {}

    def record(name: str, player: Player):
        def step() -> None:
            assert name not in gradients, (
                "a second update in one step would be of weights that have not moved"
            )
            for p in player.parameters:  # fused AdamW on CUDA refuses others
                assert p.grad.stride() == p.stride() or p.numel() == max(p.shape), (
                    f"{name}: gradient of another memory layout"
                )
            gradients[name] = [p.grad.detach().cpu().double() for p in player.parameters]

        return step

    averages = {name: copy.deepcopy(player.averages) for name, player in m.task.players.items()}
    with pytest.MonkeyPatch.context() as patch:
        for name, player in m.task.players.items():
            patch.setattr(player.optimizer, "step", record(name, player))
        logged = one_step(m, index, total)
    for name, player in m.task.players.items():
        player.averages, player.updates = averages[name], 0
    return {k: float(v) for k, v in logged.items()}, gradients


def differences(one: Made, two: Made) -> list[str]:
    """Where two arms with the same weights disagree, in scalars, gradients and samples."""
    out = []
    steps, total = indices(one.needs)
    for index in steps:
        (logged, gradients), (others, other_gradients) = (
            observed(one, index, total),
            observed(two, index, total),
        )
        assert (
            logged.keys() == others.keys()
            and gradients.keys() == other_gradients.keys()
            and gradients
        )
        for name, a in logged.items():
            if not abs(a - others[name]) <= TOLERANCE * abs(a) + TINIEST:
                out.append(f"step {index}: {name} {a:.8g} {others[name]:.8g}")
        for name, parts in gradients.items():
            whole = torch.stack([g.norm() for g in parts]).norm()
            for i, (a, b) in enumerate(zip(parts, other_gradients[name], strict=True)):
                if not (gap := (a - b).norm()) <= TOLERANCE * a.norm() + SMALL * whole:
                    out.append(
                        f"step {index}: gradient {i} of {name}: "
                        f"off by {gap:.3g}, norm {a.norm():.3g}, of all {whole:.3g}"
                    )
    noise, labels = Rng(0, "noise").normal(8, *SHAPE), torch.arange(8) % CLASSES
    for nfe in one.needs.nfe:
        with torch.no_grad():
            a, b = (
                m.method.sample(
                    noise.to(m.device),
                    Condition(labels.to(m.device)),
                    nfe,
                    Rng(0, "sampler", device=m.device),
                ).cpu()
                for m in (one, two)
            )
        if not (gap := (a - b).norm()) <= TOLERANCE * a.norm():
            out.append(f"samples at nfe {nfe}: off by {gap:.3g}, norm {a.norm():.3g}")
    return out


def off_by_rounding(m: Made) -> None:
    """Every weight times 1 + 2^-23 e: about what another order of summation does to activations."""
    torch.manual_seed(4)
    for p in [p for network in m.networks for p in network.parameters()]:
        p.data.mul_(1 + ROUNDING * torch.randn_like(p))


@pytest.mark.parametrize("name", sorted({name.partition("@")[0] for name in ARMS}))
def test_the_comparison_stands_rounding_and_sees_a_wrong_weight(name):
    one, two = pair(name, "cpu")
    assert differences(one, two) == []
    off_by_rounding(two)
    assert differences(one, two) == []
    student = two.task.players["student"]
    for net in (student.networks[0], student.averaged()):
        net.leave.weight.data.mul_(1.001)
    found = differences(one, two)
    assert any("gradient" in line for line in found) and any("samples" in line for line in found)


@needs_cuda
@pytest.mark.parametrize("name", ARMS)
def test_a_step_and_samples_are_the_cpus(name):
    one, two = pair(name, "cuda")
    assert {p.device.type for network in two.networks for p in network.parameters()} == {"cuda"}
    assert differences(one, two) == []


@needs_cuda
@pytest.mark.parametrize("name", ARMS)
def test_updates_move_and_resume(name):
    moves_and_resumes(name, "cuda")


@pytest.mark.parametrize("name", sorted({name.partition("@")[0] for name in ARMS}))
def test_updates_move_and_resume_here(name):
    moves_and_resumes(name, "cpu")


def moves_and_resumes(name: str, device: str) -> None:
    """Real updates over a cycle on a device, with a copy that goes on alike half way.

    The copy takes its state from the first by way of the CPU.
    """
    arm = folders.arm(name)
    one, two = made(arm, device), made(arm, device)
    shake(one)
    before = {
        n: [p.detach().clone() for p in player.parameters] for n, player in one.task.players.items()
    }
    cycle, total = min(one.needs.cycle, STEPS), 4 * one.needs.cycle
    for i in range(cycle):
        assert all(torch.isfinite(v).all() for v in one_step(one, i, total).values())
    for n, player in one.task.players.items():
        moved = any(not torch.equal(a, b) for a, b in zip(before[n], player.parameters))
        assert moved == (player.updates > 0) and all(p.isfinite().all() for p in player.parameters)
    assert any(player.updates for player in one.task.players.values())
    for a, b in zip(one.networks, two.networks, strict=True):  # frozen ones
        b.load_state_dict(a.state_dict())
    for n, player in one.task.players.items():
        two.task.players[n].load_state_dict(
            {
                k: v.to(device)
                for k, v in {k: v.cpu() for k, v in player.state_dict().items()}.items()
            }
        )
    two.method.load_state_dict({k: v.clone() for k, v in one.method.state_dict().items()})
    a, b = one_step(one, cycle, total), one_step(two, cycle, total)
    for key, value in a.items():
        torch.testing.assert_close(value, b[key], rtol=TOLERANCE, atol=TINIEST)


@needs_cuda
def test_adamw_with_clipping_and_averages_is_the_cpus():
    torch.manual_seed(0)
    cpu = nn.Linear(6, 4)
    cuda = copy.deepcopy(cpu).to("cuda")
    settings = PlayerConfig(
        lr=1e-2,
        weight_decay=0.1,
        clip=0.5,
        warmup=0.2,
        final_lr=0.1,
        half_lives={"evaluation": 0.3},
    )
    x, y = torch.randn(32, 6), torch.randn(32, 4)
    players = [Player("student", [net], settings, Meter()) for net in (cpu, cuda)]
    for player, device in zip(players, ("cpu", "cuda")):
        player.total_updates = 10
        for _ in range(10):
            player.update((player.networks[0](x.to(device)) - y.to(device)).square().mean())
    for net in (lambda p: p.networks[0], lambda p: p.averaged()):
        one, two = (net(p).state_dict() for p in players)
        for key in one:
            torch.testing.assert_close(two[key].cpu(), one[key], rtol=TOLERANCE, atol=1e-6)


def derivatives(make, graph: bool, device: str) -> list[Tensor]:
    """Value, tangent and, with a graph, the gradients of both, on a device."""
    torch.manual_seed(0)
    net = make()
    for p in net.parameters():
        nn.init.normal_(p, std=0.1)
    x, v = torch.randn(2, 6, *net.shape)
    t, s, labels = 0.2 + 0.7 * torch.rand(6), 0.2 * torch.rand(6), torch.arange(6) % CLASSES
    net, x, v, t, s, labels = (part.to(device) for part in (net, x, v, t, s, labels))
    m = 6 if graph else 4
    tangents = v[:m], t.new_ones(m), t.new_zeros(m)
    value, tangent = value_and_tangent(
        lambda x, t, s: net(x, t, labels, s=s), (x, t, s), tangents, graph
    )
    gradients = torch.autograd.grad(
        value.square().sum() + (tangent.square().sum() if graph else 0), list(net.parameters())
    )
    return [
        part.detach().cpu()
        for part in (value, tangent, torch.cat([g.flatten() for g in gradients]))
    ]


NETWORKS = {
    f"{kind}, {norms}": lambda kind=kind, norms=norms: (
        VelocityMLP((1, 4, 4), CLASSES, 32, 2, second_time=True, norms=norms)
        if kind == "mlp"
        else DiT((4, 8, 8), CLASSES, 64, 2, 2, 2, second_time=True, norms=norms)
    )
    for kind in ("mlp", "transformer")
    for norms in ("layer", "rms")
}


@needs_cuda
@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_value_and_tangent_are_the_cpus(make, graph):
    for one, two in zip(
        derivatives(make, graph, "cpu"), derivatives(make, graph, "cuda"), strict=True
    ):
        assert (one - two).norm() < TOLERANCE * one.norm()


@needs_cuda
def test_the_derivative_refuses_autocast_on_cuda_too():
    with (
        torch.autocast("cuda", torch.bfloat16),
        pytest.raises(RuntimeError, match="leave autocast"),
    ):
        derivatives(NETWORKS["mlp, layer"], False, "cuda")


@needs_cuda
@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_a_pass_in_bfloat16_is_near_that_in_float32(make):
    torch.manual_seed(0)
    net = make().cuda()
    for p in net.parameters():
        nn.init.normal_(p, std=0.1)
    x, t = torch.randn(6, *net.shape, device="cuda"), torch.rand(6, device="cuda")

    def f():
        return net(x, t, torch.arange(6, device="cuda") % CLASSES, s=0.5 * t)

    exact = f()
    with torch.autocast("cuda", torch.bfloat16):
        rounded = f()
        torch.autograd.grad(rounded.float().square().mean(), list(net.parameters()))
    assert (rounded.float() - exact).norm() < 0.05 * exact.norm()


@cache
def digits(n: int = 600) -> Tensor:
    """uint8 [n, 1, 8, 8]."""
    from sklearn.datasets import load_digits

    return (
        (torch.from_numpy(load_digits().images[:n]).float() * 255 / 16)
        .round()
        .to(torch.uint8)[:, None]
    )


EXTRACTORS = ["digits-gelu-64", "digits-simclr-64"]


def extracted(name: str) -> list[tuple[Tensor, Tensor | None]]:
    """Features and logits of an extractor's network on the CPU and on CUDA, as CPU tensors."""
    from eval.features.extractor import scaled
    from eval.features.extractors import load_extractor

    extractor, images = load_extractor(name), digits()
    found = copy.deepcopy(extractor.network).cuda()(scaled(images.cuda()))
    return [
        extractor.features(images),
        tuple(None if part is None else part.cpu() for part in found),
    ]


@needs_cuda
@pytest.mark.parametrize("name", EXTRACTORS)
def test_an_extractor_gives_the_cpus_features(name):
    for one, two in zip(*extracted(name), strict=True):
        assert (one is None) == (two is None)
        assert one is None or (one - two).norm() < TOLERANCE * one.norm()


@needs_cuda
@pytest.mark.parametrize("name", EXTRACTORS)
def test_features_from_cuda_score_as_the_cpus(name):
    pytest.importorskip("torch_fidelity", reason="torch-fidelity is not installed")
    from eval.metrics.scores import feature_scores
    from eval.metrics.statistics import Reference

    (expected, _), (found, _) = extracted(name)
    reference = Reference(expected[300:], "")
    scores, others = (feature_scores(part[:300], reference) for part in (expected, found))
    assert others == pytest.approx(scores, rel=TOLERANCE, abs=TOLERANCE)


@needs_cuda
def test_scores_of_classes_take_tensors_on_cuda():
    from eval.metrics import conditional

    torch.manual_seed(0)
    logits, labels = torch.randn(300, 10), torch.arange(300) % 10
    points, reference, others = torch.randn(300, 16), torch.randn(200, 16), torch.arange(200) % 10
    for score, arguments in (
        (conditional.class_accuracy, (logits, labels)),
        (conditional.label_tv, (logits, labels)),
        (conditional.diversity, (points, labels, reference, others)),
    ):
        assert score(*(a.cuda() for a in arguments)) == pytest.approx(
            score(*arguments), rel=TOLERANCE
        ), score.__name__


@needs_cuda
@pytest.mark.parametrize("name", ["dmd", "add", "meanflow"])
@pytest.mark.parametrize("where", ["tiny", "tiny-ring"])
def test_a_cell_trains_and_samples_on_cuda(checkout, name, where):
    a_cell(where, name)


@pytest.mark.parametrize("where", ["tiny", "tiny-ring"])
def test_a_cell_trains_and_samples_here(checkout, where, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    # of this whole process, in which others use a GPU
    monkeypatch.setattr("distillbench.cells.train.limit_memory", lambda: None)
    a_cell(where, "dmd")
    torch.set_flush_denormal(False)


def a_cell(where: str, name: str) -> None:
    """The whole way of a cell in a throw-away checkout.

    Teacher, pairs or features, training, samples, and its weights read again.
    """
    from distillbench.cells import train
    from distillbench.cells.build import restore
    from distillbench.cells.cell import Cell
    from distillbench.cells.sampling import sample

    def quiet(*_):
        return None

    cell = Cell(config.benchmark(where), folders.arm(name), 0)
    for one in (cell.teacher, cell):
        with one.locked():
            record = train.run_cell(one, quiet)
        assert record["status"] == "done", record
    with torch.no_grad():
        again = sample(restore(cell), 1, 100, quiet)
    assert again.shape[0] == 100 and again.device.type == "cpu"
