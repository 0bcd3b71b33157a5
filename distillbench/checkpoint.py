"""Checkpoints and weights as safetensors, written atomically and loaded without executing code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from distillbench.cell import write_atomically
from distillbench.errors import UserError


def write_tensors(path: Path, tensors: dict[str, Tensor], **metadata: Any) -> None:
    """A flat dictionary of tensors with a few words of metadata."""
    flat = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    write_atomically(path, save(flat, metadata={k: str(v) for k, v in metadata.items()}))


def read_tensors(path: Path, device: torch.device | str = "cpu") -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata; UserError when the file is truncated or of another format."""
    if not path.is_file():
        raise UserError(f"{path}: missing, though its cell has a record: delete {path.parent} and rerun the same command")
    try:
        with safe_open(path, framework="pt", device=str(device)) as f:
            return {k: f.get_tensor(k) for k in f.keys()}, f.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as e:
        raise UserError(f"{path}: not a readable safetensors file ({e}): delete it and rerun the same command") from None


def save_progress(path: Path, key: str, step: int, players: dict, method_state: dict[str, Tensor]) -> None:
    """Everything that a resumed run needs: the players, the method's own state, the next step."""
    state = {f"method.{k}": v for k, v in method_state.items()}
    for name, player in players.items():
        state |= {f"players.{name}.{k}": v for k, v in player.state_dict().items()}
    write_tensors(path, state, key=key, step=step)


def load_progress(path: Path, key: str, players: dict, method: Any, device: torch.device) -> int:
    """Inverse of `save_progress`; returns the next step. UserError on a checkpoint of another cell."""
    state, metadata = read_tensors(path, device)

    def under(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}

    if metadata.get("key") != key:
        raise UserError(f"{path}: checkpoint of another cell ({metadata.get('key')}, expected {key}): delete it and rerun")
    try:
        for name, player in players.items():
            player.load_state_dict(under(f"players.{name}."))
        method.load_state_dict(under("method."))
    except (KeyError, RuntimeError) as e:
        raise UserError(f"{path}: does not fit this cell ({str(e).splitlines()[0]}): delete it and rerun") from None
    return int(metadata["step"])
