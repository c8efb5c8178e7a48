"""`ftcore plugins [kind[/name]]`: what is installed, from metadata; one plugin in full."""

from __future__ import annotations

import argparse
import ast
from dataclasses import MISSING, Field, fields

from ftcore.catalog import Option, field_help, installed, nearest
from ftcore.config import KINDS
from ftcore.coverage import family_of
from ftcore.errors import FtcoreError, Problem, Refused
from ftcore.report import heading, note, table
from ftcore.tasks._family import describe


def main(argv: list[str]) -> int:
    """List plugins, describe one, or import all to find broken ones."""
    parser = argparse.ArgumentParser("ftcore plugins", description="List installed plugins, or describe one.")
    parser.add_argument("what", nargs="?", help="a kind, or kind/name")
    parser.add_argument("--broken", action="store_true", help="import every plugin and show those that fail")
    arguments = parser.parse_args(argv)
    if arguments.broken:
        return _broken()
    kind, _, name = (arguments.what or "").partition("/")
    if kind and kind not in KINDS:
        named = [f"{one}/{kind}" for one in KINDS if kind in installed().names(one)]
        near = " or ".join(named) or nearest(kind, KINDS)
        raise Refused(
            Problem(kind, "is no kind of plugin", f"did you mean {near}?" if near else f"kinds: {', '.join(KINDS)}")
        )
    if name and name.rpartition(":")[2] not in installed().names(kind):
        near = nearest(name, installed().names(kind))
        fix = f"did you mean {kind}/{near}?" if near else f"`ftcore plugins {kind}` lists them"
        raise Refused(Problem(f"{kind}/{name}", f"there is no {kind} named '{name}'", fix))
    if name:
        _describe(installed().find(kind, name))
    else:
        _list([kind] if kind else list(KINDS))
    return 0


def _list(kinds: list[str]) -> None:
    options = [option for kind in kinds for option in installed().options(kind)]
    table(
        ((o.kind, o.name, f"{o.dist} {o.version}", o.summary()) for o in options),
        header=("kind", "name", "package", "what it is"),
    )


def _describe(option: Option) -> None:
    note(f"{option.kind}/{option.name}   {option.origin}")
    module = option.load()
    note((module.__doc__ or "").strip())
    cls = option.config_class()
    helps = field_help(cls)
    heading("Keys")
    prefix = (
        option.kind
        if option.kind in ("model", "quantizer", "adapter", "data", "trainer", "generator")
        else f"{option.kind}.{option.name}"
    )
    table((f"{prefix}.{f.name}", _type(f), _default(f), helps[f.name]) for f in fields(cls) if f.name != "name")
    if option.kind == "model" and (family := family_of(option)):
        describe(family)
    heading("Hooks")
    table((name,) for name in _hooks(option))
    if requires := getattr(module, "REQUIRES", ()):
        heading("Needs")
        table((text,) for text in requires)


def _hooks(option: Option) -> list[str]:
    return [
        name for name in vars(option.load()) if name.startswith("ftcore_") and callable(getattr(option.load(), name))
    ]


def _type(field: Field[object]) -> str:
    text = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", str(field.type))
    return ast.unparse(ast.parse(text, mode="eval"))


def _default(field: Field[object]) -> str:
    value = (
        field.default
        if field.default is not MISSING
        else field.default_factory()
        if field.default_factory is not MISSING
        else None
    )
    return str(getattr(value, "value", value))


def _broken() -> int:
    failures = []
    for option in (option for kind in KINDS for option in installed().options(kind)):
        try:
            option.config_class()
        except FtcoreError as error:
            failures.append(str(error))
    for failure in failures:
        note(failure)
    note(f"{len(failures)} broken plugins")
    return int(bool(failures)) * 2
