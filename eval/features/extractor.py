"""The interface of a feature extractor, the one that scores know."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


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
