"""One cell's samples -> its metrics.json. Sees samples and data, never a network of a method.

Everything that decides a number is here or in a module beside it, so that `records.evaluation_key` sees an edit: what the
command line passes are tensors by name.
"""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from eval.features.extractors import Extractor, load_extractor
from eval.metrics.conditional import class_accuracy, diversity, label_tv, noise_distance
from eval.metrics.fixed_rows import GENERATORS, Generator
from eval.metrics.key import evaluation_key
from eval.metrics.mixtures import evaluate_mixture
from eval.metrics.reference import reference_set
from eval.metrics.scores import (
    Reference,
    feature_scores,
    frechet_distance,
    inception_score,
    memorisation,
)

GALLERY = {
    4: 20,
    2: 800,
}  # how many samples are kept for the picture: images [N, C, H, W], points [N, D]

Samples = dict[int, Tensor]  # NFE -> samples in the order of the shared noise
Scores = dict[str, float | None]
SCORES = (
    "fid",
    "fid_cross",
    "fid_teacher",
    "kid",
    "is",
    "precision",
    "recall",
    "density",
    "coverage",
    "c2st",
    "memorisation",
    "class_accuracy",
    "label_tv",
    "diversity",
    "noise_distance",
)


class ImageData(Protocol):
    """A benchmark's images, uint8 [*,C,H,W], with labels int64 [*]: `train` is what was learnt from, `reference` was held out."""

    @property
    def train(self) -> Tensor: ...
    @property
    def train_labels(self) -> Tensor: ...
    @property
    def reference(self) -> Tensor: ...
    @property
    def reference_labels(self) -> Tensor: ...
    @property
    def classes(self) -> int: ...


@dataclass(frozen=True)
class Against:
    """What image samples are scored against: computed once, used by every row. A part that is None leaves its scores None."""

    extractor: Extractor
    held_out: Reference
    labels: Tensor | None = None  # of the held-out images, int64 [M] in 0..classes-1
    classes: int = 0
    train: Tensor | None = None  # training images, uint8 [T,C,H,W]
    teacher: Reference | None = None  # the teacher's samples at many steps, from noise of their own
    cross_extractor: Extractor | None = None
    cross_held_out: Reference | None = None

    @classmethod
    def of(
        cls,
        data: ImageData,
        extractor: str,
        cross_extractor: str | None,
        teacher_samples: Tensor | None = None,
        cache: Path | None = None,
    ) -> Against:
        """Of a benchmark's data, under its extractors; `teacher_samples` uint8 [N,C,H,W]; `cache`: where reference features are kept."""
        main, cross = (
            load_extractor(extractor),
            None if cross_extractor is None else load_extractor(cross_extractor),
        )
        held_out = lambda by: (
            Reference.of(data.reference, by)
            if cache is None
            else reference_set(data.reference, by, cache)
        )
        return cls(
            extractor=main,
            held_out=held_out(main),
            labels=data.reference_labels,
            classes=data.classes,
            train=data.train,
            teacher=None if teacher_samples is None else Reference.of(teacher_samples, main),
            cross_extractor=cross,
            cross_held_out=None if cross is None else held_out(cross),
        )


def evaluate_images(
    images_u8: Tensor, labels: Tensor | None, against: Against, same_noise: Tensor | None = None
) -> Scores:
    """SCORES of generated images, from one pass per extractor.

    images_u8 uint8 [N,C,H,W], classes in turn, since scores on pieces read consecutive rows; labels int64 [N], the classes
    they were asked for, or None; same_noise uint8 [N,C,H,W], the teacher's samples of the same noise, row by row, or None.
    A score is None where what it needs is: another set, labels, or a classifier of these classes among the extractor's outputs.
    Floats have 8 significant digits: more is the noise of BLAS. Raises ValueError for references made by another extractor,
    and what the scores raise.
    """
    extractor, cross = against.extractor, against.cross_extractor
    pairs = (
        (against.held_out, extractor),
        (against.teacher, extractor),
        (against.cross_held_out, cross),
    )
    for reference, maker in ((r, m) for r, m in pairs if r is not None):
        if maker is None or reference.extractor_sha256 != maker.sha256:
            raise ValueError(
                f"reference features are not by {maker and f'{maker.name} {maker.sha256[:12]}'}"
            )
    found: Scores = dict.fromkeys(SCORES)
    features, logits = extractor.features(images_u8)
    found |= feature_scores(features, against.held_out)
    if cross is not None and against.cross_held_out is not None:
        found["fid_cross"] = frechet_distance(cross.features(images_u8)[0], against.cross_held_out)
    if against.teacher is not None:
        found["fid_teacher"] = frechet_distance(features, against.teacher)
    if logits is not None:
        found["is"] = inception_score(logits)
    if against.train is not None:
        found["memorisation"] = memorisation(images_u8, against.train)
    if labels is not None:
        if logits is not None and logits.shape[1] == against.classes:
            found["class_accuracy"], found["label_tv"] = (
                class_accuracy(logits, labels),
                label_tv(logits, labels),
            )
        if against.labels is not None:
            found["diversity"] = diversity(
                features, labels, against.held_out.features, against.labels
            )
        if same_noise is not None:
            found["noise_distance"] = noise_distance(images_u8, same_noise, labels)
    return {name: None if value is None else float(f"{value:.8g}") for name, value in found.items()}


def image_metrics(
    data: ImageData,
    extractor: str,
    cross_extractor: str | None,
    samples: Samples,
    teacher: Samples,
    teacher_again: Tensor,
    seed: int,
    is_teacher: bool,
    cache: Path | None = None,
) -> dict[str, Any]:
    """The content of metrics.json for image samples, all uint8 [N,C,H,W], sample i asked for class i % classes.

    `teacher`: the teacher's samples of the same noise; at its most steps they are the partners of `noise_distance`, for students.
    `teacher_again`: as many from other noise, for `fid_teacher`. On the samples' own noise that distance would reward keeping
    the teacher's coupling of noise and image, which distribution matching does not aim at. The teacher's own row shows what a
    perfect student scores; its cell carries the fixed rows as well. `cache`: folder of reference features (eval/reference.py).
    """
    against = Against.of(data, extractor, cross_extractor, teacher_again, cache)
    same_noise = None if is_teacher else teacher[max(teacher)]
    rows = [
        {"nfe": nfe, **evaluate_images(x, in_turn(len(x), data.classes), against, same_noise)}
        for nfe, x in samples.items()
    ]
    count = len(teacher_again)
    fixed = {"fixed": fixed_rows(data, against, count, seed)} if is_teacher else {}
    return {
        "evaluation": about(data, against, count),
        "rows": rows,
        **fixed,
        "gallery": gallery(samples),
    }


def repeated_draws(
    data: ImageData,
    extractor: str,
    cross_extractor: str | None,
    draws: list[Tensor],
    teacher_again: Tensor,
) -> dict[str, Any]:
    """SCORES of several sets of samples of one checkpoint, uint8 [N,C,H,W] each; other arguments as of `image_metrics`."""
    against = Against.of(data, extractor, cross_extractor, teacher_again)
    rows = [evaluate_images(x, in_turn(len(x), data.classes), against) for x in draws]
    return {"evaluation": about(data, against, len(draws[0])), "rows": rows}


def about(data: ImageData, against: Against, count: int) -> dict[str, Any]:
    """What `count` samples were scored with and against, and the hashes to find it again."""
    main, cross = against.extractor, against.cross_extractor
    return {
        "key": evaluation_key(main.name, cross and cross.name),
        "samples": count,
        "torch_fidelity": version("torch-fidelity"),
        "extractor": main.name,
        "extractor_sha256": main.sha256,
        "published_weights": main.published and (cross is None or cross.published),
        "cross_extractor": cross and cross.name,
        "cross_extractor_sha256": cross and cross.sha256,
        "reference": len(data.reference),
        "reference_sha256": hashlib.sha256(data.reference.numpy().tobytes()).hexdigest(),
    }


def in_turn(count: int, classes: int) -> Tensor:
    """int64 [count]: the class each of `count` samples is asked for."""
    return torch.arange(count) % classes


def fixed_rows(
    data: ImageData,
    against: Against,
    count: int,
    seed: int,
    generators: tuple[Generator, ...] = GENERATORS,
) -> list[dict[str, Any]]:
    """One row {"name": ..., **SCORES} for the floor and for each trivial generator with `count` images.

    Those of GENERATORS stand in every table of the benchmark. The same seed gives the same rows.
    """
    against = replace(against, teacher=None)
    rows = [floor(data, against)]
    for index, generate in enumerate(generators):
        images = generate(
            data.train, data.train_labels, count, np.random.default_rng([seed, index])
        )
        rows.append(
            {
                "name": generate.__name__,
                **evaluate_images(images, in_turn(count, data.classes), against),
            }
        )
    return rows


def floor(data: ImageData, against: Against) -> dict[str, Any]:
    """The training half as it is: what real images score.

    It copies itself, trivially; what a reader needs under `memorisation` is what real images not trained on score.
    """
    row = {"name": "floor", **evaluate_images(data.train, data.train_labels, against)}
    return row | {"memorisation": float(f"{memorisation(data.reference, data.train):.8g}")}


def mixture_metrics(
    samples: Samples,
    exact: Tensor,
    exact_again: Tensor,
    means: Tensor,
    sigma: float,
    weights: Tensor,
) -> dict[str, Any]:
    """The content of metrics.json for samples [N, *shape] of a mixture, against two independent exact draws of the same size."""
    rows = []
    for nfe, x in samples.items():
        flat, one, two, centres = (a.flatten(1) for a in (x, exact, exact_again, means))
        rows.append({"nfe": nfe, **evaluate_mixture(flat, one, two, centres, sigma, weights)})
    about = {
        "key": evaluation_key(None),
        "samples": len(exact),
        "torch_fidelity": version("torch-fidelity"),
    }
    return {"evaluation": about, "rows": rows, "gallery": gallery(samples)}


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
