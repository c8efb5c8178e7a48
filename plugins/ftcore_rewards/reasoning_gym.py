"""Rewards answers to reasoning-gym's puzzles by the puzzle's own scorer: 0 to 1; for rows of `data=reasoning_gym`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ftcore import Plan, Problem, RewardConfig, hookimpl
from ftcore.rewards import first_row, one_by_one
from ftcore.specs import Reward
from ftcore_rewards._harmless import harmless

REQUIRES = ("reasoning-gym>=0.1.19,<0.2",)


@dataclass
class Config(RewardConfig):
    """The reasoning-gym reward's settings."""

    tag: str = ""
    """Judge what stands last in `<tag>...</tag>`, which must be there; empty judges the whole completion."""


@hookimpl
def ftcore_check_plan(plan: Plan) -> list[Problem]:
    """The rows are reasoning-gym's."""
    row = first_row(plan) if plan.trainer else None
    if row is None or {"answer", "metadata"} <= {*row}:
        return []
    return [Problem("reward.reasoning_gym", "judges rows of data=reasoning_gym only", "add data=reasoning_gym")]


@hookimpl
def ftcore_rewards(plan: Plan) -> Sequence[Reward]:
    """One function, named `reasoning_gym` in the metrics."""
    config = plan.config(Config)
    return [one_by_one("reasoning_gym", partial(score, tag=config.tag), config.weight)]


def score(text: str, row: Mapping[str, Any], tag: str) -> float:
    """What the scorer of the row's task says to the answer; 0 for one that would have to be run to be judged."""
    from ftcore_data.reasoning_gym import entry_of, scorer_of

    entry = entry_of(row)
    found = re.findall(rf"<{re.escape(tag)}>(.*?)</{re.escape(tag)}>", text, re.DOTALL) if tag else [text]
    answer = found[-1].strip() if found else None
    if answer is None or not harmless(answer, entry["metadata"]["source_dataset"]):
        return 0.0
    return float(scorer_of(entry)(answer, entry))
