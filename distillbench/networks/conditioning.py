"""What all velocity networks share: embeddings of times, labels and guidance weights.

Written in the operations that `distillbench.jvp` knows, so that a forward also carries tangents.
Time enters raw, in [0, 1], through low frequencies: a flow map trained through its time derivative
fails with embeddings of 1000 t.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LOWEST = 1.0  # radians per unit of time
HIGHEST = 12.0
FREQUENCIES = 16
EPSILON = 1e-6  # of rms norms, TVM's (arXiv 2511.19797, official training/dit.py)


class Embedding(nn.Module):
    """[B] numbers -> [B, width]: sines and cosines of low frequency, then two linear layers."""

    frequencies: Tensor

    def __init__(self, width: int, zero: bool = False):
        super().__init__()
        frequencies = torch.linspace(LOWEST, HIGHEST, FREQUENCIES)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.first = nn.Linear(2 * FREQUENCIES, width)
        self.last = nn.Linear(width, width)
        if zero:  # starts without effect: a student with a second time starts as its teacher
            nn.init.zeros_(self.last.weight)
            nn.init.zeros_(self.last.bias)

    def forward(self, t: Tensor) -> Tensor:
        angle = t.reshape(t.shape[0], 1) * self.frequencies
        waves = torch.cat([torch.sin(angle), torch.cos(angle)], 1)
        return self.last(F.silu(self.first(waves)))


class Conditioned(nn.Module):
    """A network with embeddings of t, label, t - s and guidance weight, each where there is one."""

    def __init__(self, classes: int, width: int, second_time: bool, guidance: bool):
        super().__init__()
        self.classes = classes
        self.time = Embedding(width)
        self.label = nn.Embedding(classes + 1, width) if classes else None
        self.gap = Embedding(width, zero=True) if second_time else None
        self.guidance = Embedding(width, zero=True) if guidance else None

    def condition(
        self, t: Tensor, labels: Tensor | None, s: Tensor | None, guidance: Tensor | None
    ) -> Tensor:
        """The activated sum of the embeddings, [B, width].

        t, s, guidance: [B]; labels: [B] int64 in [0, classes], where `classes` is the null label.
        """
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
