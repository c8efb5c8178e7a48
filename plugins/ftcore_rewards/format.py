"""Rewards completions that are laid out in tagged parts, such as `<think>...</think><answer>...</answer>`: 1 or 0."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from ftcore import Plan, Problem, RewardConfig, hookimpl
from ftcore.rewards import one_by_one
from ftcore.specs import Reward


@dataclass
class Config(RewardConfig):
    """The format reward's settings."""

    tags: list[str] = field(default_factory=lambda: ["think", "answer"])
    """Names of the parts, in their order; each stands once, with nothing but white space around it."""
    partial: bool = False
    """Give a completion of another layout the part of the tags that it has exactly once, times a half."""
    opened: bool = False
    """The chat template writes the first tag into the prompt, as those of Qwen3's thinking models do."""


@hookimpl
def ftcore_check_plan(plan: Plan) -> list[Problem]:
    """Some tags, all different."""
    tags = plan.config(Config).tags
    if not tags or len(set(tags)) < len(tags) or not all(re.fullmatch(r"[\w.:-]+", tag) for tag in tags):
        fix = "give names without brackets, each once: 'reward.format.tags=[think,answer]'"
        return [Problem("reward.format.tags", f"is {tags}", fix)]
    return []


@hookimpl
def ftcore_rewards(plan: Plan) -> Sequence[Reward]:
    """One function, named `format` in the metrics."""
    config = plan.config(Config)
    before = f"<{config.tags[0]}>" if config.opened else ""
    return [one_by_one("format", lambda text, _: score(before + text, config.tags, config.partial), config.weight)]


def score(text: str, tags: Sequence[str], partial: bool) -> float:
    """1 for the layout, else 0, or up to a half for its tags."""
    marks = [mark for tag in tags for mark in (f"<{tag}>", f"</{tag}>")]
    once = [text.count(mark) == 1 for mark in marks]
    parts = r"\s*".join(f"<{re.escape(tag)}>.*</{re.escape(tag)}>" for tag in tags)
    if all(once) and re.fullmatch(rf"\s*{parts}\s*", text, re.DOTALL):
        return 1.0
    return 0.5 * sum(once) / len(once) if partial else 0.0
