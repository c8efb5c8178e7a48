"""Rewards completions that a regular expression matches: 1 or 0."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ftcore import Plan, Problem, RewardConfig, hookimpl
from ftcore.rewards import one_by_one
from ftcore.specs import Reward


@dataclass
class Config(RewardConfig):
    """The regex reward's settings."""

    pattern: str = ""
    """Regular expression of Python's `re`; `.` matches line ends as well."""
    whole: bool = False
    """Whether it must match the whole completion instead of some part of it."""


@hookimpl
def ftcore_check_plan(plan: Plan) -> list[Problem]:
    """A pattern that compiles."""
    pattern = plan.config(Config).pattern
    if not pattern:
        return [Problem("reward.regex.pattern", "is empty", r"give one: 'reward.regex.pattern=\"\d+\"'")]
    try:
        re.compile(pattern)
    except re.error as error:
        return [Problem("reward.regex.pattern", f"is no regular expression: {error}", "mend it")]
    return []


@hookimpl
def ftcore_rewards(plan: Plan) -> Sequence[Reward]:
    """One function, named `regex` in the metrics."""
    config = plan.config(Config)
    pattern = re.compile(config.pattern, re.DOTALL)
    match = pattern.fullmatch if config.whole else pattern.search
    return [one_by_one("regex", lambda text, _: float(match(text) is not None), config.weight)]
