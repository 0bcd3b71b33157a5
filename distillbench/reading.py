"""YAML files a user edits, read as pydantic models with one-line errors. Imports no torch."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from distillbench.errors import UserError, nearest

M = TypeVar("M", bound=BaseModel)
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the same, faster, where libyaml is there


class Strict(BaseModel):
    """Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def merged(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """`change` over `base`, dictionaries key by key, at any depth; neither is modified."""
    out = dict(base)
    for key, value in change.items():
        old = out.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            out[key] = merged(old, value)
        else:
            out[key] = value
    return out


def explain(
    error: ValidationError, model: type[BaseModel], where: str, text: str | None = None
) -> UserError:
    """The first problem of a validation as one line: file, key, remedy.

    With the line in the file where its `text` is given. The error is returned, not raised.
    """

    def is_known(problem: Any) -> bool:
        return problem["type"] != "extra_forbidden"

    first = min(error.errors(), key=is_known)  # a misspelt key is also a missing one
    path = list(first["loc"])
    if text is not None:
        where += f":{line_of(text, path)}"
    key = ".".join(str(p) for p in path)
    if first["type"] == "extra_forbidden":
        remedy = nearest(str(path[-1]), _keys_beside(model, path))
        return UserError(f"{where}: unknown key '{key}', {remedy}")
    if first["type"] == "missing":
        return UserError(f"{where}: key '{key}' is missing")
    return UserError(f"{where}: {key or 'file'}: {first['msg']} (got {first['input']!r:.60})")


def _keys_beside(model: type[BaseModel], path: list[Any]) -> list[str]:
    """The fields of the (nested) model in which the last element of `path` was looked up."""
    for part in path[:-1]:
        field = model.model_fields.get(part)
        annotation = None if field is None else field.annotation
        model = _model_in(annotation) or model
    return list(model.model_fields)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The first model among an annotation and its arguments."""
    for candidate in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def line_of(text: str, path: list[Any]) -> int:
    """The line, from 1, at which the value under `path`, keys and indices, begins in YAML.

    That of its nearest parent where it is missing.
    """
    node = _composed(text)
    if node is None:
        return 1
    line = node.start_mark.line + 1
    for part in path:
        if isinstance(node, yaml.SequenceNode) and isinstance(part, int):
            node = node.value[part]
            line = node.start_mark.line + 1
            continue
        entry = _entry(node, str(part))
        if entry is None:
            break
        key, node = entry
        line = key.start_mark.line + 1
    return line


def _entry(node: Any, name: str) -> tuple[Any, Any] | None:
    """The nodes of the key `name` and of its value in a mapping; None where there is none."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if key.value == name:
                return key, value
    return None


@lru_cache
def _composed(text: str) -> Any:
    return yaml.compose(text, LOADER)


def read(path: Path, model: type[M], lines: bool = False) -> M:
    """A YAML file as `model`; UserError names file, key and remedy, with `lines` the line too."""
    try:
        about = path.stat()
        return _read(path, model, lines, (about.st_mtime_ns, about.st_size, about.st_ino))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror}): make it a readable file") from None


@lru_cache(maxsize=512)
def _read(path: Path, model: type[M], lines: bool, _stamp: tuple[int, ...]) -> M:
    """Once for each state of a file: an audit asks for hundreds of arms; models are frozen."""
    text = ""
    try:
        text = path.read_text(encoding="utf-8")
        return model.model_validate(yaml.load(text, LOADER) or {})
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(e).split())}") from None
    except ValidationError as e:
        raise explain(e, model, str(path), text if lines else None) from None
