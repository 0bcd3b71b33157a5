"""Reference features kept on disk under a hash of everything they depend on.

At image scale they cost half an hour or more. A name never decides what is read back: images under
an old name, other weights or edited code give another key, and the file says inside what it was
made of.
"""

import hashlib
import json
import os
import warnings
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from eval.features.extractors import Extractor
from eval.metrics.key import evaluation_key
from eval.metrics.statistics import Reference
from eval.samples import content_sha256, read_npz


def reference_set(images: Tensor | Path, extractor: Extractor, cache_folder: Path) -> Reference:
    """Reference of images uint8 [N,C,H,W], or of those in an `.npz` file.

    Read from `cache_folder`, or computed and put there. An `.npz` has the layout of ADM's reference
    batches (Dhariwal & Nichol 2021): `arr_0` uint8 [N,H,W,C] is used; `mu`, `sigma`, `mu_s`,
    `sigma_s` are not even read, since they are statistics of features of ADM's own TensorFlow
    graph, and statistics of two feature extractors do not compare.

    Raises ValueError, one line, for other files, other images than the extractor takes, or a folder
    that cannot be written. Warns, and computes, where the file kept is damaged or was made of
    something else than its name says.
    """
    try:
        cache_folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ValueError(
            f"{cache_folder}: no folder for reference features ({e.strerror}): "
            "name one that can be written"
        ) from None
    if isinstance(images, Path):
        pixels, _ = read_npz(images)
    else:
        pixels = images
    made_of = {
        "images_sha256": content_sha256(pixels),
        "extractor": extractor.name,
        "extractor_sha256": extractor.sha256,
        "evaluation": evaluation_key(extractor.name),
    }
    key = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]
    path = cache_folder / f"{extractor.name}-{key}.safetensors"
    if path.exists():
        try:
            return read(path, made_of)
        except (OSError, ValueError, SafetensorError) as e:
            warnings.warn(f"{path} is not used, its features are computed again: {e}", stacklevel=2)
    reference = Reference.of(pixels, extractor)
    try:
        write(path, reference, made_of)
    except (OSError, SafetensorError) as e:  # a full disk must not cost the features
        warnings.warn(f"{path} was not written, the next run computes it again: {e}", stacklevel=2)
    return reference


def read(path: Path, made_of: dict[str, str]) -> Reference:
    """Reference kept in `path`.

    Raises ValueError if it was made of anything else, or its features are not those written.
    """
    with safe_open(path, framework="pt") as f:
        stored = f.metadata() or {}
        written = stored.pop("features_sha256", None)
        if stored != made_of:
            raise ValueError("it was made of other images, by another extractor or by other code")
        features = f.get_tensor("features")
    if content_sha256(features) != written:
        raise ValueError("its features are not those that were written: a damaged file")
    return Reference(features, made_of["extractor_sha256"])


def write(path: Path, reference: Reference, made_of: dict[str, str]) -> None:
    """Write a reference atomically: a reader finds all of it or nothing."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        features = reference.features.contiguous()
        metadata = made_of | {"features_sha256": content_sha256(features)}
        save_file({"features": features}, partial, metadata=metadata)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
