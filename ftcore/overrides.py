"""Messages for what a user types: checks before Hydra composes, and Hydra's own errors in the user's terms."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING

from ftcore.catalog import Catalog, nearest
from ftcore.config import DEFAULTED, KINDS, MANY, RunConfig
from ftcore.errors import Problem, Refused, refuse

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

RUN_KEYS = tuple(f.name for f in fields(RunConfig))
GROUPS = ("recipe", "sweep")


def check_overrides(parsed: Sequence[Override], catalog: Catalog, recorded: bool) -> None:
    """Refuse wrong options and missing or superfluous `+` before Hydra sees them.

    Raises Refused with every finding.
    """
    problems: list[Problem] = []
    for override in parsed:
        key = override.key_or_group.partition("@")[0]
        if key in KINDS:
            problems += _check_option(override, key, catalog, recorded)
        elif key.partition(".")[0] not in (*RUN_KEYS, *GROUPS, "hydra") and "/" not in key:
            problems.append(_unknown_key(override, key))
    refuse(problems)


def _check_option(override: Override, kind: str, catalog: Catalog, recorded: bool) -> list[Problem]:
    text, plus = str(override.input_line), override.is_add()
    if override.is_delete():
        return []
    if override.is_sweep_override():
        names = [str(getattr(v, "text", v)) for v in override.sweep_iterator() if not isinstance(v, list)]
    else:
        value = override.value()
        names = [str(v) for v in (value if isinstance(value, list) else [value]) if v is not None]
        if isinstance(value, dict):
            return [Problem(kind, "takes the name of an option", f"`ftcore plugins` lists the options of {kind}")]
        if isinstance(value, list) and kind not in MANY:
            return [Problem(kind, f"takes one option, not a list: {text}", f"write {kind}={names[0] if names else 'NAME'}")]
    shown = text.partition("=")[2]
    if not recorded and plus and kind in DEFAULTED:
        return [Problem(kind, f"has a default, so `+` would add to it: {text}", f"write {kind}={shown}")]
    if not recorded and not plus and kind not in DEFAULTED:
        return [Problem(kind, f"nothing is selected yet that {text} could replace", f"write +{kind}={shown}")]
    problems: list[Problem] = []
    for name in names:
        try:
            catalog.find(kind, name)
        except Refused as refused:
            problems += refused.problems
    return problems


def _unknown_key(override: Override, key: str) -> Problem:
    root, dot, rest = key.partition(".")
    near = nearest(root, [*KINDS, *RUN_KEYS, *GROUPS])
    if near in KINDS and not dot:
        plus = "" if near in DEFAULTED else "+"
        return Problem(key, f"is no key of a run: {override.input_line}", f"did you mean {plus}{near}={override.value()}?")
    fix = f"did you mean {near}{dot}{rest}?" if near else "`ftcore --help` lists the keys"
    return Problem(key, "is no key of a run", fix)


def explain_grammar(text: str, error: Exception) -> Refused:
    """Hydra's grammar did not take `text`; show the form that it takes."""
    if text.startswith("--"):
        return Refused(Problem(text, "is no option of ftcore", "settings are written key=value; `ftcore --help` shows examples"))
    key, equals, value = text.partition("=")
    if not equals:
        return Refused(Problem(text, "is neither a task nor key=value", f"write {text}=VALUE, or see `ftcore --help`"))
    if value.startswith("[") and value.endswith("]"):
        items = [item.strip().strip("\"'") for item in value[1:-1].split(",")]
        quoted = "[" + ",".join(f'"{item}"' for item in items) + "]"
    else:
        quoted = '"' + value.strip("\"'") + '"'
    return Refused(Problem(key.lstrip("+"), f"cannot be read: {text}", f"quote it: '{key}={quoted}'"))


def explain(error: Exception, overrides: Sequence[str]) -> Refused:
    """A Hydra or OmegaConf error, in one line with the key at fault."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    if isinstance(cause, Refused):
        return cause
    key = str(getattr(cause, "full_key", "") or "")
    lines = [line.strip() for line in str(cause).strip().splitlines() if line.strip()]
    message = lines[0] if lines else type(cause).__name__
    if found := re.search(r"Error merging override (.+)", str(error)):
        key = key or found.group(1).lstrip("+").partition("=")[0]
    if missing := re.search(r"(?:Could not find|Could not load) '([^']+)'", str(error)):
        return _missing(missing.group(1), str(error))
    if invalid := re.search(r"Invalid value '(.*)', expected one of \[(.*)\]", message):
        return Refused(Problem(key, f"'{invalid[1]}' is not one of {invalid[2]}", _near_value(key, invalid[1], invalid[2])))
    return Refused(Problem(key, _clean(message), _type_fix(key, message)))


def _missing(name: str, text: str) -> Refused:
    group, _, option = name.rpartition("/")
    listed = re.search(r"Available options in '[^']*':\s*(.*?)(?:\n\n|Config search path|$)", text, re.S)
    options = listed.group(1).split() if listed else []
    near = nearest(option, options)
    fix = f"did you mean +{group}={near}?" if near else (f"installed: {', '.join(options)}" if options else "")
    return Refused(Problem(group or name, f"there is no {group} named '{option}'", fix))


def _near_value(key: str, value: str, choices: str) -> str:
    near = nearest(value, choices.replace(" ", "").split(","))
    return f"did you mean {key}={near}?" if near else ""


def _type_fix(key: str, message: str) -> str:
    wanted = {"Float": "a number", "Integer": "a whole number", "Boolean": "true or false"}
    for name, words in wanted.items():
        if name in message:
            return f"{key or 'it'} takes {words}"
    return ""


def _clean(message: str) -> str:
    return message.replace("ConfigAttributeError", "").rstrip(".")

