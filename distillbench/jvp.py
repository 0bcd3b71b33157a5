"""Forward-mode derivative of a network: the value once, with its graph, the tangent on few rows.

`torch.func.jvp` would propagate zero tangents of the weights and evaluate the value of all rows
again: 5 to 6 forward passes per MeanFlow update where 3 + 1.2 (1-q) suffice (q: share of rows with
s = t). A `Dual` is a pair (value, tangent) that flows through the network's own `forward`; each
operation below carries its own derivative rule.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Head = Callable[["Dual"], Tensor]  # what a rule sees of a value: the rows that have a tangent


class Dual:
    """value [B, ...] and the tangent of its first m rows [m, ...], of one dtype.

    Without `graph` the tangent carries no gradient. Operations on it, methods and torch functions,
    give duals again; NotImplementedError names an operation without a rule.
    """

    def __init__(self, value: Tensor, tangent: Tensor, graph: bool = False):
        self.value = value
        self.tangent = tangent
        self.graph = graph

    @property
    def shape(self) -> torch.Size:
        """Shape of the value, [B, ...]."""
        return self.value.shape

    def dim(self) -> int:
        """Number of dimensions of the value."""
        return self.value.dim()

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.__name__.strip("_")
        rule = RULES.get(name)
        if rule is None:
            raise _without_rule(name)
        first = next(_duals(args))
        m = first.tangent.shape[0]
        graph = first.graph

        def head(d: Dual) -> Tensor:
            rows = d.value[:m]
            return rows if graph else rows.detach()

        with contextlib.nullcontext() if graph else torch.no_grad():
            tangent = rule(head, *args, **kwargs)  # before the value: the operation may be in place
        value = func(*_values(args), **kwargs)
        if isinstance(value, tuple | list):
            return tuple(cls(v, d, graph) for v, d in zip(value, tangent))
        # A wider constant widens the tangent too.
        return cls(value, tangent.expand(len(tangent), *value.shape[1:]), graph)

    def __getattr__(self, name: str) -> Any:
        raise _without_rule(name)

    def __add__(self, other: Any) -> Dual:
        return Dual.__torch_function__(torch.add, (), (self, other))

    def __sub__(self, other: Any) -> Dual:
        return Dual.__torch_function__(torch.sub, (), (self, other))

    def __rsub__(self, other: Any) -> Dual:
        return Dual.__torch_function__(torch.rsub, (), (self, other))

    def __mul__(self, other: Any) -> Dual:
        return Dual.__torch_function__(torch.mul, (), (self, other))

    __radd__ = __add__
    __rmul__ = __mul__

    def reshape(self, *shape: int) -> Dual:
        """[B, ...] -> `shape`, whose first dimension is B."""
        return Dual.__torch_function__(torch.reshape, (), (self, shape))

    def permute(self, *dims: int) -> Dual:
        """Dimensions in the order `dims`; NotImplementedError where the first is not the batch."""
        return Dual.__torch_function__(torch.permute, (), (self, dims))

    def chunk(self, n: int, dim: int) -> tuple[Dual, ...]:
        """n equal parts along `dim`, which is not the batch's."""
        return Dual.__torch_function__(torch.chunk, (), (self, n, dim))


def _without_rule(name: str) -> NotImplementedError:
    return NotImplementedError(
        f"distillbench.jvp has no derivative rule for '{name}'; add one to RULES"
    )


def _refusing(name: str) -> Callable:
    """A method of Dual that raises NotImplementedError."""

    def refuse(self: Dual, *_: Any) -> Any:
        raise _without_rule(name)

    return refuse


# Looked up on the class, so that `Dual.__getattr__` does not see them.
for _name in ("neg", "truediv", "rtruediv", "pow", "matmul", "getitem"):
    setattr(Dual, f"__{_name}__", _refusing(_name))


def _duals(args: Any) -> Iterator[Dual]:
    """The duals among `args` and in lists and tuples among them, in order."""
    for a in args:
        if isinstance(a, Dual):
            yield a
        elif isinstance(a, tuple | list):
            yield from _duals(a)


def _values(args: Any) -> Any:
    """`args` with the value in place of every dual, also in lists and tuples."""
    out = []
    for a in args:
        if isinstance(a, Dual):
            out.append(a.value)
        elif isinstance(a, tuple | list):
            out.append(_values(a))
        else:
            out.append(a)
    return type(args)(out)


def _tangent(a: Any) -> Any:
    return a.tangent if isinstance(a, Dual) else 0.0


def _rows(head: Head, a: Any, like: Tensor) -> Any:
    """The factor `a` of a product on the rows of the tangent `like`.

    A dual's value, a constant's first rows, a number.
    """
    if isinstance(a, Dual):
        return head(a)
    # A constant of fewer dimensions, or of one row, broadcasts over rows.
    if isinstance(a, Tensor) and a.dim() == like.dim() and a.shape[0] > 1:
        return a[: like.shape[0]]
    return a


def _add(head: Head, a: Any, b: Any) -> Tensor:
    return _tangent(a) + _tangent(b)


def _sub(head: Head, a: Any, b: Any) -> Tensor:
    return _tangent(a) - _tangent(b)


def _rsub(head: Head, a: Any, b: Any) -> Tensor:
    return _tangent(b) - _tangent(a)


def _mul(head: Head, a: Any, b: Any) -> Tensor:
    d = next(_duals((a, b))).tangent
    left: Any = a.tangent * _rows(head, b, d) if isinstance(a, Dual) else 0.0
    if not isinstance(b, Dual):
        return left
    return left + b.tangent * _rows(head, a, d)


def _linear(head: Head, x: Dual, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x.tangent, weight)  # the weight has no tangent: one product, not two


def _silu(head: Head, x: Dual, inplace: bool = False) -> Tensor:
    p = torch.sigmoid(head(x))
    return x.tangent * p * (1 + head(x) * (1 - p))


def _gelu(head: Head, x: Dual, approximate: str = "none") -> Tensor:
    if approximate != "tanh":
        raise NotImplementedError(
            "distillbench.jvp: gelu by the error function; use approximate='tanh'"
        )
    value = head(x)
    a = (2 / math.pi) ** 0.5
    b = 0.044715
    th = torch.tanh(a * (value + b * value.pow(3)))
    return x.tangent * 0.5 * (1 + th + value * (1 - th.square()) * a * (1 + 3 * b * value.square()))


def _sin(head: Head, x: Dual) -> Tensor:
    return x.tangent * torch.cos(head(x))


def _cos(head: Head, x: Dual) -> Tensor:
    return -x.tangent * torch.sin(head(x))


def _layer_norm(
    head: Head, x: Dual, shape: Any, weight: None = None, bias: None = None, eps: float = 1e-5
) -> Tensor:
    if weight is not None:
        raise NotImplementedError(
            "distillbench.jvp: layer_norm with an affine part; put scale and shift outside"
        )
    value = head(x)
    d = x.tangent
    dims = tuple(range(-len(shape), 0))
    var, mean = torch.var_mean(value, dim=dims, keepdim=True, correction=0)
    scale = torch.rsqrt(var + eps)
    y = (value - mean) * scale
    return scale * (d - d.mean(dims, keepdim=True) - y * (y * d).mean(dims, keepdim=True))


def _rms_norm(
    head: Head, x: Dual, shape: Any, weight: None = None, eps: float | None = None
) -> Tensor:
    if weight is not None or eps is None:
        raise NotImplementedError(
            "distillbench.jvp: rms_norm with an affine part or without eps; "
            "put the scale outside, name eps"
        )
    value = head(x)
    d = x.tangent
    dims = tuple(range(-len(shape), 0))
    scale = torch.rsqrt(value.square().mean(dims, keepdim=True) + eps)
    y = value * scale
    return scale * (d - y * (y * d).mean(dims, keepdim=True))


def _attention(head: Head, q: Dual, k: Dual, v: Dual) -> Tensor:
    """Of softmax(q k^T / sqrt(d)) v, each [B, heads, T, d]; no mask, dropout or other scale.

    Explicit: [m, heads, T, T] in memory.
    """
    scale = head(q).shape[-1] ** -0.5
    p = torch.softmax(scale * head(q) @ head(k).mT, -1)
    ds = scale * (q.tangent @ head(k).mT + head(q) @ k.tangent.mT)
    dp = p * (ds - (p * ds).sum(-1, keepdim=True))
    return dp @ head(v) + p @ v.tangent


def _cat(head: Head, parts: Any, dim: int) -> Tensor:
    return torch.cat([part.tangent for part in parts], dim)


def _chunk(head: Head, x: Dual, n: int, dim: int) -> tuple[Tensor, ...]:
    return x.tangent.chunk(n, dim)


def _reshape(head: Head, x: Dual, shape: tuple[int, ...]) -> Tensor:
    return x.tangent.reshape(x.tangent.shape[0], *shape[1:])  # the first dimension is the batch


def _permute(head: Head, x: Dual, dims: tuple[int, ...]) -> Tensor:
    if dims[0] != 0:
        raise NotImplementedError(
            "distillbench.jvp: permute must leave the batch in the first place"
        )
    return x.tangent.permute(dims)


# Name of a torch function -> its tangent, from `head` and the arguments of the function. Without
# `graph` a value is cut off its graph for the rule.
RULES: dict[str, Callable] = {
    "add": _add,
    "sub": _sub,
    "rsub": _rsub,
    "mul": _mul,
    "linear": _linear,
    "silu": _silu,
    "gelu": _gelu,
    "sin": _sin,
    "cos": _cos,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "scaled_dot_product_attention": _attention,
    "cat": _cat,
    "chunk": _chunk,
    "reshape": _reshape,
    "permute": _permute,
}


def value_and_tangent(
    f: Callable, primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...], graph: bool
) -> tuple[Tensor, Tensor]:
    """f(*primals) [B, ...] with its graph, and its derivative along `tangents` [m, ...].

    primals: each [B, ...] float32; tangents: each [m, ...] with m <= B, of the first m rows. With
    `graph` the tangent is differentiable too (m must be B). NotImplementedError names an operation
    without a rule; RuntimeError under autocast.
    """
    if torch.is_autocast_enabled(primals[0].device.type):
        raise RuntimeError(
            "the derivative along (x, t, s) must be computed in float32: leave autocast first"
        )
    out = f(*(Dual(p, d, graph) for p, d in zip(primals, tangents)))
    return out.value, out.tangent
