"""Models of the files a user edits (project, benchmark, table, method) and their one-line errors. Imports no torch."""

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
    """`change` over `base`, dictionaries key by key."""
    out = dict(base)
    for key, value in change.items():
        out[key] = (
            merged(out[key], value)
            if isinstance(value, dict) and isinstance(out.get(key), dict)
            else value
        )
    return out


def explain(
    error: ValidationError, model: type[BaseModel], where: str, text: str | None = None
) -> UserError:
    """The first problem of a validation as one line: file, key, remedy; with the line where the file's `text` is given."""
    first = min(
        error.errors(), key=lambda e: e["type"] != "extra_forbidden"
    )  # a misspelt key is also a missing one
    path = [p for p in first["loc"]]
    where += "" if text is None else f":{line_of(text, path)}"
    key = ".".join(str(p) for p in path)
    if first["type"] == "extra_forbidden":
        return UserError(
            f"{where}: unknown key '{key}', {nearest(str(path[-1]), _keys_beside(model, path))}"
        )
    if first["type"] == "missing":
        return UserError(f"{where}: key '{key}' is missing")
    return UserError(f"{where}: {key or 'file'}: {first['msg']} (got {first['input']!r:.60})")


def _keys_beside(model: type[BaseModel], path: list[Any]) -> list[str]:
    """The fields of the (nested) model in which the last element of `path` was looked up."""
    for part in path[:-1]:
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        inner = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        model = inner[0] if inner else model
    return list(model.model_fields)


def line_of(text: str, path: list[Any]) -> int:
    """The line at which the value under `path`, keys and indices, begins in YAML; of its nearest parent where it is missing."""
    node = _composed(text)
    line = 1 if node is None else node.start_mark.line + 1
    for part in path:
        if isinstance(node, yaml.SequenceNode) and isinstance(part, int):
            node = node.value[part]
        elif isinstance(node, yaml.MappingNode) and (
            found := [pair for pair in node.value if pair[0].value == str(part)]
        ):
            line, node = found[0][0].start_mark.line + 1, found[0][1]
            continue
        else:
            break
        line = node.start_mark.line + 1
    return line


@lru_cache
def _composed(text: str) -> Any:
    return yaml.compose(text, LOADER)


def read(path: Path, model: type[M], lines: bool = False) -> M:
    """A YAML file as `model`; UserError names file, key and remedy, with `lines` the line as well."""
    try:
        about = path.stat()
        return _read(path, model, lines, (about.st_mtime_ns, about.st_size, about.st_ino))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror}): make it a readable file") from None


@lru_cache(maxsize=512)
def _read(path: Path, model: type[M], lines: bool, _stamp: tuple[int, ...]) -> M:
    """Once for each state of a file: an audit asks for hundreds of arms, whose models are frozen."""
    text = ""
    try:
        text = path.read_text()
        return model.model_validate(yaml.load(text, LOADER) or {})
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(e).split())}") from None
    except ValidationError as e:
        raise explain(e, model, str(path), text if lines else None) from None
