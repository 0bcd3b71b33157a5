"""One cell's samples -> the rows of its metrics.json. Sees samples and reference data, never a network of a method."""

from __future__ import annotations

import base64
from typing import Any

import torch
from torch import Tensor

from eval.extractors import load_extractor
from eval.fixed_rows import fixed_rows
from eval.metrics import Reference, evaluate_images
from eval.mixtures import evaluate_mixture

GALLERY = {4: 20, 2: 800}  # how many samples are kept for the picture: images [N, C, H, W], points [N, D]

Samples = dict[int, Tensor]  # NFE -> samples in the order of the shared noise


def image_metrics(samples: Samples, extractor_name: str, reference: Tensor, train: Tensor, teacher_samples: Tensor) -> dict[str, Any]:
    """Rows of image samples, all uint8 [N, C, H, W]; `teacher_samples`: the teacher's at many steps, from independent noise.

    On the samples' own noise the distance would reward keeping the teacher's coupling of noise and image, which
    distribution matching does not aim at. The teacher's own row shows what a perfect student scores.
    """
    extractor = load_extractor(extractor_name)
    held_out = Reference.of(reference, extractor)
    teacher, _ = extractor.features(teacher_samples)
    rows = [{"nfe": nfe, **evaluate_images(images, extractor, held_out, teacher, train)} for nfe, images in samples.items()]
    return {"rows": rows, "gallery": gallery(samples)}


def image_fixed_rows(
    extractor_name: str, train: Tensor, train_labels: Tensor, reference: Tensor, count: int, seed: int
) -> list[dict[str, Any]]:
    """The rows that every table of the benchmark carries: noise floor and trivial generators."""
    return fixed_rows(train, train_labels, reference, load_extractor(extractor_name), count, seed)


def mixture_metrics(samples: Samples, exact: Tensor, exact_again: Tensor, means: Tensor, sigma: float, weights: Tensor) -> dict[str, Any]:
    """Rows of samples [N, *shape] of a mixture against two independent exact draws of the same size."""
    rows = []
    for nfe, x in samples.items():
        flat, one, two, centres = (a.flatten(1) for a in (x, exact, exact_again, means))
        rows.append({"nfe": nfe, **evaluate_mixture(flat, one, two, centres, sigma, weights)})
    return {"rows": rows, "gallery": gallery(samples)}


def gallery(samples: Samples) -> dict[str, Any]:
    """The first samples, for the picture: shape and base64 of uint8 pixels or little-endian float16 coordinates."""
    out: dict[str, Any] = {}
    for nfe, x in samples.items():
        few = x[: GALLERY.get(x.dim(), 20)]
        few = few if few.dtype == torch.uint8 else few.half()
        out[f"nfe{nfe}"] = {
            "shape": list(few.shape),
            "dtype": str(few.numpy().dtype),
            "base64": base64.b64encode(few.numpy().tobytes()).decode(),
        }
    return out
