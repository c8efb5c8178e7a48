"""Hydra's and OmegaConf's errors in the user's terms: the key at fault, and the fix."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from ftcore.catalog import nearest
from ftcore.config import DEFAULTED, KINDS, MANY, RunConfig
from ftcore.errors import FtcoreError, Problem, Refused


def explain_grammar(text: str, error: Exception) -> Refused:
    """Hydra's grammar did not take `text`; show the form that it takes."""
    if text in ("-m", "--multirun"):
        return Refused(
            Problem(
                text,
                "makes a sweep of training runs, and this task trains nothing",
                "leave it out, or use `ftcore train`",
            )
        )
    if text.startswith("-"):
        return Refused(
            Problem(text, "is no option of ftcore", "settings are written key=value; `ftcore --help` shows examples")
        )
    key, equals, value = (part.strip() for part in text.partition("="))
    if not equals:
        return Refused(
            Problem(text, "is neither a task nor key=value", f"write {text}=VALUE; `ftcore --help` shows examples")
        )
    if text != f"{key}={value}":
        return Refused(Problem(key.lstrip("+~"), f"has spaces around the `=`: {text}", f"write {key}={value}"))
    fix = f"quote it: {quoted(key, value)}"
    if value.startswith("~"):
        fix = f"the shell leaves this ~ as it is: write {key}={Path(value).expanduser()}"
    if value.startswith("[") and value.count("[") != value.count("]"):
        fix = "close every bracket, and quote the whole word for the shell"
    return Refused(Problem(key.lstrip("+~"), f"cannot be read: {text}", fix))


def quoted(key: str, value: str) -> str:
    """A setting as the shell and Hydra's grammar take it, whatever stands in its value."""
    if value.startswith("[") and value.endswith("]"):
        items = [item.strip().strip("\"'") for item in value[1:-1].split(",")]
        plain = all(re.fullmatch(r"[\w./-]+", item) for item in items)
        value = f"[{','.join(items)}]" if plain else "[" + ",".join(f'"{item}"' for item in items) + "]"
    else:
        value = '"' + value.strip("\"'") + '"'
    return shlex.quote(f"{key}={value}")


def explain(error: Exception, overrides: Sequence[str]) -> FtcoreError:
    """A Hydra or OmegaConf error, in one line with the key at fault."""
    cause: BaseException = error
    while cause.__cause__ is not None and not isinstance(cause, FtcoreError):
        cause = cause.__cause__
    if isinstance(cause, FtcoreError):
        return cause
    if problem := _composition(str(error), overrides):
        return Refused(problem)
    key = _key_at_fault(error, cause)
    file = re.match(r"In '([^']+)':[^\n]*\n", str(cause))
    message = str(cause)[file.end() if file else 0 :].strip().partition("\n")[0] or type(cause).__name__
    problem = _type_problem(key, message, _typed_value(key, overrides))
    return Refused(replace(problem, key=f"{file[1]}.yaml: {key}") if file else problem)


def _key_at_fault(error: BaseException, cause: BaseException) -> str:
    """The longer of what the user typed and what OmegaConf names: each may leave out an end of the key."""
    typed = re.search(r"Error merging override ([^=\n]+)", str(error))
    named = re.search(r"full_key: (\S+)", str(cause))
    found = [typed[1].lstrip("+~") if typed else "", named[1] if named else ""]
    return max(found, key=len)


def _typed_value(key: str, overrides: Sequence[str]) -> str:
    values = [text.partition("=")[2] for text in overrides if text.partition("=")[0].lstrip("+~") == key]
    return values[-1] if values else ""


def _composition(text: str, overrides: Sequence[str]) -> Problem | None:
    """What only Hydra knows: which options there are, and what a recipe selects."""
    if found := re.search(r"(?:Could not find|Could not load) '([^']+)'", text):
        return _missing(found[1], text)
    if found := re.search(r"Multiple values for (\S+?)\.|(\S+) appears more than once", text):
        kind = found[1] or found[2]
        value = _typed_value(kind, overrides) or "NAME"
        return Problem(kind, "is selected already, by the recipe", f"write {kind}={value}, which replaces it")
    if found := re.search(r"Could not override '([^'.]+)'\. No match", text):
        return Problem(
            found[1],
            "nothing is selected yet that it could replace",
            f"write +{found[1]}={_typed_value(found[1], overrides)}",
        )
    if found := re.search(r"Could not delete '([^']+)'\. No match", text):
        kernels = found[1] == "kernels"
        return Problem(
            found[1],
            "cannot be deleted",
            "write kernels=[] for plain transformers" if kernels else f"leave ~{found[1]} out",
        )
    if found := re.search(r"Ambiguous value for argument '(.*)'", text):
        key, _, value = found[1].lstrip("+").partition("=")
        word = shlex.quote(f'{key}="{value}"')
        quote = "name one of them" if key in KINDS else f"quote it: {word}"
        return Problem(key, f"several values make a sweep: {value}", f"{quote}; or add -m for a sweep")
    return None


def _missing(name: str, text: str) -> Problem:
    group, _, option = name.rpartition("/")
    listed = re.search(r"Available options in '[^']*':\s*(.*?)(?:\n\n|Config search path|$)", text, re.S)
    options = listed[1].split() if listed else []
    near = nearest(option, options)
    plus = "" if group.startswith("hydra") or group in DEFAULTED else "+"
    fix = (
        f"did you mean {plus}{group}={near}?"
        if near
        else f"there are: {', '.join(options) or 'none'}; --config-dir FOLDER adds your own"
    )
    return Problem(group or name, f"there is no {group} named '{option}'", fix)


_TYPES = (
    (
        r"'(?P<value>.*)' of type '.*' could not be converted to Float",
        "'{value}' is not a number",
        "write {key}=NUMBER",
    ),
    (
        r"'(?P<value>.*)' of type '.*' could not be converted to Integer",
        "'{value}' is not a whole number",
        "write {key}=WHOLE_NUMBER",
    ),
    (
        r"Value '(?P<value>.*)' is not a valid bool",
        "'{value}' is neither true nor false",
        "write {key}=true or {key}=false",
    ),
    (r"is not Optional", "cannot be null", "leave {key} out to keep its default"),
    (r"is not a ListConfig", "takes a list, not {typed}", "write {key}=[{typed}]"),
    (r"Cannot assign .* to Dict|is not a subclass", "takes keys of its own, not {typed}", "write {key}.NAME=VALUE"),
    (
        r"Cannot merge",
        "takes another kind of value than {typed}",
        "a list is written [a,b], and keys as {key}.NAME=VALUE",
    ),
    (
        r"Cannot convert '(?P<value>\w+)' to string",
        "takes one text, not a {value}: {typed}",
        "name one, or quote the whole value",
    ),
    (r"does not support deletion", "cannot be deleted", "leave it out to keep its default"),
    (
        r"Interpolation key '(?P<value>.*)' not found",
        "refers to '{value}', which is no key",
        "name an existing key in ${{...}}",
    ),
    (
        r"Environment variable '(?P<value>.*)' not found",
        "the environment variable {value} is not set",
        "set it, or write the value itself",
    ),
)
"""What OmegaConf says of a value, what ftcore says instead, and the fix."""


def _type_problem(key: str, message: str, typed: str) -> Problem:
    if found := re.search(r"Invalid value '(.*)', expected one of \[(.*)\]", message):
        near = nearest(found[1], found[2].split(", "))
        return Problem(
            key,
            f"'{found[1]}' is not one of {found[2]}",
            f"did you mean {key}={near}?" if near else f"choose one, such as {key}={found[2].split(', ')[0]}",
        )
    if found := re.search(r"Value (.*) \(\w+\) is not a valid input for <enum", message):
        return Problem(
            key, f"takes one word, not {typed or found[1]}", f"write {key}={typed.strip('[]{}').partition(',')[0]}"
        )
    if "dict is not a subclass" in message and key.partition(".")[0] in MANY:
        kind, name = key.split(".")[:2]
        plus = "" if kind in DEFAULTED else "+"
        return Problem(
            key, f"no {kind} named '{name}' is selected", f"write {plus}{kind}=[{name}], or leave the key out"
        )
    if "'{}' of type 'dict'" in message:
        parent = key.rpartition(".")[0]
        return Problem(key, f"{parent} is one value and has no keys", f"write {parent}={typed or 'VALUE'}")
    if re.match(r"Key '.*' not in", message):
        return unknown_key(key)
    for pattern, words, fix in _TYPES:
        if found := re.search(pattern, message):
            told = {**found.groupdict(), "key": key, "typed": typed or "this"}
            return Problem(key, words.format(**told), fix.format(**told))
    return Problem(key, message.rstrip("."), "`ftcore --help` shows how keys are written")


def unknown_key(key: str) -> Problem:
    """A key that Hydra refused by itself, with the nearest one of the same place."""
    path, _, name = key.rpartition(".")
    owner: Any = KINDS.get(path) or type(getattr(RunConfig(), path, None))
    near = nearest(name, [f.name for f in fields(owner)]) if is_dataclass(owner) else None
    fix = f"did you mean {path}.{near}?" if near else "`ftcore --help` lists the keys"
    return Problem(key, f"{path or 'a run'} has no key '{name}'", fix)
