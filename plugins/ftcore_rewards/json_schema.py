"""Rewards completions that are JSON of a schema: 1, for other JSON half of it if `partial`, and 0 for anything else."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftcore import Plan, Problem, Refused, RewardConfig, hookimpl
from ftcore.errors import Exit
from ftcore.rewards import one_by_one
from ftcore.rows import beside
from ftcore.specs import Reward

REQUIRES = ("jsonschema>=4.18",)
KEY = "reward.json_schema.schema"


@dataclass
class Config(RewardConfig):
    """The JSON reward's settings."""

    schema: Any = None
    """JSON schema: a .json file, or the schema itself."""
    partial: bool = False
    """Give 0.5 to JSON that is not of the schema."""


@hookimpl
def ftcore_check_plan(plan: Plan) -> list[Problem]:
    """A schema that is one."""
    try:
        schema = _schema(plan.config(Config).schema)
        validator_of(schema)
    except Refused as refused:
        return list(refused.problems)
    except ImportError:  # the plan names the missing package already
        return []
    return []


@hookimpl
def ftcore_rewards(plan: Plan) -> Sequence[Reward]:
    """One function, named `json_schema` in the metrics."""
    config = plan.config(Config)
    validator = validator_of(_schema(config.schema))
    other = 0.5 if config.partial else 0.0
    return [one_by_one("json_schema", lambda text, _: score(text, validator, other), config.weight)]


def score(text: str, validator: Any, other: float) -> float:
    """1 for JSON of the schema, `other` for other JSON, 0 for what is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return 0.0
    return 1.0 if validator.is_valid(value) else other


def validator_of(schema: Mapping[str, Any]) -> Any:
    """The validator of the schema's own draft; it fetches nothing. Raises Refused for what is no schema."""
    import jsonschema
    from referencing import Registry

    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        kind.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise Refused(Problem(KEY, f"is no JSON schema: {error.message}", "mend it")) from error
    return kind(schema, registry=Registry())


def _schema(given: Any) -> Mapping[str, Any]:
    if isinstance(given, Mapping):
        return given
    if not isinstance(given, str):
        raise Refused(Problem(KEY, "no schema is given", f"name a file: {KEY}=answer.schema.json"))
    file = Path(given).expanduser()
    if not file.is_file():
        raise Refused(Problem(KEY, f"there is no file {given}", beside(file), Exit.MISSING_INPUT))
    try:
        schema = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise Refused(Problem(KEY, f"{given} is not JSON: {error}", "mend the file", Exit.DATA)) from error
    if not isinstance(schema, Mapping):
        raise Refused(Problem(KEY, f"{given} holds no object", 'a schema looks like {"type": "object"}', Exit.DATA))
    return schema
