"""Published records: the small JSON of every cell behind a table, in results/records/<table>/, with the training curve of an arm's
lowest seed (`eval/curves.py`). Imports no torch."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

# Extractors by name, and the file of their weights beside the script that trained them.
EXTRACTORS = {
    "digits-gelu-64": "digits_extractor.safetensors",
    "digits-simclr-64": "digits_simclr.safetensors",
}
# Extractors whose weights are the user's, by name, and the published file, which both packages can read.
INCEPTION = "weights-inception-2015-12-05-6726825d.pth"
IMAGE_SCALE = {"inception-torch-fidelity": INCEPTION, "inception-clean-fid": INCEPTION}


def known_extractor(name: str) -> None:
    """ValueError with the nearest name where there is no such extractor."""
    names = [*EXTRACTORS, *IMAGE_SCALE]
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown extractor {name!r}; did you mean {near!r}?")


def weight_file(name: str) -> Path:
    """The file of an extractor's weights: beside this module, or, at image scale, where the user keeps it.

    That is the folder named by DISTILLBENCH_WEIGHTS and no other if it is set, else `weights/` in the working folder, else
    torch.hub's cache of checkpoints. Nothing is fetched: ValueError says which file to put where.
    """
    known_extractor(name)
    if name in EXTRACTORS:
        return Path(__file__).with_name(EXTRACTORS[name])
    file, chosen = IMAGE_SCALE[name], os.environ.get("DISTILLBENCH_WEIGHTS")
    cache = Path(
        os.environ.get("XDG_CACHE_HOME", "~/.cache")
    )  # torch.hub.get_dir(), without importing torch
    hub = Path(os.environ.get("TORCH_HOME", cache / "torch"), "hub", "checkpoints")
    folders = [Path(chosen)] if chosen else [Path("weights"), hub]
    for folder in folders:
        if (path := folder.expanduser() / file).is_file():
            return path
    raise ValueError(
        f"extractor {name!r} needs the file {file}, attached to the releases of torch-fidelity on GitHub (its SHA-256 begins "
        f"with {Path(file).stem.rpartition('-')[2]}); put it into {folders[0].absolute()} (looked in "
        f"{', '.join(map(str, folders))}; the variable DISTILLBENCH_WEIGHTS names another folder)"
    )
