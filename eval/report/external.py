"""Samples made elsewhere: scored as every student's are, and published as rows of the tables.
Reading records needs no torch.

A record is results/external/<benchmark>/<name>.json, tracked, and the same samples give the same
bytes: no dates, no paths.

    format          1
    name            of the row and of the file: letters, digits and . _ + -
    benchmark       what the samples are scored against
    who, where      who made them, and where they come from (URL or paper): free text of one line,
                    or null where not published
    samples_sha256  of the decoded samples, `samples.content_sha256`: the same for a folder, .npz
                    and .safetensors
    labels_sha256   the same of the int64 labels; null without them, and scores that need a label
                    are null too
    count           number of samples; a table marks the row where its own have another number
    evaluation      `metrics.evaluate.about`: key (of code and extractors, `metrics.key`), both
                    extractors with their hashes, reference_sha256 (of the held-out images' bytes),
                    ...; of a mixture: key, and data (its fingerprint)
    row             the scores by name, as in a row of metrics.json; null where what a score needs
                    is not known

Budget, training data and teacher are unknown: no `fid_teacher`, no `gap_closed`, and
`memorisation` is about this benchmark's training half only.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from eval.metrics.evaluate import ImageData
    from eval.samples import Samples

KEYS = (
    "format",
    "name",
    "benchmark",
    "who",
    "where",
    "samples_sha256",
    "labels_sha256",
    "count",
    "evaluation",
    "row",
)
PAIRS = 200  # of neighbours looked at for an order by class


def external_metrics(
    samples: Samples, data: ImageData, extractor: str, cross_extractor: str | None
) -> dict[str, Any]:
    """`evaluation` and `row` of a record for images in an order that passed `check_order`."""
    from eval.metrics.evaluate import Against, about, evaluate_images

    against = Against.of(data, extractor, cross_extractor)
    row = evaluate_images(samples.images, samples.labels, against)
    return {"evaluation": about(data, against, len(samples.images)), "row": row}


def external_mixture_metrics(
    samples: Samples,
    exact: Tensor,
    exact_again: Tensor,
    means: Tensor,
    sigma: float,
    weights: Tensor,
    fingerprint: str,
) -> dict[str, Any]:
    """`evaluation` and `row` of a record for samples of the mixture of this fingerprint.

    They are scored against two exact draws of the same size.
    """
    from eval.metrics.key import evaluation_key
    from eval.metrics.mixtures import evaluate_mixture

    row = evaluate_mixture(
        samples.images.flatten(1),
        exact.flatten(1),
        exact_again.flatten(1),
        means.flatten(1),
        sigma,
        weights,
    )
    about = {"key": evaluation_key(None), "data": fingerprint}
    return {"evaluation": about, "row": row}


def check_order(samples: Samples, extractor: str) -> None:
    """Refuse samples sorted by class with a ValueError.

    Scores on pieces (precision to coverage) would each see a few classes only. Neighbours share
    their class (the label; without labels the predicted class) in a share p of pairs: 0 in turn,
    about the chance c = sum of squared frequencies in random order, nearly 1 if sorted. Refused
    above (1 + c) / 2, so that one class alone, with c = 1, passes and is scored as the failure that
    it is. Without labels and a classifier nothing is known.
    """
    import torch

    from eval.features.extractors import load_extractor

    last = len(samples.images) - 1
    at = torch.arange(0, last, max(1, last // PAIRS))
    index = torch.stack([at, at + 1], 1).flatten()
    if samples.labels is not None:
        classes = samples.labels[index]
    else:
        logits = load_extractor(extractor).features(samples.images[index])[1]
        if logits is None:
            return
        classes = logits.argmax(1)
    share = (classes[0::2] == classes[1::2]).double().mean()
    frequencies = classes.bincount().double() / len(classes)
    chance = frequencies.square().sum()
    if share > (1 + chance) / 2:
        raise ValueError(
            f"{samples.path}: sorted by class, so that scores on pieces of it would see a few "
            "classes each: shuffle them (with their labels), or deal the classes in turn"
        )


def make_record(
    name: str,
    benchmark: str,
    who: str | None,
    where: str | None,
    samples: Samples,
    found: dict[str, Any],
) -> dict[str, Any]:
    """The record described above; `found` is what `external_metrics` returned."""
    return {
        "format": 1,
        "name": name,
        "benchmark": benchmark,
        "who": who,
        "where": where,
        "samples_sha256": samples.sha256,
        "labels_sha256": _labels_sha256(samples),
        "count": len(samples.images),
        **found,
    }


def _labels_sha256(samples: Samples) -> str | None:
    from eval.samples import content_sha256

    return None if samples.labels is None else content_sha256(samples.labels)


def check_count(count: int, reference: int) -> None:
    """Refuse fewer samples than held-out images with a ValueError.

    Precision to coverage compare equal numbers.
    """
    if count < reference:
        raise ValueError(
            f"--count {count}: fewer than the {reference} held-out images, "
            "and scores need equal numbers: draw more"
        )


def check_words(name: str, who: str | None, where: str | None) -> None:
    """Refuse a name that is no plain file name, or text of more than a line, with a ValueError."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}", name):
        raise ValueError(
            f"--name: '{name}' names a file and a row: letters, digits and . _ + -, "
            "at most 64, a letter or digit first"
        )
    for option, text in (("--who", who), ("--where", where)):
        if text is not None and not (text.strip() and text.isprintable()):
            raise ValueError(f"{option}: one line of text expected, got {text!r:.60}")


def check_replaces(path: Path, who: str | None, where: str | None, samples: Samples) -> None:
    """Refuse with a ValueError where the record at `path` is of other samples or words.

    The same may be evaluated again at any time.
    """
    if not path.is_file():
        return
    old = _read(path)
    new = {
        "samples_sha256": samples.sha256,
        "labels_sha256": _labels_sha256(samples),
        "who": who,
        "where": where,
    }
    for key, value in new.items():
        if old[key] != value:
            raise ValueError(
                f"{path}: published with another {key} ({old[key]}): "
                "choose another --name, or say --overwrite"
            )


def read_external(folder: Path, benchmarks: list[str]) -> list[dict[str, Any]]:
    """The records under results/external by benchmark and name.

    ValueError names a file that is none.
    """
    out = []
    for benchmark in sorted(benchmarks):
        out += [_read(path) for path in sorted((folder / benchmark).glob("*.json"))]
    return out


def _read(path: Path) -> dict[str, Any]:
    fits = False
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if _is_record(found):
            place = (found["benchmark"], f"{found['name']}.json")
            fits = place == (path.parent.name, path.name)
    except (OSError, ValueError, RecursionError):
        fits = False
    if not fits:
        raise ValueError(
            f"{path}: no record of external samples: "
            "remove it, or publish it again with `distillbench evaluate`"
        )
    return found


def _is_record(found: Any) -> bool:
    """Whether a table can show it: keys and types as at the top of this file."""
    if not isinstance(found, dict) or tuple(found) != KEYS:
        return False
    about = found["evaluation"]
    row = found["row"]
    if not isinstance(about, dict) or not isinstance(row, dict):
        return False
    words = [found["name"], found["benchmark"], found["samples_sha256"], about.get("key")]
    words.append(about.get("reference_sha256", about.get("data")))
    for key in ("who", "where", "labels_sha256"):
        if found[key] is not None:
            words.append(found[key])
    return (
        found["format"] == 1
        and type(found["count"]) is int
        and all(map(_is_line, words))
        and all(value is None or type(value) in (int, float) for value in row.values())
    )


def _is_line(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable()
