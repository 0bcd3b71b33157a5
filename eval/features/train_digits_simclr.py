"""Trains `digits-simclr-64`, the second extractor of the digits: `python -m eval.train_digits_simclr`.

Another architecture and another objective than `digits-gelu-64`: SimCLR (Chen et al. 2020) sees no label. Two views of one
digit shall be alike, those of different digits not. Views differ by what makes no digit worse: moved, turned, scaled. They do
NOT differ by noise, blur or contrast: features would learn to overlook exactly what generators get wrong.

What it learned shows on digits moved by a pixel. On digits as they are, raw pixels do as well as any features here, and an
untrained network nearly: accuracy there says nothing about training.

On all 1797 digits, one thread, bytes that repeat: for the reasons given in `eval.train_digits_extractor`.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from eval.features.extractors import WEIGHTS, DigitsMixer, scaled
from eval.features.train_digits_extractor import alternate, digits_u8, write

EPOCHS, BATCH, PEAK_RATE, TEMPERATURE, SEED = 120, 128, 5e-3, 0.2, 0
SHIFT, TURN, SCALE = 1.0, 0.2, 0.1  # at most: pixels, radians, log of the factor


def view(x: Tensor, rng: torch.Generator) -> Tensor:
    """Every image [n,1,8,8] moved, turned and scaled at random about its centre, background moving in."""
    n = len(x)
    dx, dy, angle, size = (torch.rand(4, n, generator=rng) * 2 - 1) * torch.tensor(
        [SHIFT / 4, SHIFT / 4, TURN, SCALE]
    )[:, None]
    cos, sin = (
        angle.cos() * size.exp(),
        angle.sin() * size.exp(),
    )  # the picture's side is 2 here, hence a pixel 1/4
    grid = F.affine_grid(
        torch.stack([cos, -sin, dx, sin, cos, dy], dim=1).view(n, 2, 3),
        list(x.shape),
        align_corners=False,
    )
    return F.grid_sample(x + 1, grid, align_corners=False) - 1  # beyond the border lies background


def neighbours(x: Tensor) -> list[Tensor]:
    """The images [n,1,8,8] moved by one pixel in each of the 8 directions, background moving in."""
    padded = F.pad(x, (1, 1, 1, 1), value=-1.0)
    return [
        padded[..., i : i + 8, j : j + 8] for i in range(3) for j in range(3) if (i, j) != (1, 1)
    ]


def contrast_loss(one: Tensor, two: Tensor) -> Tensor:
    """NT-Xent (Chen et al. 2020, eq. 1) of projections [n,D] each: row i of one and row i of two are views of one image."""
    n = len(one)
    z = F.normalize(torch.cat([one, two]), dim=1)
    similarity = (z @ z.T / TEMPERATURE).masked_fill(torch.eye(2 * n, dtype=torch.bool), -torch.inf)
    return F.cross_entropy(similarity, torch.arange(2 * n).roll(n))


def train(images_u8: Tensor, epochs: int = EPOCHS) -> DigitsMixer:
    """An extractor from these images, its features scaled to RMS 1 over them. Repeats to the byte."""
    rng = torch.Generator().manual_seed(SEED)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)  # layers initialise from the global stream
        network = DigitsMixer()
        projection = nn.Sequential(
            nn.GELU(), nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)
        )  # thrown away, as in the paper
    optimizer = torch.optim.AdamW(
        [*network.parameters(), *projection.parameters()], lr=PEAK_RATE, weight_decay=1e-2
    )
    x = scaled(images_u8)
    batches = len(x) // BATCH  # whole ones only: the loss depends on how many others there are
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PEAK_RATE, total_steps=epochs * batches, pct_start=0.1
    )
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=rng)[: batches * BATCH].split(BATCH):
            views = torch.cat([view(x[rows], rng), view(x[rows], rng)])
            loss = contrast_loss(*projection(network(views)[0]).chunk(2))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    network.eval().requires_grad_(False)
    network.get_buffer("feature_scale").fill_(1 / network(x)[0].square().mean().sqrt())
    return network


def recognised(
    features: Callable[[Tensor], Tensor], images_u8: Tensor, labels: Tensor, known: Tensor
) -> dict[str, float]:
    """Share of the digits outside `known` (bool [N]) that a reader of the features of those inside gets right, by reader and place."""
    x, found = scaled(images_u8), dict[str, float]()
    readers = {
        "5 nearest": KNeighborsClassifier(5),
        "linear probe": make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)),
    }
    for name, reader in readers.items():
        reader.fit(features(x[known]).numpy(), labels[known])
        right = [
            reader.score(features(z).numpy(), labels[~known])
            for z in (x[~known], *neighbours(x[~known]))
        ]
        found |= {name: right[0], f"{name}, moved a pixel": sum(right[1:]) / 8}
    return found


def main() -> None:
    torch.set_num_threads(1)
    images, labels = digits_u8()
    even = alternate(labels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        untrained = DigitsMixer().requires_grad_(False)
    for name, known in (("even", even), ("odd", ~even)):
        trained = train(images[known])
        ways: dict[str, Callable[[Tensor], Tensor]] = {
            "pixels": lambda x: x.flatten(1),
            "untrained": lambda x: untrained(x)[0],
            "trained": lambda x, network=trained: network(x)[0],  # type: ignore[misc]
        }
        for way, features in ways.items():
            found = recognised(features, images, labels, known)
            print(
                f"{name} half known, {way}: "
                + ", ".join(f"{what} {right:.2%}" for what, right in found.items()),
                flush=True,
            )
    write(train(images), WEIGHTS["digits-simclr-64"])


if __name__ == "__main__":
    main()
