"""Discovery of method folders: `methods/*/` of the checkout and the `method_paths` of `distillbench.yaml`."""

from __future__ import annotations

import importlib.util
import sys
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from distillbench.config import SHARE, Benchmark, MethodFile, Project, root
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
    """A method with a variant and a share of the benchmark's budget, as one row group of a table."""

    folder: MethodFolder
    variant: str | None
    changes: dict[str, Any] = field(default_factory=dict)  # of a trial, over all other settings
    share: float = 1.0

    @property
    def name(self) -> str:
        """method, method@variant, and @x0.25 behind it for another share of the budget than 1."""
        share = (
            None if self.share == 1 else "x" + f"{self.share:.{DIGITS}f}".rstrip("0").rstrip(".")
        )
        return "@".join(filter(None, (self.folder.name, self.variant, share)))

    def at(self, share: float) -> Arm:
        """The same with that share of its budget."""
        return replace(
            self, share=round(self.share * share, DIGITS)
        )  # as its name says, or the name would be another cell's

    @property
    def start(self) -> Arm | None:
        """The arm whose students this one's start from, with as large a part of its budget; None where there is none."""
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
        """'group', 'fidelity', 'adaptation', 'trajectory' or 'start': the variant's own, or the method's."""
        own = getattr(self.folder.file.variants[self.variant], key) if self.variant else None
        return getattr(self.folder.file, key) if own is None else own

    def labels(self) -> dict[str, Any]:
        """What a table says about the arm besides its numbers, from the files as they are now."""
        return {
            "title": self.folder.file.title,
            "fidelity": self.attribute("fidelity"),
            "adaptation": self.attribute("adaptation"),
            "trajectory": self.attribute("trajectory"),
            "reported": [r.model_dump() for r in self.folder.claims.reported if r.arm == self.name],
        }

    def settings(self, benchmark: Benchmark) -> dict[str, Any]:
        """The method's raw configuration on a benchmark: general, family, name; then the same of the variant."""
        out: dict[str, Any] = {}
        for source in (
            self.folder.file,
            self.folder.file.variants[self.variant] if self.variant else None,
        ):
            if source is not None:
                for layer in (
                    source.config,
                    source.benchmarks.get(benchmark.family),
                    source.benchmarks.get(benchmark.name),
                ):
                    out = merged(out, layer or {})
        return merged(out, self.changes)


def read_folder(path: Path) -> MethodFolder:
    """The method in a folder; UserError on what is wrong with its settings or claims."""
    claims = path / "claims.yaml"
    papers = read(claims, ClaimsFile, lines=True) if claims.is_file() else ClaimsFile()
    return MethodFolder(path.name, path, read(path / "config.yaml", MethodFile), papers)


def discover() -> dict[str, MethodFolder]:
    """Every method folder by name; two folders of one name are an error."""
    project_file = root() / "distillbench.yaml"
    candidates = sorted(p.parent for p in (root() / "methods").glob("*/method.py"))
    for entry in read(project_file, Project).method_paths:
        path = (root() / entry).resolve()
        inside = (
            [path]
            if (path / "method.py").is_file()
            else sorted(p.parent for p in path.glob("*/method.py"))
        )
        if not inside:
            raise UserError(
                f"{project_file}: method_paths: no method.py in '{entry}' or in its folders"
            )
        candidates += inside
    found: dict[str, MethodFolder] = {}
    for path in candidates:
        if path.name in found or path.name in RESERVED or "@" in path.name:
            why = (
                f"is also the name of {found[path.name].path}"
                if path.name in found
                else "is reserved"
            )
            raise UserError(f"{path}: the method name '{path.name}' {why}: rename the folder")
        found[path.name] = read_folder(path)
    return found


def arm(name: str) -> Arm:
    """`method`, `method@variant`, either with @x0.25 for that share of the budget; UserError offers the nearest name."""
    methods, share = discover(), 1.0
    method, _, variant = name.partition("@")
    if found := SHARE.fullmatch(variant.rpartition("@")[2]):
        share, variant = float(found[1]), variant.rpartition("@")[0]
        if not share or share != round(share, DIGITS):
            raise UserError(
                f"{name}: a share of the budget is above 0, with at most {DIGITS} decimal places, e.g. {method}@x0.25"
            )
    if method not in methods:
        raise UserError(f"unknown method '{method}', {nearest(method, methods)}")
    if variant and variant not in methods[method].file.variants:
        variants = methods[method].file.variants
        raise UserError(
            f"{methods[method].path / 'config.yaml'}: unknown variant '{variant}', {nearest(variant, variants)}"
        )
    return Arm(methods[method], variant or None, share=share)


def load(folder: MethodFolder) -> type[Method]:
    """The Method subclass of a folder; imports its code (and torch). Whatever that raises is raised."""
    from distillbench.method import Method

    name = f"distillbench_method_{folder.name}"
    spec = importlib.util.spec_from_file_location(name, folder.path / "method.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    classes = [
        c
        for c in vars(module).values()
        if isinstance(c, type) and issubclass(c, Method) and c.__module__ == name
    ]
    if len(classes) != 1:
        raise TypeError(
            f"{folder.path / 'method.py'}: expected one subclass of Method, found {len(classes)}"
        )
    return classes[0]


def configuration(arm: Arm, benchmark: Benchmark, method: type[Method]) -> Any:
    """The validated `Method.Config` of an arm on a benchmark; UserError names file, key and remedy."""
    try:
        return method.Config.model_validate(arm.settings(benchmark))
    except ValidationError as e:
        raise explain(
            e, method.Config, f"{arm.folder.path / 'config.yaml'} ({benchmark.name})"
        ) from None
