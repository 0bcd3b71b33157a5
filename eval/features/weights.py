"""Weight files of the extractors, by name. Imports no torch."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

# Extractors by name, and the file of their weights beside the script that trained them.
EXTRACTORS = {
    "digits-gelu-64": "digits_extractor.safetensors",
    "digits-simclr-64": "digits_simclr.safetensors",
}
# Extractors whose weights are the user's, by name, and the published file, which both packages can
# read.
INCEPTION = "weights-inception-2015-12-05-6726825d.pth"
IMAGE_SCALE = {"inception-torch-fidelity": INCEPTION, "inception-clean-fid": INCEPTION}


def known_extractor(name: str) -> None:
    """ValueError with the nearest name where there is no such extractor."""
    names = [*EXTRACTORS, *IMAGE_SCALE]
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown extractor {name!r}; did you mean {near!r}?")


def weight_file(name: str) -> Path:
    """The file of an extractor's weights: beside this module, or where the user keeps it.

    The latter at image scale. That is the folder named by DISTILLBENCH_WEIGHTS and no other if it
    is set, else `weights/` in the working folder, else torch.hub's cache of checkpoints. Nothing is
    fetched: ValueError says which file to put where. Raises ValueError for an unknown name, too.
    """
    known_extractor(name)
    if name in EXTRACTORS:
        return Path(__file__).with_name(EXTRACTORS[name])
    file = IMAGE_SCALE[name]
    folders = _user_folders()
    for folder in folders:
        path = folder.expanduser() / file
        if path.is_file():
            return path
    hash_start = Path(file).stem.rpartition("-")[2]
    looked_in = ", ".join(map(str, folders))
    raise ValueError(
        f"extractor {name!r} needs the file {file}, attached to the releases of torch-fidelity on "
        f"GitHub (its SHA-256 begins with {hash_start}); put it into {folders[0].absolute()} "
        f"(looked in {looked_in}; the variable DISTILLBENCH_WEIGHTS names another folder)"
    )


def _user_folders() -> list[Path]:
    """Folders that may hold the user's weights, the first choice first."""
    chosen = os.environ.get("DISTILLBENCH_WEIGHTS")
    if chosen:
        return [Path(chosen)]
    # torch.hub.get_dir(), without importing torch.
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"))
    hub = Path(os.environ.get("TORCH_HOME", cache / "torch"))
    return [Path("weights"), hub / "hub" / "checkpoints"]
