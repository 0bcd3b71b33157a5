"""Checkpoints and weights as safetensors, written atomically and loaded without executing code.

A cell in training keeps its last two checkpoints, `checkpoint.safetensors` and
`checkpoint.previous.safetensors`: where one is damaged the other continues. A finished cell keeps
neither. A checkpoint holds the tensors `players.<name>.<entry>` and `method.<entry>`, and as
metadata, all strings: `key` of its cell, the next `step`, `seconds` so far, `checksum`.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from distillbench.cells.disk import LAST, PREVIOUS, write_atomically, writing
from distillbench.errors import UserError
from distillbench.method import Method
from distillbench.players import Player

CHECKPOINTS = 20  # of a run, in equal numbers of steps
CHECKPOINT_SECONDS = 600.0  # after which one more is saved: a machine may be taken away any time


class Damaged(UserError):
    """A file whose content is not what was written."""


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], previous: Path | None = None, **metadata: Any
) -> None:
    """Write tensors, from any device and of any strides, with a few words of metadata.

    A file that was there is kept as `previous`, if that is given. Raises UserError where the disk
    is full or read-only.
    """
    flat = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    words = {name: str(value) for name, value in metadata.items()}
    write_atomically(path, save(flat, metadata=words), previous)


def read_tensors(
    path: Path, device: torch.device | str = "cpu"
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors on `device` and metadata of a file.

    Raises Damaged, a UserError, where it is truncated or of another format, UserError where it is
    missing or cannot be read.
    """
    if not path.is_file():
        raise UserError(
            f"{path}: missing, though its cell has a record: "
            f"delete {path.parent} and rerun the same command"
        )
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except SafetensorError as e:
        raise Damaged(
            f"{path}: not a readable safetensors file ({e}): delete it and rerun the same command"
        ) from None
    except OSError as e:
        raise UserError(
            f"{path}: cannot be read ({e}): make it readable and rerun the same command"
        ) from None


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """CRC-32 of the bytes of all tensors in order of their names, as 8 hexadecimal digits.

    safetensors itself notices only that a file was cut.
    """
    crc = 0
    for name in sorted(tensors):
        flat = tensors[name].detach().cpu().contiguous().reshape(-1)
        crc = zlib.crc32(flat.view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"


def save_progress(
    folder: Path,
    key: str,
    step: int,
    seconds: float,
    players: Mapping[str, Player],
    method_state: Mapping[str, Tensor],
) -> None:
    """Write all that a resumed run needs, and keep the checkpoint before it.

    That is the players, the method's own state, the next step and the seconds so far. Raises
    TypeError on a method's state that is no tensor, UserError as `write_tensors`.
    """
    for name, value in method_state.items():
        if not isinstance(value, Tensor):
            raise TypeError(
                f"state_dict()['{name}'] is of type {type(value).__name__}: "
                "keep tensors there, torch.tensor(value)"
            )
    state = {f"method.{name}": value for name, value in method_state.items()}
    for player_name, player in players.items():
        for name, value in player.state_dict().items():
            state[f"players.{player_name}.{name}"] = value
    write_tensors(
        folder / LAST,
        state,
        folder / PREVIOUS,
        key=key,
        step=step,
        seconds=f"{seconds:.1f}",
        checksum=checksum(state),
    )


def load_progress(
    folder: Path, key: str, players: Mapping[str, Player], method: Method, device: torch.device
) -> tuple[int, float]:
    """Inverse of `save_progress`: next step and seconds so far, (0, 0.0) without a checkpoint.

    A damaged checkpoint is removed with a warning and the one before it is taken. Raises UserError
    on a checkpoint of another cell.
    """
    for path in (folder / LAST, folder / PREVIOUS):
        if not path.is_file():
            continue
        try:
            state, metadata = _read_checkpoint(path, key, device)
        except Damaged:
            _remove_damaged(path)
            continue
        try:
            for name, player in players.items():
                player.load_state_dict(_under(f"players.{name}.", state))
            method.load_state_dict(_under("method.", state))
        except (KeyError, RuntimeError) as e:
            why = str(e).splitlines()[0]
            raise UserError(
                f"{path}: does not fit this cell ({why}): delete it and rerun"
            ) from None
        return int(metadata["step"]), float(metadata["seconds"])
    return 0, 0.0


def _read_checkpoint(
    path: Path, key: str, device: torch.device
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a checkpoint of the cell of this key; Damaged, UserError."""
    state, metadata = read_tensors(path, device)
    other = metadata.get("key")
    if other != key:
        raise UserError(
            f"{path}: checkpoint of another cell ({other}, expected {key}): delete it and rerun"
        )
    if metadata.get("checksum") != checksum(state):
        raise Damaged("checksum differs")
    return state, metadata


def _remove_damaged(path: Path) -> None:
    """Remove a checkpoint, and say from where training continues without it."""
    another = path.name == LAST and path.with_name(PREVIOUS).is_file()
    instead = "the checkpoint before" if another else "the start"
    print(
        f"distillbench: {path} is damaged: removed, training continues from {instead}",
        file=sys.stderr,
        flush=True,
    )
    with writing(path):
        path.unlink()


def _under(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Entries of a state whose names begin with `prefix`, without it."""
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
