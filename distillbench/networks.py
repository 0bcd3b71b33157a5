"""The velocity network every benchmark of low dimension uses: a class-conditional residual MLP with adaLN.

It is written in the operations that `distillbench.jvp` knows, so its forward also carries tangents. Time enters raw, in
[0, 1], through low frequencies: a flow map trained through its time derivative fails with embeddings of 1000 t.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LOWEST, HIGHEST, FREQUENCIES = 1.0, 12.0, 16  # radians per unit of time
EPSILON = 1e-6  # of rms norms, TVM's (arXiv 2511.19797, official training/dit.py)
Norms = Literal["layer", "rms"]


def normalised(h: Tensor, norms: Norms) -> Tensor:
    """h [B, width] with layer norm or rms norm, without weights."""
    return F.layer_norm(h, (h.shape[1],)) if norms == "layer" else F.rms_norm(h, (h.shape[1],), eps=EPSILON)


def modulations(c: Tensor, n: int, norms: Norms) -> tuple[Tensor, ...]:
    """c [B, n width] in n parts, each of them rms-normalised with `rms`, so that no modulation can blow up (TVM, App. B.2)."""
    parts = c.chunk(n, 1)
    return parts if norms == "layer" else tuple(normalised(part, norms) for part in parts)


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

    def __init__(self, width: int, norms: Norms = "layer"):
        super().__init__()
        self.norms: Norms = norms
        self.modulation = nn.Linear(width, 3 * width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        shift, scale, gate = modulations(self.modulation(c), 3, self.norms)
        return h + gate * self.down(F.silu(self.up(normalised(h, self.norms) * (scale + 1.0) + shift)))


class Conditioned(nn.Module):
    """What the velocity networks have in common: embeddings of t, label, t - s and guidance weight, each where there is one."""

    def __init__(self, classes: int, width: int, second_time: bool, guidance: bool):
        super().__init__()
        self.classes = classes
        self.time = Embedding(width)
        self.label = nn.Embedding(classes + 1, width) if classes else None
        self.gap = Embedding(width, zero=True) if second_time else None
        self.guidance = Embedding(width, zero=True) if guidance else None

    def condition(self, t: Tensor, labels: Tensor | None, s: Tensor | None, guidance: Tensor | None) -> Tensor:
        """[B, width], the activated sum of the embeddings; t, s, guidance [B]; labels [B] int64, `classes` is the null label."""
        c = self.time(t)
        if self.label is not None:
            c = c + self.label(labels)
        if self.gap is not None:
            assert s is not None, "a network with a second time needs s"
            # The gap is computed here, inside the differentiated function: d(t-s)/dt = 1.
            c = c + self.gap(t - s)
        if self.guidance is not None:
            c = c + self.guidance(guidance)
        return F.silu(c)


class VelocityNetwork(Conditioned):
    """v(x, t, label), or u(x, t, s, label) with `second_time`, optionally conditioned on a guidance weight.

    x: [B, *shape] float32; t, s, guidance: [B]; labels: [B] int64 in [0, classes], where `classes` is the null label.
    Returns a tensor like x; with `features=k` instead the outputs [B, width] of the first k blocks, for heads, and evaluates
    nothing after them; ValueError where there are fewer. `norms="rms"` is TVM's semi-Lipschitz network (arXiv 2511.19797,
    Eq. 16, App. B.2): rms norms in place of layer norms, and on every modulation.
    """

    def __init__(
        self, shape: tuple[int, ...], classes: int, width: int, depth: int, second_time: bool = False, guidance: bool = False,
        norms: Norms = "layer",
    ):  # fmt: skip
        super().__init__(classes, width, second_time, guidance)
        self.shape, self.norms = shape, norms
        size = int(torch.Size(shape).numel())
        self.enter = nn.Linear(size, width)
        self.blocks = nn.ModuleList(Block(width, norms) for _ in range(depth))
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
        c = self.condition(t, labels, s, guidance)
        h = self.enter(x.reshape(x.shape[0], -1))
        outputs = []
        for block in self.blocks[: features or None]:
            h = block(h, c)
            outputs.append(h)
        if features:
            return outputs
        shift, scale = modulations(self.modulation(c), 2, self.norms)
        return self.leave(normalised(h, self.norms) * (scale + 1.0) + shift).reshape(x.shape[0], *self.shape)


def copy_weights(source: dict[str, Tensor], target: nn.Module) -> None:
    """Load the state `source` into `target`, which may have more inputs (second time, guidance); those keep their zero start."""
    missing, unexpected = target.load_state_dict(source, strict=False)
    extra = [k for k in missing if not k.startswith(("gap.", "guidance."))]
    if extra or unexpected:
        raise ValueError(f"weights do not fit: missing {extra}, unexpected {unexpected}")
