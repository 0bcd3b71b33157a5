"""Feature extractors that `eval` owns: small networks whose weights are committed next to this file.

Scores compare only under one extractor, so its `sha256` belongs in every cache key and every result row:
another classifier seed shifts the digits baselines by about 20 %.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from eval.records import EXTRACTORS, known_extractor

WEIGHTS = {name: Path(__file__).with_name(file) for name, file in EXTRACTORS.items()}


class DigitsClassifier(nn.Module):
    """Classifier of 8x8 digits (72,842 parameters) that shows its 64 penultimate activations.

    GELU rather than ReLU: no dead units, hence a feature covariance of full rank (64; with ReLU 57).
    No batch norm and no dropout: one image gives one feature, whatever batch or mode it comes in.
    """

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.GELU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.GELU(),
            nn.Conv2d(64, 64, 3, stride=2, padding=1), nn.GELU(),
            nn.Flatten(), nn.Linear(256, 64), nn.GELU(),
        )  # fmt: skip
        self.head = nn.Linear(64, 10)
        self.register_buffer("feature_scale", torch.ones(()))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """float [N,1,8,8] in [-1, 1] -> features [N,64], RMS 1 over the training images, and logits [N,10].

        KID's kernel (x.y/d + 1)^3 is not scale-free: noise on raw features (0.7 +- 7.8), usable at RMS 1.
        """
        hidden = self.body(x)
        return hidden * self.feature_scale, self.head(hidden)


@dataclass(frozen=True)
class Extractor:
    name: str
    sha256: str  # of the bytes of the committed weight file
    network: nn.Module

    @torch.no_grad()
    def features(self, images_u8: Tensor, batch: int = 512) -> tuple[Tensor, Tensor]:
        """uint8 [N,1,8,8] -> features float32 [N,64] and logits float32 [N,10], on the CPU, in one pass.

        Raises ValueError for anything but uint8 images of that shape.
        """
        if images_u8.dtype != torch.uint8 or images_u8.ndim != 4 or images_u8.shape[1:] != (1, 8, 8):
            got = f"{images_u8.dtype} {list(images_u8.shape)}"
            raise ValueError(f"{self.name} takes uint8 [N,1,8,8], got {got}")
        passes = [self.network(scaled(part)) for part in images_u8.cpu().split(batch)]
        return torch.cat([feat for feat, _ in passes]), torch.cat([logits for _, logits in passes])


def scaled(images_u8: Tensor) -> Tensor:
    """uint8 0..255 -> float32 -1..1."""
    return images_u8.float() / 127.5 - 1


def load_extractor(name: str) -> Extractor:
    """The extractor called `name`; raises ValueError with the nearest name where there is none."""
    known_extractor(name)
    content = WEIGHTS[name].read_bytes()  # hashed and loaded from the same bytes
    return Extractor(name, hashlib.sha256(content).hexdigest(), network_of(safetensors.torch.load(content)))


def network_of(weights: Mapping[str, Tensor]) -> DigitsClassifier:
    network = DigitsClassifier().eval().requires_grad_(False)
    network.load_state_dict(weights)
    return network
