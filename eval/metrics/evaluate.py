"""One cell's samples -> its metrics.json. Sees samples and data, never a network of a method.

Everything that decides a number is here or in a module that `eval.metrics.key.followed` finds, so
that `evaluation_key` sees an edit: what the command line passes are tensors by name.
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

from eval.features.extractor import Extractor
from eval.features.extractors import load_extractor
from eval.metrics.conditional import class_accuracy, diversity, label_tv, noise_distance
from eval.metrics.fixed_rows import GENERATORS, Generator
from eval.metrics.frechet import frechet_distance
from eval.metrics.inception_score import inception_score
from eval.metrics.key import evaluation_key
from eval.metrics.memorisation import memorisation
from eval.metrics.mixtures import evaluate_mixture
from eval.metrics.reference import reference_set
from eval.metrics.rounding import rounded
from eval.metrics.scores import feature_scores
from eval.metrics.statistics import Reference

# How many samples are kept for the picture, by their number of dimensions.
GALLERY_OF_IMAGES = 20  # [N,C,H,W]
GALLERY_OF_POINTS = 800  # [N,D]

SamplesByNfe = dict[int, Tensor]  # NFE -> samples in the order of the shared noise
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
    """A benchmark's images, uint8 [*,C,H,W], with labels int64 [*].

    `train` is what was learnt from, `reference` was held out.
    """

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
    """What image samples are scored against: computed once, used by every row.

    A part that is None leaves its scores None.
    """

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
        """The data of a benchmark under its extractors.

        teacher_samples uint8 [N,C,H,W] or None; `cache`: folder in which reference features are
        kept, see `eval.metrics.reference`. Raises ValueError for unknown extractors.
        """

        def held_out(by: Extractor) -> Reference:
            if cache is None:
                return Reference.of(data.reference, by)
            return reference_set(data.reference, by, cache)

        main = load_extractor(extractor)
        cross = None if cross_extractor is None else load_extractor(cross_extractor)
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

    images_u8 uint8 [N,C,H,W], classes in turn, since scores on pieces read consecutive rows; labels
    int64 [N], the classes they were asked for, or None; same_noise uint8 [N,C,H,W], the teacher's
    samples of the same noise, row by row, or None.

    A score is None where what it needs is: another set, labels, or a classifier of these classes
    among the extractor's outputs. Floats have 8 significant digits. Raises ValueError for
    references made by another extractor, and what the scores raise.
    """
    extractor = against.extractor
    cross = against.cross_extractor
    _check_made_by(against.held_out, extractor)
    _check_made_by(against.teacher, extractor)
    _check_made_by(against.cross_held_out, cross)
    scores: Scores = dict.fromkeys(SCORES)
    features, logits = extractor.features(images_u8)
    scores |= feature_scores(features, against.held_out)
    if cross is not None and against.cross_held_out is not None:
        cross_features, _ = cross.features(images_u8)
        scores["fid_cross"] = frechet_distance(cross_features, against.cross_held_out)
    if against.teacher is not None:
        scores["fid_teacher"] = frechet_distance(features, against.teacher)
    if logits is not None:
        scores["is"] = inception_score(logits)
    if against.train is not None:
        scores["memorisation"] = memorisation(images_u8, against.train)
    if labels is not None:
        if logits is not None and logits.shape[1] == against.classes:
            scores["class_accuracy"] = class_accuracy(logits, labels)
            scores["label_tv"] = label_tv(logits, labels)
        if against.labels is not None:
            real = against.held_out.features
            scores["diversity"] = diversity(features, labels, real, against.labels)
        if same_noise is not None:
            scores["noise_distance"] = noise_distance(images_u8, same_noise, labels)
    for name, score in scores.items():
        if score is not None:
            scores[name] = rounded(score)
    return scores


def _check_made_by(reference: Reference | None, extractor: Extractor | None) -> None:
    """ValueError where reference features are of another extractor than this one."""
    if reference is None:
        return
    if extractor is None:
        raise ValueError("reference features are not by any extractor in use: name theirs")
    if reference.extractor_sha256 != extractor.sha256:
        maker = f"{extractor.name} {extractor.sha256[:12]}"
        raise ValueError(f"reference features are not by {maker}")


def image_metrics(
    data: ImageData,
    extractor: str,
    cross_extractor: str | None,
    samples: SamplesByNfe,
    teacher: SamplesByNfe,
    teacher_again: Tensor,
    seed: int,
    is_teacher: bool,
    cache: Path | None = None,
) -> dict[str, Any]:
    """The content of metrics.json for image samples, sample i asked for class i % classes.

    All samples are uint8 [N,C,H,W]. `teacher`: the teacher's samples of the same noise; at its most
    steps they are the partners of `noise_distance`, for students. `teacher_again`: as many from
    other noise, for `fid_teacher`. On the samples' own noise that distance would reward keeping the
    teacher's coupling of noise and image, which distribution matching does not aim at. The
    teacher's own row shows what a perfect student scores; its cell carries the fixed rows as well,
    drawn from `seed`. `cache`: folder of reference features, see `eval.metrics.reference`.
    """
    against = Against.of(data, extractor, cross_extractor, teacher_again, cache)
    same_noise = None if is_teacher else teacher[max(teacher)]
    rows = []
    for nfe, images in samples.items():
        labels = in_turn(len(images), data.classes)
        rows.append({"nfe": nfe, **evaluate_images(images, labels, against, same_noise)})
    count = len(teacher_again)
    content: dict[str, Any] = {"evaluation": about(data, against, count), "rows": rows}
    if is_teacher:
        content["fixed"] = fixed_rows(data, against, count, seed)
    content["gallery"] = gallery(samples)
    return content


def repeated_draws(
    data: ImageData,
    extractor: str,
    cross_extractor: str | None,
    draws: list[Tensor],
    teacher_again: Tensor,
) -> dict[str, Any]:
    """SCORES of several sets of samples of one checkpoint, uint8 [N,C,H,W] each.

    Other arguments as of `image_metrics`.
    """
    against = Against.of(data, extractor, cross_extractor, teacher_again)
    rows = []
    for images in draws:
        labels = in_turn(len(images), data.classes)
        rows.append(evaluate_images(images, labels, against))
    return {"evaluation": about(data, against, len(draws[0])), "rows": rows}


def about(data: ImageData, against: Against, count: int) -> dict[str, Any]:
    """What `count` samples were scored with and against, and the hashes to find it again."""
    main = against.extractor
    cross = against.cross_extractor
    cross_name = None if cross is None else cross.name
    return {
        "key": evaluation_key(main.name, cross_name),
        "samples": count,
        "torch_fidelity": version("torch-fidelity"),
        "extractor": main.name,
        "extractor_sha256": main.sha256,
        "published_weights": main.published and (cross is None or cross.published),
        "cross_extractor": cross_name,
        "cross_extractor_sha256": None if cross is None else cross.sha256,
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
    """One row {"name": ..., **SCORES} for the floor and for each trivial generator.

    Each generator makes `count` images. Those of GENERATORS stand in every table of the benchmark.
    The same seed gives the same rows.
    """
    without_teacher = replace(against, teacher=None)
    labels = in_turn(count, data.classes)
    rows = [floor(data, without_teacher)]
    for index, generate in enumerate(generators):
        rng = np.random.default_rng([seed, index])
        images = generate(data.train, data.train_labels, count, rng)
        scores = evaluate_images(images, labels, without_teacher)
        rows.append({"name": generate.__name__, **scores})
    return rows


def floor(data: ImageData, against: Against) -> dict[str, Any]:
    """Row of the training half as it is: what real images score.

    It copies itself, trivially; what a reader needs under `memorisation` is what real images not
    trained on score.
    """
    scores = evaluate_images(data.train, data.train_labels, against)
    scores["memorisation"] = rounded(memorisation(data.reference, data.train))
    return {"name": "floor", **scores}


def mixture_metrics(
    samples: SamplesByNfe,
    exact: Tensor,
    exact_again: Tensor,
    means: Tensor,
    sigma: float,
    weights: Tensor,
) -> dict[str, Any]:
    """The content of metrics.json for samples [N,*shape] of a mixture.

    exact, exact_again [N,*shape]: two independent exact draws of the same size; means [K,*shape],
    weights [K], see `evaluate_mixture`.
    """
    drawn = exact.flatten(1)
    drawn_again = exact_again.flatten(1)
    centres = means.flatten(1)
    rows = []
    for nfe, points in samples.items():
        scores = evaluate_mixture(points.flatten(1), drawn, drawn_again, centres, sigma, weights)
        rows.append({"nfe": nfe, **scores})
    evaluation = {
        "key": evaluation_key(None),
        "samples": len(exact),
        "torch_fidelity": version("torch-fidelity"),
    }
    return {"evaluation": evaluation, "rows": rows, "gallery": gallery(samples)}


def gallery(samples: SamplesByNfe) -> dict[str, Any]:
    """The first samples, for the picture, by "nfe<NFE>": shape, dtype and base64 of their bytes.

    Images [N,C,H,W] as uint8 pixels, others as little-endian float16 coordinates.
    """
    pictures: dict[str, Any] = {}
    for nfe, x in samples.items():
        count = GALLERY_OF_POINTS if x.dim() == 2 else GALLERY_OF_IMAGES
        few = x[:count]
        if few.dtype != torch.uint8:
            few = few.half()
        array = few.numpy()
        pictures[f"nfe{nfe}"] = {
            "shape": list(array.shape),
            "dtype": str(array.dtype),
            "base64": base64.b64encode(array.tobytes()).decode(),
        }
    return pictures
