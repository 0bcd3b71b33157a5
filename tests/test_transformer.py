"""The transformer of image scale: shapes, start, derivative along (x, t, s), use by methods."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from distillbench import jvp as module
from distillbench.jvp import Dual, value_and_tangent
from distillbench.meter import Meter
from distillbench.method import Condition, Task, Teacher
from distillbench.networks.conditioning import HIGHEST
from distillbench.networks.dit import SIZES, DiT, positions
from distillbench.networks.mlp import VelocityMLP

SHAPE, CLASSES, B = (2, 4, 6), 3, 5
TINY = {"width": 16, "depth": 2, "heads": 2, "patch": 2}
LABELS = torch.arange(B) % (CLASSES + 1)


def network(**options) -> DiT:
    """Random weights everywhere, float64: at its own start it is zero and any derivative passes."""
    net = DiT(SHAPE, CLASSES, **TINY, **{"second_time": True, **options}).double()
    for p in net.parameters():
        nn.init.normal_(p, std=0.3)
    return net


def point() -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Primals (x, t, s) and a tangent in all three."""
    x, v = torch.randn(2, B, *SHAPE, dtype=torch.float64)
    t, dt, ds = 0.3 + 0.6 * torch.rand(3, B, dtype=torch.float64)
    return (x, t, t * torch.rand(B, dtype=torch.float64)), (v, dt, -ds)


def labelled(net: nn.Module):
    return lambda x, t, s: net(x, t, LABELS, s=s)


def relative(a: Tensor, b: Tensor) -> float:
    return float(((a - b).norm() / b.norm()).detach())


def layer_norm(h: Tensor, shape: tuple[int, ...], weight: None, bias: None, eps: float) -> Tensor:
    variance, mean = torch.var_mean(h, -1, keepdim=True, correction=0)
    return (h - mean) / (variance + eps).sqrt()


def theirs(f, primals, tangents) -> tuple[Tensor, Tensor]:
    """torch's derivative with another layer norm.

    Its native one has a tangent whose gradient is wrong (finite differences say so).
    """
    # the only attention with a forward mode
    with (
        sdpa_kernel(SDPBackend.MATH),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(F, "layer_norm", layer_norm)
        return jvp(f, primals, tangents)


def test_it_takes_what_the_small_network_takes():
    for norms in ("layer", "rms"):
        big, small = (
            make(SHAPE, CLASSES, **sizes, second_time=True, guidance=True, norms=norms)
            for make, sizes in ((DiT, TINY), (VelocityMLP, {"width": 16, "depth": 2}))
        )
        (x, t, s), _ = ([part.float() for part in parts] for parts in point())
        for net in (big, small):
            assert net(x, t, LABELS, s=s, guidance=t).shape == x.shape
            assert [f.shape for f in net(x, t, LABELS, s=s, guidance=t, features=1)] == [(B, 16)]
            with pytest.raises(ValueError, match="2 blocks"):
                net(x, t, LABELS, s=s, guidance=t, features=3)
        names = [{n.partition(".")[0] for n, _ in net.named_children()} for net in (big, small)]
        assert names[0] == names[1], "heads and copies of weights find their parts by these names"
    assert DiT(SHAPE, 0, **TINY)(x, t).shape == x.shape
    for wrong in ({"patch": 4}, {"heads": 3}, {"width": 18, "heads": 2}):
        with pytest.raises(ValueError, match="must"):
            DiT(SHAPE, CLASSES, **{**TINY, **wrong})


def test_patches_are_tiles_and_come_back():
    net, x = DiT(SHAPE, CLASSES, **TINY), torch.arange(2 * 2 * 4 * 6).float().reshape(2, *SHAPE)
    tokens = net.patches(x)
    assert torch.equal(net.image(tokens), x) and tokens.shape == (2, 6, 8)
    # the fifth patch: second row, second column
    assert torch.equal(tokens[1, 4], x[1, :, 2:4, 2:4].flatten())
    place = positions(2, 3, 16)
    assert place.shape == (6, 16) and place.unique(dim=0).shape[0] == 6
    # the row first, then the column
    assert torch.equal(place[4, :8], place[3, :8]) and torch.equal(place[4, 8:], place[1, 8:])


def test_it_starts_at_zero_and_its_blocks_as_the_identity():
    net = DiT(SHAPE, CLASSES, **TINY, second_time=True)
    (x, t, s), _ = ([part.float() for part in parts] for parts in point())
    assert not net(x, t, LABELS, s=s).any()
    h = torch.randn(B, 6, 16)
    assert torch.equal(net.blocks[0](h, torch.randn(B, 16)), h)
    one, two = net(x, t, LABELS, s=s, features=2)
    assert torch.equal(one, two) and torch.allclose(
        one, (net.enter(net.patches(x)) + net.positions).mean(1)
    )
    loss = (net(x, t, LABELS, s=s) - x).square().mean()
    assert torch.autograd.grad(loss, net.leave.weight)[0].any(), "and leaves it"


def test_features_are_the_mean_tokens_of_the_first_blocks():
    net, seen = network(), []
    (x, t, s), _ = point()
    for block in net.blocks:
        block.register_forward_hook(lambda _block, _args, out: seen.append(out))
    kept = net(x, t, LABELS, s=s, features=1)
    assert len(seen) == 1 and torch.equal(kept[0], seen[0].mean(1)), (
        "what comes after is not evaluated"
    )
    assert not torch.allclose(seen[0][:, 0], seen[0][:, 1])


def test_the_inputs_count():
    net = network(guidance=True)
    (x, t, s), _ = point()
    base = net(x, t, LABELS, s=s, guidance=t)
    moves = [
        (x.roll(2, 3), t, LABELS, s, t),
        (x, t + 0.1, LABELS, s + 0.1, t),
        (x, t, LABELS.roll(1), s, t),
    ]
    for changed in (*moves, (x, t, LABELS, 0 * s, t), (x, t, LABELS, s, 2 * t)):
        assert relative(net(*changed[:3], s=changed[3], guidance=changed[4]), base) > 1e-3
    # Attention mixes tokens: a change in one patch is seen in all; without it, in one.
    other = x.clone()
    other[:, :, :2, :2] += 1

    def moved():
        gap = net(other, t, LABELS, s=s, guidance=t) - net(x, t, LABELS, s=s, guidance=t)
        return (net.patches(gap).norm(dim=2) > 1e-9).sum(1)

    assert (moved() == 6).all()
    for block in net.blocks:
        block.attention.out.weight.data.zero_()
    assert (moved() == 1).all()


def test_time_enters_smoothly():
    def roughness(net: nn.Module, h: float = 1e-3) -> float:
        """Largest second difference in t over the largest first: a bound on the frequencies."""
        t = torch.arange(200, dtype=torch.float64) * h
        out = net.time(t).detach()
        first, second = out.diff(dim=0) / h, out.diff(n=2, dim=0) / h**2
        return float(second.norm(dim=1).max() / first.norm(dim=1).max())

    net = network()
    assert roughness(net) < 4 * HIGHEST
    rough = copy.deepcopy(net)
    rough.time.frequencies *= 100  # up to 1200: as with embeddings of 1000 t
    assert roughness(rough) > 4 * HIGHEST


@pytest.mark.parametrize("norms", ["layer", "rms"])
@pytest.mark.parametrize("graph", [False, True])
def test_value_and_tangent_are_those_of_torch(norms, graph):
    net = network(norms=norms)
    primals, tangents = point()
    value, tangent = theirs(labelled(net), primals, tangents)
    ours = value_and_tangent(labelled(net), primals, tangents, graph)
    assert (
        relative(ours[0], value) < 1e-12
        and relative(ours[1], tangent) < 1e-11
        and ours[1].requires_grad == graph
    )
    for i in range(3):  # each input on its own has a part in it
        alone = tuple(d if i == j else torch.zeros_like(d) for j, d in enumerate(tangents))
        assert (
            relative(
                value_and_tangent(labelled(net), primals, alone, graph)[1],
                theirs(labelled(net), primals, alone)[1],
            )
            < 1e-11
        )
        assert theirs(labelled(net), primals, alone)[1].norm() > 1e-3 * tangent.norm()


def test_tangent_of_the_first_rows_only():
    net = network()
    primals, tangents = point()
    whole, part = (
        value_and_tangent(labelled(net), primals, tuple(d[:m] for d in tangents), False)
        for m in (B, 3)
    )
    assert torch.allclose(part[0], whole[0]) and relative(part[1], whole[1][:3]) < 1e-12


@pytest.mark.parametrize("norms", ["layer", "rms"])
def test_gradients_of_value_and_tangent(norms):
    net = network(norms=norms)
    primals, tangents = point()
    weights, (a, b) = dict(net.named_parameters()), torch.randn(2, B, *SHAPE, dtype=torch.float64)

    def gradients(value: Tensor, tangent: Tensor) -> list[Tensor]:
        return list(
            torch.autograd.grad((a * value).sum() + (b * tangent).sum(), list(weights.values()))
        )

    expected = gradients(
        *theirs(
            lambda x, t, s: functional_call(net, weights, (x, t, LABELS), {"s": s}),
            primals,
            tangents,
        )
    )
    found = gradients(*value_and_tangent(labelled(net), primals, tangents, True))
    scale = torch.stack([e.norm() for e in expected]).norm()
    for name, one, two in zip(weights, found, expected):
        assert (one - two).norm() < 1e-10 * scale, name
    value, tangent = value_and_tangent(labelled(net), primals, tangents, False)
    alone = torch.autograd.grad((a * value).sum(), net.enter.weight)[0]
    assert (
        not tangent.requires_grad
        and relative(alone, expected[list(weights).index("enter.weight")]) > 1e-3
    )


def without_queries(head, q: Dual, k: Dual, v: Dual) -> Tensor:
    p = torch.softmax(head(q).shape[-1] ** -0.5 * head(q) @ head(k).mT, -1)
    return p @ v.tangent


def unnormalised(head, q: Dual, k: Dual, v: Dual) -> Tensor:
    scale = head(q).shape[-1] ** -0.5
    p = torch.softmax(scale * head(q) @ head(k).mT, -1)
    return p * scale * (q.tangent @ head(k).mT + head(q) @ k.tangent.mT) @ head(v) + p @ v.tangent


@pytest.mark.parametrize(
    ("operation", "planted"),
    [
        ("scaled_dot_product_attention", without_queries),
        ("scaled_dot_product_attention", unnormalised),
        ("gelu", lambda head, x, approximate: x.tangent * torch.sigmoid(1.702 * head(x))),
        ("permute", lambda head, x, dims: x.tangent.permute(dims).flip(1)),
    ],
)
def test_a_wrong_rule_is_found(operation, planted, monkeypatch):
    net = network()
    primals, tangents = point()
    expected = theirs(labelled(net), primals, tangents)[1]
    monkeypatch.setitem(module.RULES, operation, planted)
    assert relative(value_and_tangent(labelled(net), primals, tangents, False)[1], expected) > 1e-3


def test_what_the_rules_do_not_cover_is_refused():
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)

    def causal(h):
        return F.scaled_dot_product_attention(h, h, h, is_causal=True)

    for f in (F.gelu, causal, lambda h: h.permute(1, 0, 2, 3), lambda h: h.mean(1)):
        with pytest.raises((NotImplementedError, TypeError)):
            value_and_tangent(f, (x,), (x,), False)


def test_b2_is_the_papers_size():
    with torch.device("meta"):
        net = DiT((4, 32, 32), 1000, **SIZES["B/2"])
    count = sum(p.numel() for p in net.parameters())
    # arXiv 2212.09748, Table 1: 130M, with another time embedding and without the variances
    assert 125e6 < count < 135e6


def test_a_task_hands_it_out():
    torch.manual_seed(3)
    teacher = DiT(SHAPE, CLASSES, **TINY)
    for p in teacher.parameters():
        nn.init.normal_(p, std=0.2)
    meter = Meter()
    task = Task(
        SHAPE,
        CLASSES,
        partial(DiT, SHAPE, CLASSES, **TINY),
        Teacher(teacher, CLASSES),
        teacher.state_dict(),
        0,
        torch.device("cpu"),
        meter,
    )
    net = task.network("teacher", second_time=True, guidance=True)
    (x, t, s), (v, one, zero) = ([part.float() for part in parts] for parts in point())
    assert isinstance(net, DiT)
    # added inputs start without effect
    torch.testing.assert_close(net(x, t, LABELS, s=s, guidance=t), teacher(x, t, LABELS))
    with meter.counting():
        u, du = task.jvp(net, (x, t, s), (v, one, zero), Condition(LABELS, t))
    assert (
        u.shape == du.shape == x.shape
        and meter.rows["network"] == meter.rows["network.tangent"] == B
    )
