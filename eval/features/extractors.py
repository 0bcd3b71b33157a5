"""Feature extractors: networks, frozen, that turn images into what scores are computed from.

For digits two small networks of this project, weights committed next to this file; at image scale
Inception. Scores compare only under one extractor, so its `sha256` belongs in every cache key and
every result row: another classifier seed shifts the digits baselines by about 20 %.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from eval.features.weights import EXTRACTORS, IMAGE_SCALE, known_extractor

# Files of the committed weights, by extractor.
WEIGHTS = {name: Path(__file__).with_name(file) for name, file in EXTRACTORS.items()}


class DigitsClassifier(nn.Module):
    """Classifier of 8x8 digits (72,842 parameters) that shows its 64 penultimate activations.

    GELU rather than ReLU: no dead units, hence a feature covariance of full rank (64; with ReLU
    57). No batch norm and no dropout: one image gives one feature, whatever batch or mode it comes
    in.
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
        """float [N,1,8,8] in [-1, 1] -> features [N,64] and logits [N,10].

        Features have RMS 1 over the training images: KID's kernel (x.y/D + 1)^3 is not scale-free,
        noise on raw features (0.7 +- 7.8), usable at RMS 1.
        """
        hidden = self.body(x)
        return hidden * self.feature_scale, self.head(hidden)


class Mixing(nn.Module):
    """One layer of an MLP-Mixer (Tolstikhin et al. 2021, eq. 1).

    Residual MLPs over the tokens, then over the channels.
    """

    def __init__(self, tokens: int, width: int, token_hidden: int, channel_hidden: int) -> None:
        super().__init__()
        self.over_tokens = nn.Sequential(
            nn.Linear(tokens, token_hidden), nn.GELU(), nn.Linear(token_hidden, tokens)
        )
        self.over_channels = nn.Sequential(
            nn.Linear(width, channel_hidden), nn.GELU(), nn.Linear(channel_hidden, width)
        )
        self.token_norm = nn.LayerNorm(width)
        self.channel_norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """float [N,tokens,width] -> the same shape."""
        x = x + self.over_tokens(self.token_norm(x).mT).mT
        return x + self.over_channels(self.channel_norm(x))


class DigitsMixer(nn.Module):
    """MLP-Mixer on the 16 patches (2x2 pixels) of an 8x8 digit, 70,800 parameters.

    No convolution over neighbours, no classes. The last layer reads all tokens side by side: with
    their mean, which is usual, features knew too little of where things are.
    """

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, stride=2)
        self.body = nn.Sequential(
            Mixing(16, width, 32, 96),
            Mixing(16, width, 32, 96),
            nn.LayerNorm(width),
        )
        self.out = nn.Sequential(nn.Flatten(), nn.Linear(16 * width, 64))
        self.register_buffer("feature_scale", torch.ones(()))

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """float [N,1,8,8] in [-1, 1] -> features [N,64], RMS 1 over the training images, and None.

        There is no class head.
        """
        tokens = self.patches(x).flatten(2).mT
        features = self.out(self.body(tokens)) * self.feature_scale
        return features, None


NETWORKS: dict[str, type[nn.Module]] = {
    "digits-gelu-64": DigitsClassifier,
    "digits-simclr-64": DigitsMixer,
}


def scaled(images_u8: Tensor) -> Tensor:
    """Pixels uint8 0..255 as float32 in [-1, 1]."""
    return images_u8.float() / 127.5 - 1


@dataclass(frozen=True)
class Extractor:
    """A frozen network with the hash of its weights; the one interface that scores know.

    name: of the extractor; sha256: of the bytes of the weight file, at image scale of the
    extractor's name as well. `network` maps what `prepare` makes of a batch to (features [n,D],
    logits [n,K]), or None for logits if it has no class head. An image has the given `shape`
    (C, H, W), where None takes any size. `published` is False where the weight file is not the one
    that others' scores are made with.
    """

    name: str
    sha256: str
    network: nn.Module
    shape: tuple[int | None, int | None, int | None] = (1, 8, 8)
    prepare: Callable[[Tensor], Tensor] = scaled
    published: bool = True

    @torch.no_grad()
    def features(self, images_u8: Tensor, batch: int = 512) -> tuple[Tensor, Tensor | None]:
        """Features float32 [N,D] and logits float32 [N,K] or None of images uint8 [N,C,H,W].

        On the CPU, in one pass, `batch` images at a time. Raises ValueError for anything but one or
        more uint8 images of the extractor's shape.
        """
        if images_u8.dtype != torch.uint8 or not self._fits(images_u8) or len(images_u8) == 0:
            wanted = ",".join(
                axis if size is None else str(size)
                for axis, size in zip("CHW", self.shape, strict=True)
            )
            got = f"{images_u8.dtype} {list(images_u8.shape)}"
            raise ValueError(f"{self.name} takes uint8 [N,{wanted}], got {got}")
        features = []
        logits = []
        for part in images_u8.cpu().split(batch):
            part_features, part_logits = self.network(self.prepare(part))
            features.append(part_features)
            if part_logits is not None:
                logits.append(part_logits)
        return torch.cat(features), torch.cat(logits) if logits else None

    def _fits(self, images_u8: Tensor) -> bool:
        """Whether a tensor is of the shape [N,C,H,W] that the extractor takes."""
        if images_u8.ndim != 4:
            return False
        sizes = zip(self.shape, images_u8.shape[1:], strict=True)
        return all(want in (None, have) for want, have in sizes)


def load_extractor(name: str) -> Extractor:
    """The extractor called `name`; raises ValueError with the nearest name where there is none."""
    known_extractor(name)
    if name in IMAGE_SCALE:
        from eval.features import inception  # which builds its extractors from the class above

        return inception.load(name)
    content = WEIGHTS[name].read_bytes()  # hashed and loaded from the same bytes
    digest = hashlib.sha256(content).hexdigest()
    return Extractor(name, digest, network_of(name, safetensors.torch.load(content)))


def network_of(name: str, weights: Mapping[str, Tensor]) -> nn.Module:
    """The network of an extractor of NETWORKS, frozen, in evaluation mode.

    Raises RuntimeError where the weights are of another network.
    """
    network = NETWORKS[name]().eval().requires_grad_(False)
    network.load_state_dict(weights)
    return network
