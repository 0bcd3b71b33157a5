"""Checkpoints and weights as safetensors, written atomically and loaded without executing code.

A cell in training keeps its last two checkpoints, `checkpoint.safetensors` and `checkpoint.previous.safetensors`: where one
is damaged the other continues. A finished cell keeps neither.
"""

from __future__ import annotations

import sys
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from distillbench.cells.disk import LAST, PREVIOUS, write_atomically, writing
from distillbench.errors import UserError


class Damaged(UserError):
    """A file whose content is not what was written."""


def write_tensors(
    path: Path, tensors: dict[str, Tensor], previous: Path | None = None, **metadata: Any
) -> None:
    """A flat dictionary of tensors with a few words of metadata; a file that was there is kept as `previous`, if that is given."""
    flat = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    write_atomically(path, save(flat, metadata={k: str(v) for k, v in metadata.items()}), previous)


def read_tensors(
    path: Path, device: torch.device | str = "cpu"
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata; UserError when the file is truncated or of another format."""
    if not path.is_file():
        raise UserError(
            f"{path}: missing, though its cell has a record: delete {path.parent} and rerun the same command"
        )
    try:
        with safe_open(path, framework="pt", device=str(device)) as f:
            return {k: f.get_tensor(k) for k in f.keys()}, f.metadata() or {}  # noqa: SIM118
    except SafetensorError as e:
        raise Damaged(
            f"{path}: not a readable safetensors file ({e}): delete it and rerun the same command"
        ) from None
    except OSError as e:
        raise UserError(
            f"{path}: cannot be read ({e}): make it readable and rerun the same command"
        ) from None


def checksum(tensors: dict[str, Tensor]) -> str:
    """CRC-32 of the bytes of all tensors in order of their names: safetensors itself notices a cut file only."""
    crc = 0
    for name in sorted(tensors):
        crc = zlib.crc32(
            tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data,
            crc,
        )
    return f"{crc:08x}"


def save_progress(
    folder: Path,
    key: str,
    step: int,
    seconds: float,
    players: dict,
    method_state: dict[str, Tensor],
) -> None:
    """Everything that a resumed run needs: players, the method's own state, next step, seconds so far. Keeps the one before."""
    for name, value in method_state.items():
        if not isinstance(value, Tensor):
            raise TypeError(
                f"state_dict()['{name}'] is of type {type(value).__name__}: keep tensors there, torch.tensor(value)"
            )
    state = {f"method.{k}": v for k, v in method_state.items()}
    for name, player in players.items():
        state |= {f"players.{name}.{k}": v for k, v in player.state_dict().items()}
    words = {"key": key, "step": step, "seconds": f"{seconds:.1f}", "checksum": checksum(state)}
    write_tensors(folder / LAST, state, folder / PREVIOUS, **words)


def load_progress(
    folder: Path, key: str, players: dict, method: Any, device: torch.device
) -> tuple[int, float]:
    """Inverse of `save_progress`: next step and seconds so far, 0 without a checkpoint. A damaged one is removed with a warning
    and the one before is taken; UserError on a checkpoint of another cell."""
    for path in (folder / LAST, folder / PREVIOUS):
        if not path.is_file():
            continue
        try:
            state, metadata = read_tensors(path, device)
            if metadata.get("key") == key and metadata.get("checksum") != checksum(state):
                raise Damaged("checksum differs")
        except Damaged:
            instead = (
                "the checkpoint before"
                if (folder / PREVIOUS).is_file() and path.name == LAST
                else "the start"
            )
            print(
                f"distillbench: {path} is damaged: removed, training continues from {instead}",
                file=sys.stderr,
                flush=True,
            )
            with writing(path):
                path.unlink()
            continue
        if metadata.get("key") != key:
            raise UserError(
                f"{path}: checkpoint of another cell ({metadata.get('key')}, expected {key}): delete it and rerun"
            )

        def under(prefix: str, state: dict[str, Tensor] = state) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}

        try:
            for name, player in players.items():
                player.load_state_dict(under(f"players.{name}."))
            method.load_state_dict(under("method."))
        except (KeyError, RuntimeError) as e:
            raise UserError(
                f"{path}: does not fit this cell ({str(e).splitlines()[0]}): delete it and rerun"
            ) from None
        return int(metadata["step"]), float(metadata["seconds"])
    return 0, 0.0
