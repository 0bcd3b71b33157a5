"""The derivative along (x, t, s): specs/meanflow.md tests 3, 4, 6, 12.

Costs are those of specs/meanflow_cost_and_jvp.md, section 7.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.utils.flop_counter import FlopCounterMode

from distillbench.jvp import value_and_tangent
from distillbench.networks.mlp import VelocityMLP

SHAPE, CLASSES, B = (1, 4, 4), 3, 12
LABELS = torch.arange(B) % (CLASSES + 1)


def network(width: int = 32, depth: int = 2, shape: tuple[int, ...] = SHAPE) -> VelocityMLP:
    """Random weights everywhere: a new network is zero, where any derivative would pass."""
    net = VelocityMLP(shape, CLASSES, width, depth, second_time=True)
    for p in net.parameters():
        nn.init.normal_(p, std=0.15)
    return net


def inputs(
    dtype: torch.dtype = torch.float32, b: int = B, shape: tuple[int, ...] = SHAPE
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, t, s, v."""
    x, v = torch.randn(2, b, *shape, dtype=dtype)
    t = 0.3 + 0.6 * torch.rand(b, dtype=dtype)
    return x, t, t * torch.rand(b, dtype=dtype), v


def labelled(net: VelocityMLP):
    return lambda x, t, s: net(x, t, LABELS, s=s)


def along(
    x: Tensor, t: Tensor, s: Tensor, v: Tensor
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Primals and the tangent (x: v, t: 1, s: 0)."""
    return (x, t, s), (v, torch.ones_like(t), torch.zeros_like(s))


def relative(a: Tensor, b: Tensor) -> float:
    return float(((a - b).norm() / b.norm()).detach())


def central(f, x: Tensor, t: Tensor, s: Tensor, v: Tensor, h: float) -> Tensor:
    with torch.no_grad():
        return (f(x + h * v, t + h, s) - f(x - h * v, t - h, s)) / (2 * h)


# cost file test 2, meanflow.md test 3
@pytest.mark.parametrize(
    ("dtype", "h", "tolerance"), [(torch.float32, 5e-3, 1e-3), (torch.float64, 1e-4, 1e-6)]
)
def test_tangent_is_the_derivative_along_the_path(dtype, h, tolerance):
    f, point = labelled(network().to(dtype)), inputs(dtype)
    primals, tangents = along(*point)
    expected = central(f, *point, h)
    assert relative(value_and_tangent(f, primals, tangents, False)[1], expected) < tolerance
    v, one, zero = tangents
    # Table 1b's wrong tangents, FreeFlow's sign
    for planted in (
        (v, zero, one),
        (v, one, one),
        (v, zero, zero),
        (-v, one, zero),
    ):
        assert relative(value_and_tangent(f, primals, planted, False)[1], expected) > 0.05


def test_tangent_is_that_of_torch():
    f = labelled(network().double())
    primals, tangents = along(*inputs(torch.float64))
    value, tangent = jvp(f, primals, tangents)
    ours = value_and_tangent(f, primals, tangents, False)
    assert relative(ours[0], value) < 1e-12 and relative(ours[1], tangent) < 1e-12
    assert all(
        jvp(
            f, primals, tuple(d if i == j else torch.zeros_like(d) for j, d in enumerate(tangents))
        )[1].norm()
        > 0.1
        for i in (0, 1)
    )


# meanflow.md test 4: h = t - s is computed inside and gets tangent 1
def test_a_network_fed_a_fixed_gap_fails():
    net, point = network().double(), inputs(torch.float64)
    x, t, s, _ = point
    gap = t - s
    primals, tangents = along(*point)
    fixed = value_and_tangent(
        lambda x, t, s: net(x, t, LABELS, s=t - gap), primals, tangents, False
    )
    expected = central(labelled(net), *point, 1e-4)
    assert torch.allclose(fixed[0], net(x, t, LABELS, s=s)) and relative(fixed[1], expected) > 0.05


# meanflow.md section 2 and test 4: the embedded number is t - s, raw in [0, 1]
def test_the_second_time_enters_as_the_gap():
    net, (x, t, s, _), seen = network(), inputs(), []
    net.gap.register_forward_hook(lambda _module, args, _output: seen.append(args[0]))
    net.time.register_forward_hook(lambda _module, args, _output: seen.append(args[0]))
    net(x, t, LABELS, s=s)
    assert torch.equal(seen[0], t) and torch.equal(seen[1], t - s)


@pytest.mark.parametrize("m", [1, 5, B])
def test_only_the_first_rows_have_a_tangent(m):  # cost file test 10
    f = labelled(network().double())
    primals, tangents = along(*inputs(torch.float64))
    value, tangent = value_and_tangent(f, primals, tuple(d[:m] for d in tangents), False)
    assert value.shape == (B, *SHAPE) and tangent.shape == (m, *SHAPE)
    assert relative(tangent, jvp(f, primals, tangents)[1][:m]) < 1e-12


def test_the_value_is_the_networks_own_bit_for_bit():
    net = network()
    primals, tangents = along(*inputs())
    value, tangent = value_and_tangent(
        labelled(net), primals, tuple(d[:5] for d in tangents), False
    )
    plain = net(*primals[:2], LABELS, s=primals[2])
    assert torch.equal(value, plain) and not tangent.requires_grad
    ours, own = (
        torch.autograd.grad(y.square().sum(), list(net.parameters())) for y in (value, plain)
    )
    assert all(torch.equal(a, b) for a, b in zip(ours, own))


def explicit_layer_norm(x: Tensor, shape: tuple[int, ...], eps: float = 1e-5) -> Tensor:
    d = x - x.mean(-1, keepdim=True)
    return d * (d.square().mean(-1, keepdim=True) + eps).rsqrt()


def test_second_order_gradient_is_that_of_torch(monkeypatch):  # with graph: TVM
    """Second-order gradients against torch's, with an explicit layer norm in the reference.

    torch's own layer norm is silently wrong in second order (pytorch issue 196700).
    """
    net = network().double()
    parameters = dict(net.named_parameters())
    primals, tangents = along(*inputs(torch.float64))
    _, tangent = value_and_tangent(labelled(net), primals, tangents, True)
    ours = torch.autograd.grad(
        tangent.square().sum(), list(parameters.values()), allow_unused=True, materialize_grads=True
    )
    monkeypatch.setattr(F, "layer_norm", explicit_layer_norm)
    _, reference = jvp(
        lambda x, t, s: functional_call(net, parameters, (x, t, LABELS), {"s": s}),
        primals,
        tangents,
    )
    theirs = torch.autograd.grad(
        reference.square().sum(),
        list(parameters.values()),
        allow_unused=True,
        materialize_grads=True,
    )
    assert all((a - b).norm() <= 1e-10 * (1 + b.norm()) for a, b in zip(ours, theirs))
    assert sum(bool(g.norm() > 1e-3) for g in ours) > 20


def test_closed_form_field():  # cost file test 3, in the operations that have rules
    x, t, s, v = (a.reshape(B, -1) for a in inputs(torch.float64))
    _, du = value_and_tangent(
        lambda x, t, s: x * torch.sin(t) + torch.cos(t - s) * 2.0,
        (x, t, s),
        (v, torch.ones_like(t), 0 * s),
        False,
    )
    torch.testing.assert_close(du, v * t.sin() + x * t.cos() - 2 * (t - s).sin())


ELEMENTWISE = {
    "number - x": lambda x, c: 1 - x,
    "x - number": lambda x, c: x - 1,
    "constant - x": lambda x, c: c - x,
    "x - constant": lambda x, c: x - c,
    "constant * x": lambda x, c: c * x,
    "x * constant": lambda x, c: x * c,
    "row * x": lambda x, c: c[0] * x,
    "x * x": lambda x, c: x * x,
    "number + x": lambda x, c: 2 + x,
    "silu": lambda x, c: F.silu(x),
    "silu in place": lambda x, c: F.silu(x * 1.0, inplace=True),
    "cat, chunk": lambda x, c: torch.cat([torch.sin(x), torch.cos(x)], 1).chunk(2, 1)[1],
    "layer norm": lambda x, c: F.layer_norm(x, (6,)),
    "layer norm over two dimensions": lambda x, c: F.layer_norm(x.reshape(B, 2, 3), (2, 3)).reshape(
        B, 6
    ),
    "rms norm": lambda x, c: F.rms_norm(x, (6,), eps=1e-6),
    "rms norm over two dimensions": lambda x, c: F.rms_norm(
        x.reshape(B, 2, 3), (2, 3), eps=0.1
    ).reshape(B, 6),
    "linear": lambda x, c: F.linear(x, c[:4], c[0, :4]),
    "x + wider constant": lambda x, c: torch.cat([F.linear(x, c[:1]) + c, x], 1),
}


@pytest.mark.parametrize("name", ELEMENTWISE)
@pytest.mark.parametrize("graph", [False, True])
def test_every_rule_agrees_with_torch(name, graph):
    x, v, c = torch.randn(3, B, 6, dtype=torch.float64)
    f, m = ELEMENTWISE[name], B if graph else 5
    value, tangent = value_and_tangent(lambda x: f(x, c), (x,), (v[:m],), graph)
    expected = jvp(lambda x: f(x, c), (x,), (v,))
    torch.testing.assert_close(value, expected[0])
    torch.testing.assert_close(tangent, expected[1][:m])


# cost file test 7: never a silently dropped tangent
@pytest.mark.parametrize(
    ("name", "f"),
    [("exp", torch.exp), ("softmax", lambda x: F.softmax(x, 1)), ("detach", torch.detach)],
)
def test_an_operation_without_a_rule_is_named(name, f):
    x = torch.randn(3, 4)
    with pytest.raises(NotImplementedError, match=f"'{name}'"):
        value_and_tangent(f, (x,), (x,), False)


OPERATORS = {
    "x / 2": lambda x: x / 2,
    "-x": lambda x: -x,
    "x ** 2": lambda x: x**2,
    "x.exp()": lambda x: x.exp(),
    "x.detach()": lambda x: x.detach(),
    "x[:, :2]": lambda x: x[:, :2],
}


@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_or_method_without_a_rule_is_named(name):  # value_and_tangent's docstring
    x = torch.randn(3, 4)
    with pytest.raises(NotImplementedError, match="derivative rule"):
        value_and_tangent(OPERATORS[name], (x,), (x,), False)


def test_affine_layer_norm_is_refused():
    x = torch.randn(3, 4)
    with pytest.raises(NotImplementedError, match="layer_norm"):
        value_and_tangent(nn.LayerNorm(4), (x,), (x,), False)


# torch's eps of None depends on the type
def test_affine_rms_norm_and_one_without_eps_are_refused():
    x = torch.randn(3, 4)
    for f in (nn.RMSNorm(4, eps=1e-6), nn.RMSNorm(4, elementwise_affine=False)):
        with pytest.raises(NotImplementedError, match="rms_norm"):
            value_and_tangent(f, (x,), (x,), False)


def explicit_rms_norm(x: Tensor, shape: tuple[int, ...], eps: float) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()


# TVM: value, tangent and, with graph, second order
@pytest.mark.parametrize("graph", [False, True])
def test_a_network_with_rms_norms(monkeypatch, graph):
    net = VelocityMLP(SHAPE, CLASSES, 32, 2, second_time=True, norms="rms").double()
    for p in net.parameters():
        nn.init.normal_(p, std=0.15)
    other, parameters, point = (
        network().double(),
        dict(net.named_parameters()),
        inputs(torch.float64),
    )
    other.load_state_dict(net.state_dict())
    primals, tangents = along(*point)
    value, tangent = value_and_tangent(labelled(net), primals, tangents, graph)
    assert relative(tangent, central(labelled(net), *point, 1e-4)) < 1e-6 and torch.equal(
        value, labelled(net)(*primals)
    )
    assert relative(labelled(other)(*primals), value) > 0.1  # planted: layer norms
    if graph:
        ours = torch.autograd.grad(
            tangent.square().sum(),
            list(parameters.values()),
            allow_unused=True,
            materialize_grads=True,
        )
        monkeypatch.setattr(F, "rms_norm", explicit_rms_norm)
        _, reference = jvp(
            lambda x, t, s: functional_call(net, parameters, (x, t, LABELS), {"s": s}),
            primals,
            tangents,
        )
        theirs = torch.autograd.grad(
            reference.square().sum(),
            list(parameters.values()),
            allow_unused=True,
            materialize_grads=True,
        )
        assert all((a - b).norm() <= 1e-10 * (1 + b.norm()) for a, b in zip(ours, theirs))


def test_autocast_is_refused():  # cost file section 5: the derivative in float32
    primals, tangents = along(*inputs())
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match="autocast"):
        value_and_tangent(labelled(network()), primals, tangents, False)


def meanflow_gradient(
    net, value: Tensor, du: Tensor, t: Tensor, s: Tensor, v: Tensor, detach: bool = True
) -> list[Tensor]:
    m = len(du)
    target = torch.cat([v[:m] - (t - s)[:m, None, None, None] * du, v[m:]])
    loss = (value - (target.detach() if detach else target)).square().sum() / len(v)
    return torch.autograd.grad(loss, list(net.parameters()))


def official(
    net, primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...], labels: Tensor = LABELS
) -> tuple[Tensor, Tensor]:
    """torch.func.jvp on all rows with the reverse graph, as py-meanflow does."""
    return jvp(lambda x, t, s: net(x, t, labels, s=s), primals, tangents)


def test_meanflow_gradient_is_that_of_the_official_graph():  # cost file test 1
    net, (x, t, s, v) = network(), inputs()
    m = 9
    s = torch.cat([s[:m], t[m:]])  # s = t rows last
    primals, tangents = along(x, t, s, v)
    reference = meanflow_gradient(net, *official(net, primals, tangents), t, s, v)
    ours = meanflow_gradient(
        net,
        *value_and_tangent(labelled(net), primals, tuple(d[:m] for d in tangents), False),
        t,
        s,
        v,
    )
    assert (
        relative(
            torch.cat([g.flatten() for g in ours]), torch.cat([g.flatten() for g in reference])
        )
        < 1e-5
    )
    # gradient through the target
    planted = meanflow_gradient(net, *official(net, primals, tangents), t, s, v, detach=False)
    assert (
        relative(
            torch.cat([g.flatten() for g in planted]), torch.cat([g.flatten() for g in reference])
        )
        > 0.05
    )


# cost file sections 1-2, test 6: FM 3.00 F, official graph 5.00 F, dual 3 + 1.18 (1-q) F
def test_cost_of_an_update():
    b, shape = 32, (1, 8, 8)
    net = network(64, 4, shape)
    labels = torch.arange(b) % CLASSES
    x, t, s, v = inputs(b=b, shape=shape)
    primals, tangents = along(x, t, s, v)

    def flops(run) -> int:
        with FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops()

    def dual(m: int) -> float:
        def parts():
            return value_and_tangent(
                lambda x, t, s: net(x, t, labels, s=s),
                primals,
                tuple(d[:m] for d in tangents),
                False,
            )

        return flops(lambda: meanflow_gradient(net, *parts(), t, s, v)) / forward

    with torch.no_grad():
        forward = flops(lambda: net(x, t, labels, s=s))
    matching = (
        flops(
            lambda: torch.autograd.grad(
                (net(x, t, labels, s=s) - v).square().mean(), list(net.parameters())
            )
        )
        / forward
    )
    assert 2.85 < matching <= 3.0  # the first layers need no gradient of their input
    # matrix products of the tangent alone
    assert dual(b) - matching == pytest.approx(1.0, abs=0.05) and dual(b) <= 4.3
    assert dual(b // 4) - matching == pytest.approx(0.25, abs=0.02)
    reference = (
        flops(lambda: meanflow_gradient(net, *official(net, primals, tangents, labels), t, s, v))
        / forward
    )
    assert 4.5 < reference < 5.2  # what the dual form saves
