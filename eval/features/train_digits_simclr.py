"""Trains `digits-simclr-64`, the second extractor of the digits.

Run as `python -m eval.features.train_digits_simclr`. Another architecture and another objective
than `digits-gelu-64`: SimCLR (Chen et al. 2020) sees no label. Two views of one digit shall be
alike, those of different digits not. Views differ by what makes no digit worse: moved, turned,
scaled. They do NOT differ by noise, blur or contrast: features would learn to overlook exactly what
generators get wrong.

What it learned shows on digits moved by a pixel. On digits as they are, raw pixels do as well as
any features here, and an untrained network nearly: accuracy there says nothing about training.

On all 1797 digits, one thread, bytes that repeat: for the reasons given in
`eval.features.train_digits_extractor`.
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

EPOCHS = 120
BATCH = 128
PEAK_RATE = 5e-3
TEMPERATURE = 0.2
SEED = 0
# How far a view differs at most.
SHIFT = 1.0  # pixels
TURN = 0.2  # radians
SCALE = 0.1  # log of the factor


def view(x: Tensor, rng: torch.Generator) -> Tensor:
    """Images float [n,1,8,8], each moved, turned and scaled at random about its centre.

    Background (-1) moves in.
    """
    n = len(x)
    # The picture's side is 2 here, hence a pixel 1/4.
    most = torch.tensor([SHIFT / 4, SHIFT / 4, TURN, SCALE])
    dx, dy, angle, size = (torch.rand(4, n, generator=rng) * 2 - 1) * most[:, None]
    cos = angle.cos() * size.exp()
    sin = angle.sin() * size.exp()
    maps = torch.stack([cos, -sin, dx, sin, cos, dy], dim=1).view(n, 2, 3)
    grid = F.affine_grid(maps, list(x.shape), align_corners=False)
    return F.grid_sample(x + 1, grid, align_corners=False) - 1  # beyond the border lies background


def neighbours(x: Tensor) -> list[Tensor]:
    """Images float [n,1,8,8] moved by a pixel in each of 8 directions, background moving in."""
    padded = F.pad(x, (1, 1, 1, 1), value=-1.0)
    moved = []
    for i in range(3):
        for j in range(3):
            if (i, j) != (1, 1):
                moved.append(padded[..., i : i + 8, j : j + 8])
    return moved


def contrast_loss(first: Tensor, second: Tensor) -> Tensor:
    """NT-Xent (Chen et al. 2020, eq. 1) of projections [n,D] each -> scalar.

    Row i of `first` and row i of `second` are of two views of one image.
    """
    n = len(first)
    z = F.normalize(torch.cat([first, second]), dim=1)
    similarity = (z @ z.T / TEMPERATURE).masked_fill(torch.eye(2 * n, dtype=torch.bool), -torch.inf)
    return F.cross_entropy(similarity, torch.arange(2 * n).roll(n))


def train(images_u8: Tensor, epochs: int = EPOCHS) -> DigitsMixer:
    """Train an extractor on images uint8 [N,1,8,8].

    Its features are scaled to RMS 1 over these images. Repeats to the byte.
    """
    rng = torch.Generator().manual_seed(SEED)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)  # layers initialise from the global stream
        network = DigitsMixer()
        # Thrown away, as in the paper.
        projection = nn.Sequential(nn.GELU(), nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
    parameters = [*network.parameters(), *projection.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=PEAK_RATE, weight_decay=1e-2)
    x = scaled(images_u8)
    batches = len(x) // BATCH  # whole ones only: the loss depends on how many others there are
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PEAK_RATE, total_steps=epochs * batches, pct_start=0.1
    )
    for _ in range(epochs):
        order = torch.randperm(len(x), generator=rng)
        for rows in order[: batches * BATCH].split(BATCH):
            views = torch.cat([view(x[rows], rng), view(x[rows], rng)])
            features, _ = network(views)
            first, second = projection(features).chunk(2)
            loss = contrast_loss(first, second)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    network.eval().requires_grad_(False)
    features, _ = network(x)
    network.get_buffer("feature_scale").fill_(1 / features.square().mean().sqrt())
    return network


def recognised(
    features: Callable[[Tensor], Tensor], images_u8: Tensor, labels: Tensor, known: Tensor
) -> dict[str, float]:
    """Accuracy on unseen digits of two classifiers on features, as they are and moved by a pixel.

    The classifiers learn from the features of the digits in `known` (bool [N]) of images uint8
    [N,1,8,8] with labels int64 [N], and are asked about the others. By classifier and move.
    """
    x = scaled(images_u8)
    unseen = x[~known]
    classifiers = {
        "5 nearest": KNeighborsClassifier(5),
        "linear probe": make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)),
    }
    shares: dict[str, float] = {}
    for name, classifier in classifiers.items():
        classifier.fit(features(x[known]).numpy(), labels[known])
        shares[name] = classifier.score(features(unseen).numpy(), labels[~known])
        moved = [classifier.score(features(z).numpy(), labels[~known]) for z in neighbours(unseen)]
        shares[f"{name}, moved a pixel"] = sum(moved) / 8
    return shares


def main() -> None:
    """Print what each half of the digits says of the other, then train on all and write."""
    torch.set_num_threads(1)
    images, labels = digits_u8()
    even = alternate(labels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        untrained = DigitsMixer().requires_grad_(False)

    def features_of(network: DigitsMixer) -> Callable[[Tensor], Tensor]:
        def features(x: Tensor) -> Tensor:
            return network(x)[0]

        return features

    def pixels(x: Tensor) -> Tensor:
        return x.flatten(1)

    for half, known in (("even", even), ("odd", ~even)):
        ways = {
            "pixels": pixels,
            "untrained": features_of(untrained),
            "trained": features_of(train(images[known])),
        }
        for way, features in ways.items():
            shares = recognised(features, images, labels, known)
            line = ", ".join(f"{name} {share:.2%}" for name, share in shares.items())
            print(f"{half} half known, {way}: {line}", flush=True)
    write(train(images), WEIGHTS["digits-simclr-64"])


if __name__ == "__main__":
    main()
