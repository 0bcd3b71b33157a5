"""Methods as folders: found in the checkout and in the `method_paths` of `distillbench.yaml`, named
as arms, their settings merged, their code loaded."""

from __future__ import annotations

import importlib.util
import sys
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from distillbench.config import SHARE, Benchmark, MethodFile, Project, Variant, root
from distillbench.errors import UserError, nearest
from distillbench.hashing import canonical, digest
from distillbench.reading import explain, merged, read
from distillbench.registry.claims import ClaimsFile
from distillbench.registry.code import hash_of

if TYPE_CHECKING:
    from distillbench.method import Method

TEXTS = ("README.md", "claims.yaml", "config.yaml", "tuning.json")
RESERVED = ("teacher",)  # an arm that is not a method
DIGITS = 6  # decimal places of a share of the budget


@dataclass(frozen=True)
class MethodFolder:
    """A method as found on disk; nothing of it has been imported."""

    name: str
    path: Path
    file: MethodFile
    claims: ClaimsFile

    def code_hash(self) -> str:
        """Hash of method.py with all that it imports, and of every further file in the folder.

        The settings, which a cell's recipe holds resolved, and the texts are left out.
        """
        found = []
        for file in sorted(self.path.rglob("*")):
            place = file.relative_to(self.path)
            if not file.is_file() or place.name in TEXTS or "__pycache__" in place.parts:
                continue
            found.append([place.as_posix(), _hash_of_any(file)])
        return digest(canonical(found))


def _hash_of_any(file: Path) -> str:
    """Hash of a file's code; of its bytes where it is no Python, which its row will say."""
    if file.suffix == ".py":
        with suppress(SyntaxError, ValueError):
            return hash_of(file)
    return digest(file.read_bytes())


@dataclass(frozen=True)
class Arm:
    """A method with a variant and a share of the benchmark's budget: a row group of a table."""

    folder: MethodFolder
    variant: str | None
    changes: dict[str, Any] = field(default_factory=dict)  # of a trial, over all other settings
    share: float = 1.0

    @property
    def name(self) -> str:
        """method, method@variant, and @x0.25 behind it for another share of the budget than 1."""
        parts = [self.folder.name]
        if self.variant:
            parts.append(self.variant)
        if self.share != 1:
            digits = f"{self.share:.{DIGITS}f}".rstrip("0").rstrip(".")
            parts.append(f"x{digits}")
        return "@".join(parts)

    def at(self, share: float) -> Arm:
        """This arm with its budget multiplied by `share`."""
        # Rounded as in its name, or the name would be another cell's.
        return replace(self, share=round(self.share * share, DIGITS))

    @property
    def start(self) -> Arm | None:
        """The arm from whose students this one's start, at the same share of the budget, or None.

        Raises UserError where there is no such arm, or where it starts from another one itself.
        """
        name = self.attribute("start")
        if name in (None, "none"):
            return None
        where = f"{self.folder.path / 'config.yaml'}: key 'start'"
        try:
            found = arm(name)
        except UserError as e:
            raise UserError(f"{where}: {e}") from None
        if found.attribute("start") not in (None, "none"):
            raise UserError(f"{where}: {name} starts from another arm itself")
        return found.at(self.share)

    def attribute(self, key: str) -> Any:
        """The variant's own value of `key`, or else the method's.

        key: 'group', 'fidelity', 'adaptation', 'trajectory' or 'start'.
        """
        if self.variant:
            own = getattr(self.folder.file.variants[self.variant], key)
            if own is not None:
                return own
        return getattr(self.folder.file, key)

    def labels(self) -> dict[str, Any]:
        """What a table says about the arm besides its numbers, from the files as they are now."""
        reported = []
        for number in self.folder.claims.reported:
            if number.arm == self.name:
                reported.append(number.model_dump())
        return {
            "title": self.folder.file.title,
            "fidelity": self.attribute("fidelity"),
            "adaptation": self.attribute("adaptation"),
            "trajectory": self.attribute("trajectory"),
            "reported": reported,
        }

    def settings(self, benchmark: Benchmark) -> dict[str, Any]:
        """The method's raw configuration on a benchmark, before it is validated.

        Layers of config.yaml, merged key by key, a later one over the earlier ones:

            1. config                                of the method
            2. benchmarks.<family>
            3. benchmarks.<name>
            4. variants.<variant>.config             of the variant, if there is one
            5. variants.<variant>.benchmarks.<family>
            6. variants.<variant>.benchmarks.<name>

        So what a variant changes everywhere also holds on a benchmark for which the method has a
        value of its own. The changes of a trial of `distillbench tune` come last.
        """
        sources: list[MethodFile | Variant] = [self.folder.file]
        if self.variant:
            sources.append(self.folder.file.variants[self.variant])
        out: dict[str, Any] = {}
        for source in sources:
            out = merged(out, source.config)
            out = merged(out, source.benchmarks.get(benchmark.family, {}))
            out = merged(out, source.benchmarks.get(benchmark.name, {}))
        return merged(out, self.changes)


def read_folder(path: Path) -> MethodFolder:
    """The method in a folder; UserError on what is wrong with its settings or claims."""
    claims = path / "claims.yaml"
    papers = read(claims, ClaimsFile, lines=True) if claims.is_file() else ClaimsFile()
    return MethodFolder(path.name, path, read(path / "config.yaml", MethodFile), papers)


def discover() -> dict[str, MethodFolder]:
    """Every method folder by name; two folders of one name are an error."""
    found: dict[str, MethodFolder] = {}
    for path in _candidates():
        why = None
        if path.name in found:
            why = f"is also the name of {found[path.name].path}"
        elif path.name in RESERVED or "@" in path.name:
            why = "is reserved"
        if why is not None:
            raise UserError(f"{path}: the method name '{path.name}' {why}: rename the folder")
        found[path.name] = read_folder(path)
    return found


def _candidates() -> list[Path]:
    """Folders that hold a method.py: in methods/, and at or inside each of `method_paths`."""
    project_file = root() / "distillbench.yaml"
    found = _with_method(root() / "methods")
    for entry in read(project_file, Project).method_paths:
        path = (root() / entry).resolve()
        inside = [path] if (path / "method.py").is_file() else _with_method(path)
        if not inside:
            raise UserError(
                f"{project_file}: method_paths: no method.py in '{entry}' or in its folders"
            )
        found += inside
    return found


def _with_method(folder: Path) -> list[Path]:
    return sorted(file.parent for file in folder.glob("*/method.py"))


def arm(name: str) -> Arm:
    """The arm called `method` or `method@variant`, either with @x0.25 for that share of the budget.

    Raises UserError, which offers the nearest name, where there is none.
    """
    methods = discover()
    method, _, variant = name.partition("@")
    share = 1.0
    before, _, last = variant.rpartition("@")
    if found := SHARE.fullmatch(last):
        variant = before
        share = float(found[1])
        if share == 0 or share != round(share, DIGITS):
            raise UserError(
                f"{name}: a share of the budget is above 0, with at most {DIGITS} decimal places, "
                f"e.g. {method}@x0.25"
            )
    if method not in methods:
        raise UserError(f"unknown method '{method}', {nearest(method, methods)}")
    folder = methods[method]
    if variant and variant not in folder.file.variants:
        near = nearest(variant, folder.file.variants)
        raise UserError(f"{folder.path / 'config.yaml'}: unknown variant '{variant}', {near}")
    return Arm(folder, variant or None, share=share)


def load(folder: MethodFolder) -> type[Method]:
    """The Method subclass of a folder; imports its code (and torch).

    Raises TypeError where there is not exactly one, and whatever the code raises.
    """
    from distillbench.method import Method

    name = f"distillbench_method_{folder.name}"
    spec = importlib.util.spec_from_file_location(name, folder.path / "method.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    classes = []
    for value in vars(module).values():
        is_method = isinstance(value, type) and issubclass(value, Method)
        if is_method and value.__module__ == name:
            classes.append(value)
    if len(classes) != 1:
        raise TypeError(
            f"{folder.path / 'method.py'}: expected one subclass of Method, found {len(classes)}"
        )
    return classes[0]


def configuration(arm: Arm, benchmark: Benchmark, method: type[Method]) -> Any:
    """The validated `Method.Config` of an arm on a benchmark; UserError names file, key, remedy."""
    try:
        return method.Config.model_validate(arm.settings(benchmark))
    except ValidationError as e:
        where = f"{arm.folder.path / 'config.yaml'} ({benchmark.name})"
        raise explain(e, method.Config, where) from None
