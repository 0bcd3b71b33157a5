"""Forward-mode derivative of a network that computes the value once, with its graph, and the tangent on few rows.

`torch.func.jvp` would propagate zero tangents of the weights and evaluate the value of all rows again: 5 to 6 forward
passes per MeanFlow update where 3 + 1.2 (1-q) suffice (q: share of rows with s = t). A `Dual` is a pair (value,
tangent) that flows through the network's own `forward`; each operation below carries its own derivative rule.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class Dual:
    """value [B, ...] and the tangent of its first m rows [m, ...]; without `graph` the tangent carries no gradient."""

    def __init__(self, value: Tensor, tangent: Tensor, graph: bool = False):
        self.value, self.tangent, self.graph = value, tangent, graph

    @property
    def shape(self) -> torch.Size:
        return self.value.shape

    def dim(self) -> int:
        return self.value.dim()

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.__name__.strip("_")
        rule = RULES.get(name)
        if rule is None:
            raise NotImplementedError(
                f"distillbench.jvp has no derivative rule for '{name}'; add one to RULES"
            )
        first = next(d for d in _duals(args))
        m, graph = first.tangent.shape[0], first.graph
        # What the rules see of a value: the rows that have a tangent, cut off the graph unless it is asked for.
        head = lambda d: d.value[:m] if graph else d.value[:m].detach()
        with contextlib.nullcontext() if graph else torch.no_grad():
            tangent = rule(head, *args, **kwargs)  # before the value: the operation may be in place
        value = func(*_map(lambda a: a.value, args), **kwargs)
        if isinstance(value, tuple | list):
            return tuple(cls(v, d, graph) for v, d in zip(value, tangent))
        return cls(
            value, tangent.expand(len(tangent), *value.shape[1:]), graph
        )  # a wider constant widens the tangent too

    def __getattr__(self, name: str) -> Any:
        raise NotImplementedError(
            f"distillbench.jvp has no derivative rule for '{name}'; add one to RULES"
        )

    def __add__(self, other: Any) -> Dual:
        return Dual.__torch_function__(torch.add, (), (self, other))

    def __sub__(self, other: Any) -> Dual:
        return Dual.__torch_function__(torch.sub, (), (self, other))

    def __rsub__(self, other: Any) -> Dual:
        return Dual.__torch_function__(torch.rsub, (), (self, other))

    def __mul__(self, other: Any) -> Dual:
        return Dual.__torch_function__(torch.mul, (), (self, other))

    __radd__, __rmul__ = __add__, __mul__

    def reshape(self, *shape: int) -> Dual:
        return Dual.__torch_function__(torch.reshape, (), (self, shape))

    def permute(self, *dims: int) -> Dual:
        return Dual.__torch_function__(torch.permute, (), (self, dims))

    def chunk(self, n: int, dim: int) -> tuple[Dual, ...]:
        return Dual.__torch_function__(torch.chunk, (), (self, n, dim))


def _duals(args: Any) -> Any:
    for a in args:
        if isinstance(a, Dual):
            yield a
        elif isinstance(a, tuple | list):
            yield from _duals(a)


def _map(f: Callable, args: Any) -> Any:
    return type(args)(
        f(a) if isinstance(a, Dual) else _map(f, a) if isinstance(a, tuple | list) else a
        for a in args
    )


def _tangent(a: Any) -> Any:
    return a.tangent if isinstance(a, Dual) else 0.0


def _rows(head: Callable, a: Any, like: Tensor) -> Any:
    """The factor `a` of a product on the rows of the tangent: a dual's value, a constant's first rows, a number."""
    if isinstance(a, Dual):
        return head(a)
    if (
        isinstance(a, Tensor) and a.dim() == like.dim() and a.shape[0] > 1
    ):  # else it broadcasts over rows
        return a[: like.shape[0]]
    return a


def _mul(head: Callable, a: Any, b: Any) -> Any:
    d = next(_duals((a, b))).tangent
    left = a.tangent * _rows(head, b, d) if isinstance(a, Dual) else 0.0
    return left + b.tangent * _rows(head, a, d) if isinstance(b, Dual) else left


def _linear(head: Callable, x: Dual, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x.tangent, weight)  # the weight has no tangent: one product, not two


def _silu(head: Callable, x: Dual, inplace: bool = False) -> Tensor:
    p = torch.sigmoid(head(x))
    return x.tangent * p * (1 + head(x) * (1 - p))


def _layer_norm(
    head: Callable, x: Dual, shape: Any, weight: None = None, bias: None = None, eps: float = 1e-5
) -> Tensor:
    if weight is not None:
        raise NotImplementedError(
            "distillbench.jvp: layer_norm with an affine part; put scale and shift outside"
        )
    value, d, dims = head(x), x.tangent, tuple(range(-len(shape), 0))
    var, mean = torch.var_mean(value, dim=dims, keepdim=True, correction=0)
    scale = torch.rsqrt(var + eps)
    y = (value - mean) * scale
    return scale * (d - d.mean(dims, keepdim=True) - y * (y * d).mean(dims, keepdim=True))


def _rms_norm(
    head: Callable, x: Dual, shape: Any, weight: None = None, eps: float | None = None
) -> Tensor:
    if weight is not None or eps is None:
        raise NotImplementedError(
            "distillbench.jvp: rms_norm with an affine part or without eps; put the scale outside, name eps"
        )
    value, d, dims = head(x), x.tangent, tuple(range(-len(shape), 0))
    scale = torch.rsqrt(value.square().mean(dims, keepdim=True) + eps)
    y = value * scale
    return scale * (d - y * (y * d).mean(dims, keepdim=True))


def _gelu(head: Callable, x: Dual, approximate: str = "none") -> Tensor:
    if approximate != "tanh":
        raise NotImplementedError(
            "distillbench.jvp: gelu by the error function; use approximate='tanh'"
        )
    value, a, b = head(x), (2 / math.pi) ** 0.5, 0.044715
    th = torch.tanh(a * (value + b * value.pow(3)))
    return x.tangent * 0.5 * (1 + th + value * (1 - th.square()) * a * (1 + 3 * b * value.square()))


def _attention(head: Callable, q: Dual, k: Dual, v: Dual) -> Tensor:
    """Of softmax(q k^T / sqrt(d)) v, each [B, heads, T, d]; explicit, [m, heads, T, T] in memory. No mask, dropout or other scale."""
    scale = head(q).shape[-1] ** -0.5
    p = torch.softmax(scale * head(q) @ head(k).mT, -1)
    ds = scale * (q.tangent @ head(k).mT + head(q) @ k.tangent.mT)
    dp = p * (ds - (p * ds).sum(-1, keepdim=True))
    return dp @ head(v) + p @ v.tangent


def _reshape(head: Callable, x: Dual, shape: tuple[int, ...]) -> Tensor:
    return x.tangent.reshape(x.tangent.shape[0], *shape[1:])  # the first dimension is the batch


def _permute(head: Callable, x: Dual, dims: tuple[int, ...]) -> Tensor:
    if dims[0] != 0:
        raise NotImplementedError(
            "distillbench.jvp: permute must leave the batch in the first place"
        )
    return x.tangent.permute(dims)


def _without_rule(name: str) -> Callable:
    return lambda self, *_: self.__getattr__(name)


for _name in ("neg", "truediv", "rtruediv", "pow", "matmul", "getitem"):
    setattr(Dual, f"__{_name}__", _without_rule(_name))

RULES: dict[str, Callable] = {
    "add": lambda head, a, b: _tangent(a) + _tangent(b),
    "sub": lambda head, a, b: _tangent(a) - _tangent(b),
    "rsub": lambda head, a, b: _tangent(b) - _tangent(a),
    "mul": _mul,
    "linear": _linear,
    "silu": _silu,
    "sin": lambda head, x: x.tangent * torch.cos(head(x)),
    "cos": lambda head, x: -x.tangent * torch.sin(head(x)),
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "cat": lambda head, parts, dim: torch.cat([p.tangent for p in parts], dim),
    "chunk": lambda head, x, n, dim: x.tangent.chunk(n, dim),
    "reshape": _reshape,
    "permute": _permute,
    "gelu": _gelu,
    "scaled_dot_product_attention": _attention,
}


def value_and_tangent(
    f: Callable, primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...], graph: bool
) -> tuple[Tensor, Tensor]:
    """f(*primals) with its graph, and its derivative along `tangents` on the first m rows.

    primals: each [B, ...] float32; tangents: each [m, ...] with m <= B; returns (value [B, ...], tangent [m, ...]).
    With `graph` the tangent is differentiable too (m must be B). NotImplementedError names an operation without a rule.
    """
    if torch.is_autocast_enabled(primals[0].device.type):
        raise RuntimeError(
            "the derivative along (x, t, s) must be computed in float32: leave autocast first"
        )
    out = f(*(Dual(p, d, graph) for p, d in zip(primals, tangents)))
    return out.value, out.tangent
