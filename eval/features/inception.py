"""Inception-v3 of 2015 as two packages use it: one weight file, two extractors that never mix.

The weights are the user's: found where `eval.features.weights.weight_file` says, never fetched. The
two differ in preprocessing. `inception-torch-fidelity` resizes as TensorFlow 1 did (bilinear, no
antialiasing; torch-fidelity, and the FIDs of most papers), `inception-clean-fid` as Parmar et al.
2022 (clean-fid) propose: Pillow's antialiased bicubic filter in float. From 32 to 299 pixels the
two move features by far more than methods differ, so each has its own hash, and a reference of one
is refused by the other.
"""

import hashlib
import io
import warnings
from pathlib import Path

import torch
from cleanfid.resize import build_resizer
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from eval.features.extractors import Extractor
from eval.features.weights import weight_file

CHUNK = 32  # images in the network at a time: about 0.6 GB of activations at 299 x 299


class TorchFidelity(nn.Module):
    """torch-fidelity as it is: features of layer 2048, and the logits without bias for its IS."""

    def __init__(self, network: FeatureExtractorInceptionV3):
        super().__init__()
        self.network = network

    def forward(self, images_u8: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 [N,3,H,W] -> features float32 [N,2048] and logits float32 [N,1008]."""
        features = []
        logits = []
        for part in images_u8.split(CHUNK):
            part_features, part_logits = self.network(part)
            features.append(part_features)
            logits.append(part_logits)
        return torch.cat(features), torch.cat(logits)


class CleanFid(nn.Module):
    """torch-fidelity's layers behind clean-fid's resizer and its scaling (x - 128) / 128.

    No logits: IS is not defined under this preprocessing.
    """

    def __init__(self, network: FeatureExtractorInceptionV3):
        super().__init__()
        # All but `fc`, registered in the order of `forward`.
        layers = list(network.children())[:-1]
        self.layers = nn.Sequential(*layers)
        self.resize = build_resizer("clean")

    def forward(self, images_u8: Tensor) -> tuple[Tensor, None]:
        """uint8 [N,3,H,W] -> features float32 [N,2048] and None."""
        features = []
        for part in images_u8.split(CHUNK):
            scaled = (self.resized(part) - 128) / 128
            features.append(self.layers(scaled).flatten(1))
        return torch.cat(features), None

    def resized(self, images_u8: Tensor) -> Tensor:
        """uint8 [N,3,H,W] -> float32 [N,3,299,299] in 0..255, not rounded.

        clean-fid resizes single images [H,W,3].
        """
        channels_last = images_u8.permute(0, 2, 3, 1).numpy()
        images = [torch.from_numpy(self.resize(image)) for image in channels_last]
        return torch.stack(images).permute(0, 3, 1, 2)


NETWORKS: dict[str, type[nn.Module]] = {
    "inception-torch-fidelity": TorchFidelity,
    "inception-clean-fid": CleanFid,
}


def rgb(images_u8: Tensor) -> Tensor:
    """Images uint8 [N,1,H,W] or [N,3,H,W] as [N,3,H,W].

    Grey images get three equal channels, as both packages do when they read a grey file. Raises
    ValueError for other numbers of channels.
    """
    if images_u8.shape[1] not in (1, 3):
        raise ValueError(f"Inception takes images of 1 or 3 channels, got {list(images_u8.shape)}")
    return images_u8.expand(-1, 3, -1, -1)


def load(name: str) -> Extractor:
    """The extractor `name` of images uint8 [N,3,H,W] or [N,1,H,W] of any size.

    Features are not rescaled, as published FIDs are. Its `sha256` is that of the weight file's
    bytes and of the name, so the two extractors differ; `published` says whether the file is the
    published one, whose hash is in its name. Raises ValueError in one line where the file is
    missing, holds anything but tensors, or tensors of another network.
    """
    path = weight_file(name)
    content = path.read_bytes()  # hashed and loaded from the same bytes
    digest = hashlib.sha256(content)
    published = digest.hexdigest().startswith(path.stem.rpartition("-")[2])
    digest.update(name.encode())
    network = NETWORKS[name](network_of(content, path)).eval().requires_grad_(False)
    return Extractor(
        name,
        digest.hexdigest(),
        network,
        shape=(None, None, None),
        prepare=rgb,
        published=published,
    )


def network_of(content: bytes, path: Path) -> FeatureExtractorInceptionV3:
    """torch-fidelity's network with the weights in the bytes of a file; no code in them is run.

    Raises ValueError in one line, which names `path`, for anything but its state dict.
    """
    weights = _state_dict(content, path)
    # torch-fidelity loads with weights_only=False: it gets what was read safely, written again.
    safe = io.BytesIO()
    torch.save(weights, safe)
    safe.seek(0)
    try:
        return FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=safe
        )
    except RuntimeError as e:
        lines = str(e).splitlines()
        reason = lines[1].strip() if len(lines) > 1 else str(e)
        raise ValueError(
            f"{path} is not of torch-fidelity's InceptionV3 ({reason[:120]}): "
            "take the published file"
        ) from None


def _state_dict(content: bytes, path: Path) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about what is refused anyway
            weights = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception:  # foreign bytes: whatever the unpickler stumbles over
        raise ValueError(
            f"{path} does not load as plain tensors (damaged, or it contains code): "
            "take the published file"
        ) from None
    if isinstance(weights, dict) and all(isinstance(value, Tensor) for value in weights.values()):
        return dict(weights)
    raise ValueError(f"{path} is not a state dict, names to tensors: take the published file")
