"""What is installed: the entry points `ftcore.<kind>`, from metadata; plugins are imported when selected."""

from __future__ import annotations

import ast
import importlib.util
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from ftcore.config import KINDS, PluginConfig
from ftcore.errors import PluginError, Problem, Refused

CONF_GROUP = "ftcore.conf"
"""Entry points of packages that bring YAML (recipes, sweeps)."""


@dataclass(frozen=True)
class Option:
    """One installed plugin."""

    kind: str
    name: str
    module: str
    dist: str
    version: str

    @property
    def origin(self) -> str:
        """`dist version (module)`, for messages."""
        return f"{self.dist} {self.version} ({self.module})"

    def load(self) -> ModuleType:
        """Import the plugin module.

        Raises PluginError when the import fails, naming the package at fault.
        """
        try:
            return importlib.import_module(self.module)
        except Exception as error:
            raise PluginError(
                f"{self.kind}={self.name} of {self.origin} cannot be imported: {type(error).__name__}: {error}\n"
                f"    fix: reinstall or remove the package {self.dist}"
            ) from error

    def config_class(self) -> type[PluginConfig]:
        """The plugin's `Config`, or its kind's base when it has none.

        Raises PluginError when `Config` is no dataclass under the base of the kind.
        """
        base = KINDS[self.kind]
        cls = getattr(self.load(), "Config", base)
        if not (is_dataclass(cls) and isinstance(cls, type) and issubclass(cls, base)):
            raise PluginError(f"{self.module}.Config must be a dataclass that subclasses ftcore.{base.__name__}")
        return cls

    def source(self) -> Path | None:
        """File of the plugin module, found without importing it."""
        spec = importlib.util.find_spec(self.module)
        return Path(spec.origin) if spec and spec.origin else None

    def summary(self) -> str:
        """First line of the module's docstring, read without importing it."""
        try:
            path = self.source()
            doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) if path else None
        except (ImportError, OSError, SyntaxError, ValueError) as error:
            return f"(broken: {type(error).__name__})"
        return doc.splitlines()[0] if doc else ""


class Catalog:
    """All options of all kinds."""

    def __init__(self, options: Iterable[Option], conf: Mapping[str, str] | None = None) -> None:
        self._options: dict[str, dict[str, list[Option]]] = {kind: defaultdict(list) for kind in KINDS}
        self.conf = dict(conf or {})
        """Name to package of YAML that installed packages bring."""
        for option in options:
            self._options[option.kind][option.name].append(option)

    def names(self, kind: str) -> list[str]:
        """Option names of a kind, sorted."""
        return sorted(self._options.get(kind, ()))

    def options(self, kind: str) -> list[Option]:
        """Every option of a kind, those with a contested name included."""
        return [option for name in self.names(kind) for option in self._options[kind][name]]

    def find(self, kind: str, name: str) -> Option:
        """The option called `name`, or `dist:name` where two packages offer the same name.

        Raises Refused when there is none, or when the name is contested.
        """
        dist, _, plain = name.rpartition(":")
        found = self._options[kind].get(plain, [])
        if dist:
            found = [option for option in found if _normal(option.dist) == _normal(dist)]
        if not found:
            near = nearest(plain, self.names(kind))
            fix = f"did you mean {kind}={near}?" if near else f"`ftcore plugins` lists the options of {kind}"
            raise Refused(
                Problem(kind, f"there is no {kind} named '{name}' (installed: {_some(self.names(kind))})", fix)
            )
        if len(found) > 1:
            offers = ", ".join(option.origin for option in found)
            raise Refused(
                Problem(
                    f"{kind}={name}",
                    f"is offered by {len(found)} packages: {offers}",
                    f"say {kind}={found[-1].dist}:{name}",
                )
            )
        return found[0]


@cache
def installed() -> Catalog:
    """The catalog of this environment; metadata is scanned once."""
    import importlib_metadata

    groups = {f"ftcore.{kind}": kind for kind in KINDS}
    options: dict[tuple[str, str, str, str], Option] = {}
    conf: dict[str, str] = {}
    for dist in importlib_metadata.distributions():
        for point in dist.entry_points:
            if point.group == CONF_GROUP:
                conf[point.name] = point.value
            elif kind := groups.get(point.group):
                name = dist.metadata["Name"]
                # An editable install on sys.path twice shows the same dist twice; that is no conflict.
                options[kind, point.name, name, point.value] = Option(kind, point.name, point.value, name, dist.version)
    return Catalog(options.values(), conf)


def nearest(word: str, words: Iterable[str]) -> str | None:
    """The word that was probably meant: the only one that begins so, or else the one most like it."""
    known = list(words)
    begun = [one for one in known if len(word) > 2 and one.startswith(word)]
    found = begun if len(begun) == 1 else get_close_matches(word, known, n=1, cutoff=0.6)
    return found[0] if found else None


def field_help(cls: type[Any]) -> dict[str, str]:
    """Field name to the string under it in the source, over all base classes that are dataclasses."""
    helps: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not is_dataclass(base):
            continue
        helps |= _class_help(base)
    return {f.name: helps.get(f.name, "") for f in fields(cls)}


def _class_help(cls: type[Any]) -> dict[str, str]:
    spec = importlib.util.find_spec(cls.__module__)
    if not spec or not spec.origin or not Path(spec.origin).is_file():
        return {}
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    helps: dict[str, str] = {}
    for node in ast.walk(tree):
        if not (isinstance(node, ast.ClassDef) and node.name == cls.__name__):
            continue
        for line, below in zip(node.body, node.body[1:], strict=False):
            is_text = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and is_text:
                helps[line.target.id] = " ".join(str(below.value.value).split())  # type: ignore[attr-defined]
    return helps


def _normal(dist: str) -> str:
    return dist.lower().replace("_", "-")


def _some(names: list[str], shown: int = 12) -> str:
    return ", ".join(names[:shown]) + (f", ... {len(names) - shown} more" if len(names) > shown else "")
