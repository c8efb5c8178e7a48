"""Checks of what a user types, before Hydra composes it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import fields, is_dataclass, replace
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


ELSEWHERE = {
    "lr": ["trainer.learning_rate"],
    "batch_size": ["trainer.global_batch", "trainer.micro_batch"],
    "per_device_train_batch_size": ["trainer.micro_batch"],
    "per_device_batch_size": ["trainer.micro_batch"],
    "train_batch_size": ["trainer.global_batch"],
    "gradient_accumulation_steps": ["trainer.global_batch"],
    "num_train_epochs": ["trainer.epochs"],
    "num_epochs": ["trainer.epochs"],
    "max_seq_length": ["trainer.max_length"],
    "max_seq_len": ["trainer.max_length"],
    "warmup_ratio": ["trainer.warmup"],
    "warmup_steps": ["trainer.warmup"],
    "lora_r": ["adapter.r"],
    "lora_alpha": ["adapter.alpha"],
    "lora_dropout": ["adapter.dropout"],
    "target_modules": ["adapter.targets"],
    "load_in_4bit": ["+quantizer=bnb_nf4"],
    "dataset": ["data.path"],
    "data_path": ["data.path"],
    "train_file": ["data.path"],
    "model_name": ["model.id"],
    "model_name_or_path": ["model.id"],
}
"""What other trainers call it."""


def homes(key: str) -> list[str]:
    """Full keys that end in `key` or in one much like it: `trainer.learning_rate` for `lerning_rate`."""
    if key in ELSEWHERE:
        return ELSEWHERE[key]
    full = [
        f"{kind}.{f.name}" for kind, base in KINDS.items() if kind not in MANY for f in fields(base) if f.name != "name"
    ]
    near = nearest(key, [name.partition(".")[2] for name in full]) if len(key) > 3 else None
    exact = [name for name in full if name.partition(".")[2] == key]
    return exact or [name for name in full if near and name.partition(".")[2] == near]
