"""Extractors by name, loaded with their weights."""

import hashlib

import safetensors.torch

from eval.features.digits import WEIGHTS, network_of
from eval.features.extractor import Extractor
from eval.features.weights import IMAGE_SCALE, known_extractor


def load_extractor(name: str) -> Extractor:
    """The extractor called `name`; raises ValueError with the nearest name where there is none."""
    known_extractor(name)
    if name in IMAGE_SCALE:
        from eval.features import inception  # with two packages that are slow to import

        return inception.load(name)
    content = WEIGHTS[name].read_bytes()  # hashed and loaded from the same bytes
    digest = hashlib.sha256(content).hexdigest()
    return Extractor(name, digest, network_of(name, safetensors.torch.load(content)))
