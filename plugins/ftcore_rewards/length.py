"""Rewards completions for being near a length: 0 at the target, -1 a target's length away."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ftcore import Plan, Problem, RewardConfig, hookimpl
from ftcore.rewards import one_by_one
from ftcore.specs import Reward


@dataclass
class Config(RewardConfig):
    """The length reward's settings."""

    target: int = 40
    """Wanted length of a completion, in characters."""


@hookimpl
def ftcore_check_plan(plan: Plan) -> list[Problem]:
    """A target that completions can be near to."""
    target = plan.config(Config).target
    return (
        [] if target > 0 else [Problem("reward.length.target", f"is {target}", "give a number of characters above 0")]
    )


@hookimpl
def ftcore_rewards(plan: Plan) -> Sequence[Reward]:
    """One function, named `length` in the metrics."""
    config = plan.config(Config)
    return [one_by_one("length", lambda text, _: -abs(len(text) - config.target) / config.target, config.weight)]
