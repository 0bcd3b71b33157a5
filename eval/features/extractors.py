"""Feature extractors: for digits two small networks of our own, weights committed next to this file; at image scale Inception.

Scores compare only under one extractor, so its `sha256` belongs in every cache key and every result row:
another classifier seed shifts the digits baselines by about 20 %.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from eval.features.weights import EXTRACTORS, IMAGE_SCALE, known_extractor

WEIGHTS = {name: Path(__file__).with_name(file) for name, file in EXTRACTORS.items()}


class DigitsClassifier(nn.Module):
    """Classifier of 8x8 digits (72,842 parameters) that shows its 64 penultimate activations.

    GELU rather than ReLU: no dead units, hence a feature covariance of full rank (64; with ReLU 57).
    No batch norm and no dropout: one image gives one feature, whatever batch or mode it comes in.
    """

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(64, 64, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(256, 64),
            nn.GELU(),
        )
        self.head = nn.Linear(64, 10)
        self.register_buffer("feature_scale", torch.ones(()))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """float [N,1,8,8] in [-1, 1] -> features [N,64], RMS 1 over the training images, and logits [N,10].

        KID's kernel (x.y/d + 1)^3 is not scale-free: noise on raw features (0.7 +- 7.8), usable at RMS 1.
        """
        hidden = self.body(x)
        return hidden * self.feature_scale, self.head(hidden)


class Mixing(nn.Module):
    """One layer of an MLP-Mixer (Tolstikhin et al. 2021, eq. 1): residual MLPs over the tokens, then over the channels."""

    def __init__(self, tokens: int, width: int, token_hidden: int, channel_hidden: int) -> None:
        super().__init__()
        self.over_tokens = nn.Sequential(
            nn.Linear(tokens, token_hidden), nn.GELU(), nn.Linear(token_hidden, tokens)
        )
        self.over_channels = nn.Sequential(
            nn.Linear(width, channel_hidden), nn.GELU(), nn.Linear(channel_hidden, width)
        )
        self.token_norm, self.channel_norm = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.over_tokens(self.token_norm(x).mT).mT
        return x + self.over_channels(self.channel_norm(x))


class DigitsMixer(nn.Module):
    """MLP-Mixer on the 16 patches (2x2 pixels) of an 8x8 digit, 70,800 parameters: no convolution over neighbours, no classes.

    The last layer reads all tokens side by side, as with their mean, which is usual, features knew too little of where things are.
    """

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, stride=2)
        self.body = nn.Sequential(
            *(Mixing(16, width, 32, 96) for _ in range(2)), nn.LayerNorm(width)
        )
        self.out = nn.Sequential(nn.Flatten(), nn.Linear(16 * width, 64))
        self.register_buffer("feature_scale", torch.ones(()))

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """float [N,1,8,8] in [-1, 1] -> features [N,64], RMS 1 over the training images; there is no class head."""
        return self.out(self.body(self.patches(x).flatten(2).mT)) * self.feature_scale, None


NETWORKS: dict[str, type[nn.Module]] = {
    "digits-gelu-64": DigitsClassifier,
    "digits-simclr-64": DigitsMixer,
}


def scaled(images_u8: Tensor) -> Tensor:
    """uint8 0..255 -> float32 -1..1."""
    return images_u8.float() / 127.5 - 1


@dataclass(frozen=True)
class Extractor:
    """A frozen network with the hash of its weights; the one interface that scores know.

    `network` maps what `prepare` makes of a batch to (features [n,D], logits [n,K]), or None for logits if it has no class
    head. An image has the given `shape` (C, H, W), where None takes any size.
    """

    name: str
    sha256: str  # of the bytes of the weight file; at image scale of the extractor's name as well
    network: nn.Module
    shape: tuple[int | None, int | None, int | None] = (1, 8, 8)
    prepare: Callable[[Tensor], Tensor] = scaled
    published: bool = (
        True  # False where the weight file is not the one that others' scores are made with
    )

    @torch.no_grad()
    def features(self, images_u8: Tensor, batch: int = 512) -> tuple[Tensor, Tensor | None]:
        """uint8 [N,C,H,W] -> features float32 [N,D] and logits float32 [N,K] or None, on the CPU, in one pass.

        Raises ValueError for anything but one or more uint8 images of the extractor's shape.
        """
        fits = images_u8.ndim == 4 and all(
            want in (None, have) for want, have in zip(self.shape, images_u8.shape[1:], strict=True)
        )
        if images_u8.dtype != torch.uint8 or not fits or len(images_u8) == 0:
            wanted = ",".join(
                axis if size is None else str(size)
                for axis, size in zip("CHW", self.shape, strict=True)
            )
            raise ValueError(
                f"{self.name} takes uint8 [N,{wanted}], got {images_u8.dtype} {list(images_u8.shape)}"
            )
        passes = [self.network(self.prepare(part)) for part in images_u8.cpu().split(batch)]
        features, logits = zip(*passes, strict=True)
        return torch.cat(features), None if logits[0] is None else torch.cat(logits)


def load_extractor(name: str) -> Extractor:
    """The extractor called `name`; raises ValueError with the nearest name where there is none."""
    known_extractor(name)
    if name in IMAGE_SCALE:
        from eval.features import inception  # which builds its extractors from the class above

        return inception.load(name)
    content = WEIGHTS[name].read_bytes()  # hashed and loaded from the same bytes
    return Extractor(
        name, hashlib.sha256(content).hexdigest(), network_of(name, safetensors.torch.load(content))
    )


def network_of(name: str, weights: Mapping[str, Tensor]) -> nn.Module:
    network = NETWORKS[name]().eval().requires_grad_(False)
    network.load_state_dict(weights)
    return network
