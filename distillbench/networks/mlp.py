"""The velocity network of benchmarks of low dimension: a class-conditional residual MLP with adaLN.

Written in the operations that `distillbench.jvp` knows, so that its forward also carries tangents.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distillbench.method import Norms
from distillbench.networks.conditioning import EPSILON, Conditioned


def normalised(h: Tensor, norms: Norms) -> Tensor:
    """h [B, width] with layer norm or rms norm, without weights."""
    width = (h.shape[1],)
    return F.layer_norm(h, width) if norms == "layer" else F.rms_norm(h, width, eps=EPSILON)


def modulations(c: Tensor, n: int, norms: Norms) -> tuple[Tensor, ...]:
    """c [B, n width] in n parts [B, width].

    With `rms` each part is normalised, so that no modulation can blow up (TVM, App. B.2).
    """
    parts = c.chunk(n, 1)
    return parts if norms == "layer" else tuple(normalised(part, norms) for part in parts)


class Block(nn.Module):
    """h + gate * MLP(scale * norm(h) + shift), [B, width]; the gate starts at 0.

    Modulated by the condition c [B, width].
    """

    def __init__(self, width: int, norms: Norms = "layer"):
        super().__init__()
        self.norms: Norms = norms
        self.modulation = nn.Linear(width, 3 * width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        """h, c: [B, width]."""
        shift, scale, gate = modulations(self.modulation(c), 3, self.norms)
        modulated = normalised(h, self.norms) * (scale + 1.0) + shift
        return h + gate * self.down(F.silu(self.up(modulated)))


class VelocityMLP(Conditioned):
    """v(x, t, label), or u(x, t, s, label) with `second_time`; with `guidance` also of a weight.

    x: [B, *shape] float32; t, s, guidance: [B]; labels: [B] int64 in [0, classes], where `classes`
    is the null label. Returns a tensor like x; with `features=k` instead the outputs [B, width] of
    the first k blocks, for heads, and evaluates nothing after them. Raises ValueError where there
    are fewer blocks. `norms="rms"` is TVM's semi-Lipschitz network (arXiv 2511.19797, Eq. 16, App.
    B.2): rms norms in place of layer norms, and on every modulation.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        classes: int,
        width: int,
        depth: int,
        second_time: bool = False,
        guidance: bool = False,
        norms: Norms = "layer",
    ):
        super().__init__(classes, width, second_time, guidance)
        self.shape = shape
        self.norms: Norms = norms
        size = int(torch.Size(shape).numel())
        self.enter = nn.Linear(size, width)
        self.blocks = nn.ModuleList(Block(width, norms) for _ in range(depth))
        self.modulation = nn.Linear(width, 2 * width)
        self.leave = nn.Linear(width, size)
        for layer in (self.modulation, self.leave):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        labels: Tensor | None = None,
        *,
        s: Tensor | None = None,
        guidance: Tensor | None = None,
        features: int = 0,
    ) -> Tensor | list[Tensor]:
        if features > len(self.blocks):
            raise ValueError(f"features={features} of a network with {len(self.blocks)} blocks")
        c = self.condition(t, labels, s, guidance)
        h = self.enter(x.reshape(x.shape[0], -1))
        outputs = []
        for block in self.blocks[: features or None]:
            h = block(h, c)
            outputs.append(h)
        if features:
            return outputs
        shift, scale = modulations(self.modulation(c), 2, self.norms)
        modulated = normalised(h, self.norms) * (scale + 1.0) + shift
        return self.leave(modulated).reshape(x.shape[0], *self.shape)
