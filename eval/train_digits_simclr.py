"""Trains `digits-simclr-64`, the second extractor of the digits: `python -m eval.train_digits_simclr`.

Another architecture and another objective than `digits-gelu-64`: SimCLR (Chen et al. 2020) sees no label. Two views of one
digit shall be alike, those of different digits not. Views differ by what makes no digit worse (moved, turned, scaled) and by a
hole, which forbids to go by one corner alone. They do NOT differ by noise, blur or contrast: features would learn to overlook
exactly what generators get wrong.

On all 1797 digits, one thread, bytes that repeat: for the reasons given in `eval.train_digits_extractor`.
"""

import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from eval.extractors import WEIGHTS, DigitsMixer, scaled
from eval.train_digits_extractor import alternate, digits_u8, write

EPOCHS, BATCH, PEAK_RATE, TEMPERATURE, SEED = 30, 128, 2e-3, 0.2, 0
SHIFT, TURN, SCALE, HOLE = 1.0, 0.2, 0.1, 3  # at most: pixels, radians, log of the factor; side of the hole in pixels


def view(x: Tensor, rng: torch.Generator) -> Tensor:
    """Every image [n,1,8,8] moved, turned and scaled at random about its centre, with a square hole of background."""
    n = len(x)
    dx, dy, angle, size = (torch.rand(4, n, generator=rng) * 2 - 1) * torch.tensor([SHIFT / 4, SHIFT / 4, TURN, SCALE])[:, None]
    cos, sin = angle.cos() * size.exp(), angle.sin() * size.exp()  # the picture's side is 2 here, hence a pixel 1/4
    grid = F.affine_grid(torch.stack([cos, -sin, dx, sin, cos, dy], dim=1).view(n, 2, 3), list(x.shape), align_corners=False)
    moved = F.grid_sample(x + 1, grid, align_corners=False) - 1  # beyond the border lies background
    top, left = torch.randint(0, 9 - HOLE, (2, n, 1, 1, 1), generator=rng)
    row, column = torch.arange(8).view(8, 1), torch.arange(8)
    hole = (row >= top) & (row < top + HOLE) & (column >= left) & (column < left + HOLE)
    return moved.masked_fill(hole, -1.0)


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
        projection = nn.Sequential(nn.GELU(), nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))  # thrown away, as in the paper
    optimizer = torch.optim.AdamW([*network.parameters(), *projection.parameters()], lr=PEAK_RATE, weight_decay=1e-2)
    x = scaled(images_u8)
    batches = len(x) // BATCH  # whole ones only: the loss depends on how many others there are
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, total_steps=epochs * batches, pct_start=0.1)
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


def main() -> None:
    torch.set_num_threads(1)
    images, labels = digits_u8()
    even = alternate(labels)
    readers = {"5 nearest neighbours": KNeighborsClassifier(5), "linear probe": make_pipeline(StandardScaler(), LogisticRegression())}
    for name, half in (("even", even), ("odd", ~even)):
        features = train(images[half])(scaled(images))[0].numpy()
        right = [
            f"{what} {reader.fit(features[half], labels[half]).score(features[~half], labels[~half]):.2%}"
            for what, reader in readers.items()
        ]
        print(f"trained without labels on the {name} half, of the other half right: {', '.join(right)}")
    write(train(images), WEIGHTS["digits-simclr-64"])


if __name__ == "__main__":
    main()
