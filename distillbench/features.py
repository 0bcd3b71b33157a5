"""Frozen features for discriminators: multi-scale tokens of an image network, or of a random one.

The suite's own stand-in for DINO: on images SimCLR (Chen et al. 2020), trained without labels on
the training half, inside the cell and charged to its budget. It never scores: the networks that do
are eval's, of another architecture, objective or data.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distillbench.seeds import Rng

WIDTH = 64
BATCH = 128
RATE = 3e-3
TEMPERATURE = 0.2

# Of a view, at most:
SHIFT = 0.25  # share of half the picture
TURN = 0.2  # radians
SCALE = 0.1  # log of the factor


class ImageFeatures(nn.Module):
    """[B, C, H, W] float32 -> three sets of tokens [B, T, width], the outputs of convolutions.

    T = HW, HW/4, HW/16 and width 32, 64, 64 in this order.
    """

    def __init__(self, channels: int):
        super().__init__()
        sizes = (channels, WIDTH // 2, WIDTH, WIDTH)
        convolutions = []
        for i, (before, after) in enumerate(pairwise(sizes)):
            stride = 2 if i else 1
            convolutions.append(nn.Conv2d(before, after, 3, stride=stride, padding=1))
        for layer in convolutions:
            nn.init.orthogonal_(layer.weight, 2**0.5)
        self.layers = nn.ModuleList(convolutions)

    def forward(self, x: Tensor) -> list[Tensor]:
        tokens = []
        for layer in self.layers:
            x = F.gelu(layer(x))
            tokens.append(x.flatten(2).mT)
        return tokens


class PointFeatures(nn.Module):
    """[B, D] float32 -> three single tokens [B, 1, WIDTH] of a random network of orthogonal layers.

    For data that are no images.
    """

    def __init__(self, size: int):
        super().__init__()
        layers = [nn.Linear(before, WIDTH) for before in (size, WIDTH, WIDTH)]
        for layer in layers:
            nn.init.orthogonal_(layer.weight, 2**0.5)
            nn.init.uniform_(layer.bias, -1.0, 1.0)
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> list[Tensor]:
        tokens = []
        h = x.flatten(1)
        for layer in self.layers:
            h = F.gelu(layer(h))
            tokens.append(h[:, None])
        return tokens


def untrained(shape: tuple[int, ...]) -> nn.Module:
    """The network for data of this shape, with weights drawn from torch's global stream."""
    if len(shape) == 3:
        return ImageFeatures(shape[0])
    return PointFeatures(int(torch.Size(shape).numel()))


def view(x: Tensor, rng: Rng) -> Tensor:
    """Every image of x [B, C, H, W] in [-1, 1] moved, turned and scaled at random; like x.

    About its centre, background (-1) moving in. Not blurred, no noise, no change of contrast:
    features must not learn to overlook what generators get wrong.
    """

    def signed() -> Tensor:
        return 2 * rng.uniform(len(x)) - 1

    dx = signed()
    dy = signed()
    angle = TURN * signed()
    size = (SCALE * signed()).exp()
    cos = angle.cos() * size
    sin = angle.sin() * size
    affine = torch.stack([cos, -sin, SHIFT * dx, sin, cos, SHIFT * dy], 1).view(-1, 2, 3)
    grid = F.affine_grid(affine, list(x.shape), align_corners=False)
    return F.grid_sample(x + 1, grid, align_corners=False) - 1


def contrast_loss(one: Tensor, two: Tensor) -> Tensor:
    """NT-Xent (Chen et al. 2020, Eq. 1), a scalar.

    Row i of `one` and of `two` [B, D] are views of one image, all others are not.
    """
    n = len(one)
    z = F.normalize(torch.cat([one, two]), dim=1)
    itself = torch.eye(2 * n, dtype=torch.bool, device=z.device)
    similarity = (z @ z.T / TEMPERATURE).masked_fill(itself, -torch.inf)
    partner = torch.arange(2 * n, device=z.device).roll(n)
    return F.cross_entropy(similarity, partner)


def pretrain(
    network: nn.Module,
    draw: Callable[[Rng, int], tuple[Tensor, Tensor]],
    shape: tuple[int, ...],
    rng: Rng,
    device: torch.device,
    updates: int,
) -> None:
    """Train `network` in place on images [n, *shape] in [-1, 1] that `draw(rng, n)` gives.

    Their labels [n] are not looked at. Nothing happens for 0 updates; otherwise the network is
    frozen afterwards.
    """
    if updates == 0:
        return
    network.requires_grad_(True)
    size = network(torch.zeros(1, *shape, device=device))[-1].flatten(1).shape[1]
    projection = nn.Sequential(nn.Linear(size, 128), nn.GELU(), nn.Linear(128, 64))
    projection.to(device)  # thrown away, as in the paper
    parameters = [*network.parameters(), *projection.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=1e-2, foreach=True)
    warm = max(1, updates // 10)

    def projected_view(x: Tensor) -> Tensor:
        tokens = network(view(x, rng))[-1]
        return projection(tokens.flatten(1))

    for i in range(updates):
        for group in optimizer.param_groups:  # linear warm-up, then down to zero
            group["lr"] = RATE * min((i + 1) / warm, (updates - i) / max(1, updates - warm))
        x = draw(rng, BATCH)[0].to(device)
        one = projected_view(x)
        two = projected_view(x)
        gradients = torch.autograd.grad(contrast_loss(one, two), parameters)
        for p, g in zip(parameters, gradients):
            p.grad = g
        optimizer.step()
    for p in network.requires_grad_(False).parameters():
        p.grad = None
