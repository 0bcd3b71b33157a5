"""The velocity network every benchmark of low dimension uses: a class-conditional residual MLP with adaLN.

It is written in the operations that `distillbench.jvp` knows, so its forward also carries tangents. Time enters raw, in
[0, 1], through low frequencies: a flow map trained through its time derivative fails with embeddings of 1000 t.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LOWEST, HIGHEST, FREQUENCIES = 1.0, 12.0, 16  # radians per unit of time


class Embedding(nn.Module):
    """[B] numbers -> [B, width]: sines and cosines of low frequency, then two linear layers."""

    frequencies: Tensor

    def __init__(self, width: int, zero: bool = False):
        super().__init__()
        self.register_buffer("frequencies", torch.linspace(LOWEST, HIGHEST, FREQUENCIES), persistent=False)
        self.first, self.last = nn.Linear(2 * FREQUENCIES, width), nn.Linear(width, width)
        if zero:  # starts without effect: a student with a second time starts as its teacher
            nn.init.zeros_(self.last.weight)
            nn.init.zeros_(self.last.bias)

    def forward(self, t: Tensor) -> Tensor:
        angle = t.reshape(t.shape[0], 1) * self.frequencies
        return self.last(F.silu(self.first(torch.cat([torch.sin(angle), torch.cos(angle)], 1))))


class Block(nn.Module):
    """h + gate * MLP(scale * norm(h) + shift), modulated by the condition; the gate starts at zero."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width
        self.modulation = nn.Linear(width, 3 * width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(c).chunk(3, 1)
        return h + gate * self.down(F.silu(self.up(F.layer_norm(h, (self.width,)) * (scale + 1.0) + shift)))


class VelocityNetwork(nn.Module):
    """v(x, t, label), or u(x, t, s, label) with `second_time`, optionally conditioned on a guidance weight.

    x: [B, *shape] float32; t, s, guidance: [B]; labels: [B] int64 in [0, classes], where `classes` is the null label.
    Returns a tensor like x; with `features=k` instead the outputs [B, width] of the first k blocks, for heads, and evaluates
    nothing after them; ValueError where there are fewer.
    """

    def __init__(self, shape: tuple[int, ...], classes: int, width: int, depth: int, second_time: bool = False, guidance: bool = False):
        super().__init__()
        self.shape, self.classes = shape, classes
        size = int(torch.Size(shape).numel())
        self.time = Embedding(width)
        self.label = nn.Embedding(classes + 1, width) if classes else None
        self.gap = Embedding(width, zero=True) if second_time else None
        self.guidance = Embedding(width, zero=True) if guidance else None
        self.enter = nn.Linear(size, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.modulation, self.leave = nn.Linear(width, 2 * width), nn.Linear(width, size)
        for layer in (self.modulation, self.leave):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self, x: Tensor, t: Tensor, labels: Tensor | None = None, *, s: Tensor | None = None,
        guidance: Tensor | None = None, features: int = 0,
    ) -> Tensor | list[Tensor]:  # fmt: skip
        if features > len(self.blocks):
            raise ValueError(f"features={features} of a network with {len(self.blocks)} blocks")
        c = self.time(t)
        if self.label is not None:
            c = c + self.label(labels)
        if self.gap is not None:
            assert s is not None, "a network with a second time needs s"
            # The gap is computed here, inside the differentiated function: d(t-s)/dt = 1.
            c = c + self.gap(t - s)
        if self.guidance is not None:
            c = c + self.guidance(guidance)
        c = F.silu(c)
        h = self.enter(x.reshape(x.shape[0], -1))
        outputs = []
        for block in self.blocks[: features or None]:
            h = block(h, c)
            outputs.append(h)
        if features:
            return outputs
        shift, scale = self.modulation(c).chunk(2, 1)
        return self.leave(F.layer_norm(h, (h.shape[1],)) * (scale + 1.0) + shift).reshape(x.shape[0], *self.shape)


def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Load `source` into `target`, which may have more inputs (second time, guidance); those keep their zero start."""
    missing, unexpected = target.load_state_dict(source.state_dict(), strict=False)
    extra = [k for k in missing if not k.startswith(("gap.", "guidance."))]
    if extra or unexpected:
        raise ValueError(f"weights do not fit: missing {extra}, unexpected {unexpected}")
