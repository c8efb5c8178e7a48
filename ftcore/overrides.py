"""Messages for what a user types: checks before Hydra composes, and Hydra's own errors in the user's terms."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any

from ftcore.catalog import Catalog, nearest
from ftcore.config import DEFAULTED, KINDS, MANY, RunConfig
from ftcore.errors import FtcoreError, Problem, Refused, refuse

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

RUN_KEYS = tuple(f.name for f in fields(RunConfig))
GROUPS = ("recipe", "sweep")


def check_overrides(parsed: Sequence[Override], catalog: Catalog, recorded: bool) -> None:
    """Refuse wrong options and missing or superfluous `+` before Hydra sees them.

    Raises Refused with every finding.
    """
    # What a recorded run or a recipe selects is not known here: there, whether a `+` is right is left to Hydra.
    composed = recorded or any(_root(o) in GROUPS for o in parsed)
    selected = {kind for kind in KINDS if composed or kind in DEFAULTED} | {o.key_or_group for o in parsed}
    problems = _given_twice(parsed)
    for override in [] if problems else parsed:
        key, root = str(override.key_or_group), _root(override)
        if root in KINDS and override.package is not None:
            fix = f"write {_typed_plus(override)}{root}={_value(override)}"
            problems.append(Problem(f"{root}@{override.package}", "an option cannot be put elsewhere with `@`", fix))
        elif key in KINDS:
            problems += _check_option(override, key, catalog, recorded, composed)
        elif root in KINDS:
            problems += _check_setting(override, key, root, selected)
        elif root in GROUPS:
            problems += _check_group(override, root, recorded)
        elif root not in (*RUN_KEYS, "hydra"):
            problems.append(_unknown_key(override, key))
        elif root in RUN_KEYS and key != root and not is_dataclass(default := getattr(RunConfig(), root)):
            value = f"[{_value(override)}]" if isinstance(default, list) else _value(override)
            problems.append(Problem(key, f"{root} has no keys of its own", f"write {root}={value}"))
    refuse(problems)


def _root(override: Override) -> str:
    return re.split(r"[.@/]", str(override.key_or_group))[0]


def _value(override: Override) -> str:
    return str(override.input_line).partition("=")[2]


def _typed_plus(override: Override) -> str:
    return "+" if override.is_add() else ""


def _given_twice(parsed: Sequence[Override]) -> list[Problem]:
    """A kind that is given twice would leave one of the two out without a word."""
    counts = Counter(o.key_or_group for o in parsed if o.key_or_group in (*KINDS, *GROUPS) and not o.is_delete())
    problems = []
    for kind in (kind for kind, count in counts.items() if count > 1):
        given = [o for o in parsed if o.key_or_group == kind]
        words = " and ".join(str(o.input_line) for o in given)
        names = ",".join(_value(o).strip("[]") for o in given)
        fix = (
            f"write {_typed_plus(given[0])}{kind}=[{names}]"
            if kind in MANY
            else f"keep only {given[0].input_line} or {given[-1].input_line}"
        )
        problems.append(Problem(kind, f"is given twice: {words}", fix))
    return problems


def _check_option(override: Override, kind: str, catalog: Catalog, recorded: bool, composed: bool) -> list[Problem]:
    text, shown, plus = str(override.input_line), _value(override), _typed_plus(override)
    if override.is_delete():
        message = "a recorded run keeps what it selected"
        return [Problem(kind, message, f"replace it with {kind}=NAME, or start without run=")] if recorded else []
    if not recorded and plus and kind in DEFAULTED:
        return [Problem(kind, f"has a default, so `+` would add to it: {text}", f"write {kind}={shown}")]
    if not composed and not plus and kind not in DEFAULTED:
        return [Problem(kind, f"nothing is selected yet that {text} could replace", f"write +{kind}={shown}")]
    names, problem = _option_names(override, kind)
    if problem is not None:
        return [problem]
    problems: list[Problem] = []
    for name in names:
        try:
            catalog.find(kind, name)
        except Refused as refused:
            problems += [replace(p, fix=p.fix.replace(f" {kind}=", f" {plus}{kind}=")) for p in refused.problems]
    return problems


def _option_names(override: Override, kind: str) -> tuple[list[str], Problem | None]:
    """The options that are named, or what is wrong with the way they are."""
    if override.is_sweep_override():
        return [str(getattr(v, "text", v)) for v in override.sweep_iterator() if not isinstance(v, list)], None
    text, plus, value = str(override.input_line), _typed_plus(override), override.value()
    names = [str(v) for v in (value if isinstance(value, list) else [value]) if v is not None]
    usage = f"write {plus}{kind}=NAME; `ftcore plugins {kind}` lists the names"
    if value is None or value == "":
        none = "write kernels=[] for plain transformers" if kind == "kernels" else usage
        return [], Problem(kind, f"names no option: {text}", none)
    if isinstance(value, dict):
        return [], Problem(kind, f"takes the name of an option: {text}", usage)
    if isinstance(value, list) and kind not in MANY:
        return [], Problem(
            kind, f"takes one option, not a list: {text}", f"write {plus}{kind}={names[0] if names else 'NAME'}"
        )
    if len(set(names)) < len(names):
        once = ",".join(dict.fromkeys(names))
        return [], Problem(kind, f"names an option twice: {text}", f"write {plus}{kind}=[{once}]")
    return names, None


def _check_setting(override: Override, key: str, kind: str, selected: Iterable[object]) -> list[Problem]:
    """`kind.key=value` belongs to an option, so one must be selected; which one is not set by hand."""
    parts = key.split(".")
    plus = "" if kind in DEFAULTED else "+"
    if kind not in selected:
        name = f"[{parts[1]}]" if kind in MANY else "NAME"
        return [
            Problem(
                key,
                f"belongs to a {kind} plugin, and no {kind} is selected",
                f"add {plus}{kind}={name}; `ftcore plugins {kind}` lists them",
            )
        ]
    if parts[-1] == "name" and len(parts) == (3 if kind in MANY else 2):
        return [Problem(key, "is set by selecting an option", f"write {plus}{kind}={_value(override) or 'NAME'}")]
    return []


def _check_group(override: Override, group: str, recorded: bool) -> list[Problem]:
    if recorded:
        return [
            Problem(
                group,
                "cannot be added to a recorded run, whose config is complete",
                f"leave out run= or {override.input_line}",
            )
        ]
    if not (override.is_add() or override.is_delete()):
        return [
            Problem(
                group,
                f"nothing is selected yet that {override.input_line} could replace",
                f"write +{override.input_line}",
            )
        ]
    return []


def _unknown_key(override: Override, key: str) -> Problem:
    root, dot, rest = key.partition(".")
    near = nearest(root, [*KINDS, *RUN_KEYS, *GROUPS])
    if places := homes(key):
        return Problem(key, "is no key of a run", f"did you mean {' or '.join(places)}?")
    if near in KINDS and not dot:
        plus = "" if near in DEFAULTED else "+"
        return Problem(
            key, f"is no key of a run: {override.input_line}", f"did you mean {plus}{near}={_value(override)}?"
        )
    fix = f"did you mean {near}{dot}{rest}?" if near else "`ftcore --help` lists the keys"
    return Problem(key, "is no key of a run", fix)


def homes(key: str) -> list[str]:
    """Full keys that end in `key` or in one much like it: `trainer.learning_rate` for `lerning_rate`."""
    full = [
        f"{kind}.{f.name}" for kind, base in KINDS.items() if kind not in MANY for f in fields(base) if f.name != "name"
    ]
    near = nearest(key, [name.partition(".")[2] for name in full]) if len(key) > 3 else None
    exact = [name for name in full if name.partition(".")[2] == key]
    return exact or [name for name in full if near and name.partition(".")[2] == near]


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
    if value.startswith("[") and value.endswith("]"):
        items = [item.strip().strip("\"'") for item in value[1:-1].split(",")]
        quoted = "[" + ",".join(f'"{item}"' for item in items) + "]"
    else:
        quoted = '"' + value.strip("\"'") + '"'
    return Refused(Problem(key.lstrip("+~"), f"cannot be read: {text}", f"quote it: '{key}={quoted}'"))


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
        quote = "name one of them" if key in KINDS else f"quote it: '{key}=\"{value}\"'"
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
