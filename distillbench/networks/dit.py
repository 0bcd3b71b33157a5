"""The velocity network of image scale: a class-conditional transformer on patches (DiT).

Peebles & Xie, arXiv 2212.09748. It takes what `distillbench.networks.mlp.VelocityMLP` takes and is
written in the operations that `distillbench.jvp` knows. It differs from the paper's network where
flow maps need it: time enters raw through low frequencies, and a second time or a guidance weight
may.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distillbench.method import Norms
from distillbench.networks.conditioning import EPSILON, Conditioned

RATIO = 4  # of an MLP's hidden width to the width
LABEL_STD = 0.02  # of the label embedding at the start
SIZES = {  # the paper's Table 1; the patch is of 2 latent pixels ("/2")
    "S/2": {"width": 384, "depth": 12, "heads": 6, "patch": 2},
    "B/2": {"width": 768, "depth": 12, "heads": 12, "patch": 2},
    "L/2": {"width": 1024, "depth": 24, "heads": 16, "patch": 2},
    "XL/2": {"width": 1152, "depth": 28, "heads": 16, "patch": 2},
}


def normalised(h: Tensor, norms: Norms) -> Tensor:
    """h [..., width] with layer norm or rms norm over the width, without weights."""
    shape = (h.shape[-1],)
    if norms == "layer":
        return F.layer_norm(h, shape, None, None, EPSILON)
    return F.rms_norm(h, shape, eps=EPSILON)


def modulations(c: Tensor, n: int, norms: Norms) -> list[Tensor]:
    """c [B, n width] in n parts [B, 1, width] that act on all tokens alike.

    With `rms` each part is normalised (TVM, arXiv 2511.19797, App. B.2).
    """
    parts = [part.reshape(part.shape[0], 1, part.shape[1]) for part in c.chunk(n, 1)]
    return parts if norms == "layer" else [normalised(part, norms) for part in parts]


def positions(rows: int, columns: int, width: int) -> Tensor:
    """[rows columns, width] float32: sines and cosines of the row, then of the column.

    Frequencies from 1 down to 1e-4; DiT's fixed embedding. width: a multiple of 4.
    """
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).double()  # [T, 2]
    angles = places[:, :, None] * frequencies  # [T, 2, width / 4]
    return torch.cat([angles.sin(), angles.cos()], 2).flatten(1).float()


class Attention(nn.Module):
    """Multi-head self-attention over tokens [B, T, width].

    With `rms` queries and keys are normalised (TVM, arXiv 2511.19797, section 4.1, less weights).
    """

    def __init__(self, width: int, heads: int, norms: Norms):
        super().__init__()
        self.heads = heads
        self.norms: Norms = norms
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, h: Tensor) -> Tensor:
        b, tokens, width = h.shape

        def by_head(part: Tensor) -> Tensor:
            split = part.reshape(b, tokens, self.heads, width // self.heads)
            return split.permute(0, 2, 1, 3)  # [B, heads, T, width / heads]

        queries, keys, values = self.qkv(h).chunk(3, 2)
        q = by_head(queries)
        k = by_head(keys)
        v = by_head(values)
        if self.norms == "rms":
            q = normalised(q, "rms")
            k = normalised(k, "rms")
        mixed = F.scaled_dot_product_attention(q, k, v).permute(0, 2, 1, 3)
        return self.out(mixed.reshape(b, tokens, width))


class TransformerBlock(nn.Module):
    """adaLN-Zero: h + gate * attention(scale * norm(h) + shift), then the same with an MLP.

    Tokens h [B, T, width], modulated by the condition c [B, width]; both gates start at zero.
    """

    def __init__(self, width: int, heads: int, norms: Norms):
        super().__init__()
        self.norms: Norms = norms
        self.modulation = nn.Linear(width, 6 * width)
        self.attention = Attention(width, heads, norms)
        self.up = nn.Linear(width, RATIO * width)
        self.down = nn.Linear(RATIO * width, width)

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        """h: tokens [B, T, width]; c: the condition [B, width]."""
        parts = modulations(self.modulation(c), 6, self.norms)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = parts
        modulated = normalised(h, self.norms) * (scale + 1.0) + shift
        h = h + gate * self.attention(modulated)
        modulated = normalised(h, self.norms) * (scale_mlp + 1.0) + shift_mlp
        hidden = F.gelu(self.up(modulated), approximate="tanh")
        return h + gate_mlp * self.down(hidden)


class DiT(Conditioned):
    """v(x, t, label), or u(x, t, s, label) with `second_time`; with `guidance` also of a weight.

    x: [B, C, H, W] float32, H and W multiples of `patch`; t, s, guidance: [B]; labels: [B] int64 in
    [0, classes], where `classes` is the null label. Returns a tensor like x, zero at the start;
    with `features=k` instead what heads see, [B, width] each: the mean over tokens of the outputs
    of the first k blocks, evaluating nothing after them. A block's own output is tokens
    [B, T, width], T = H W / patch^2. Raises ValueError where there are fewer blocks, where patches
    do not tile the image, or where heads or 4 do not divide the width. `norms="rms"`: see
    VelocityMLP.
    """

    positions: Tensor

    def __init__(
        self,
        shape: tuple[int, ...],
        classes: int,
        width: int,
        depth: int,
        heads: int,
        patch: int,
        second_time: bool = False,
        guidance: bool = False,
        norms: Norms = "layer",
    ):
        super().__init__(classes, width, second_time, guidance)
        channels, rows, columns = shape
        if rows % patch or columns % patch or width % heads or width % 4:
            raise ValueError(
                f"patches of {patch} must tile {rows}x{columns}; "
                f"{heads} heads and 4 must divide the width {width}"
            )
        self.shape = shape
        self.patch = patch
        self.norms: Norms = norms
        size = channels * patch**2
        self.enter = nn.Linear(size, width)
        where = positions(rows // patch, columns // patch, width)
        self.register_buffer("positions", where, persistent=False)
        self.blocks = nn.ModuleList(TransformerBlock(width, heads, norms) for _ in range(depth))
        self.modulation = nn.Linear(width, 2 * width)
        self.leave = nn.Linear(width, size)
        self._start()

    def _start(self) -> None:
        """DiT's initialisation of blocks and labels.

        Xavier, small label vectors, and zero where the network would leave the identity.
        """
        for part in (self.enter, *self.blocks):
            for layer in part.modules():
                if isinstance(layer, nn.Linear):
                    nn.init.xavier_uniform_(layer.weight)
                    nn.init.zeros_(layer.bias)
        if self.label is not None:
            nn.init.normal_(self.label.weight, std=LABEL_STD)
        modulations_of_blocks = [block.get_submodule("modulation") for block in self.blocks]
        for layer in (self.modulation, self.leave, *modulations_of_blocks):
            for p in layer.parameters():
                nn.init.zeros_(p)

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
        h = self.enter(self.patches(x)) + self.positions
        outputs = []
        for block in self.blocks[: features or None]:
            h = block(h, c)
            if features:
                outputs.append(h.mean(1))
        if features:
            return outputs
        shift, scale = modulations(self.modulation(c), 2, self.norms)
        modulated = normalised(h, self.norms) * (scale + 1.0) + shift
        return self.image(self.leave(modulated))

    def patches(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, T, C patch^2], row by row of patches."""
        channels, height, width = self.shape
        p = self.patch
        rows = height // p
        columns = width // p
        x = x.reshape(x.shape[0], channels, rows, p, columns, p).permute(0, 2, 4, 1, 3, 5)
        return x.reshape(x.shape[0], rows * columns, channels * p * p)

    def image(self, tokens: Tensor) -> Tensor:
        """[B, T, C patch^2] -> [B, C, H, W], inverse of `patches`."""
        channels, height, width = self.shape
        p = self.patch
        b = tokens.shape[0]
        x = tokens.reshape(b, height // p, width // p, channels, p, p).permute(0, 3, 1, 4, 2, 5)
        return x.reshape(b, channels, height, width)
