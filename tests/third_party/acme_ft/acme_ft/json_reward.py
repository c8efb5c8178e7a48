"""Rewards completions that are a JSON object: 1 for one, a half for other JSON, 0 for anything else."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ftcore import Plan, RewardConfig, hookimpl

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ftcore.specs import Reward


@dataclass
class Config(RewardConfig):
    """The JSON reward's settings."""

    keys: list[str] = field(default_factory=list)
    """Keys that the object must have for the full reward."""


@hookimpl
def ftcore_rewards(plan: Plan) -> Sequence[Reward]:
    """One function, named `acme_json` in the metrics."""
    config = plan.config(Config)

    def acme_json(completions: Sequence[Any], **_: Any) -> list[float]:
        return [config.weight * score(c if isinstance(c, str) else c[-1]["content"], config.keys) for c in completions]

    return [acme_json]


def score(text: str, keys: Sequence[str]) -> float:
    """How much of a JSON object the text is."""
    try:
        value = json.loads(text)
    except ValueError:
        return 0.0
    return 1.0 if isinstance(value, dict) and all(key in value for key in keys) else 0.5
