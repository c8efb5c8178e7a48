"""Rewards completions whose final answer equals the row's, as mathematics: 1 or 0, by math-verify."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ftcore import Plan, Problem, RewardConfig, hookimpl
from ftcore.rewards import check_column, one_by_one
from ftcore.specs import Reward

REQUIRES = ("math-verify>=0.8",)
FINAL = "####"
"""Where a solution in GSM8K's style has its answer."""
PROSE = re.compile(r"(?<![\\A-Za-z{])[A-Za-z]{2,}")
"""A word that is no command of LaTeX's."""
UNIT = re.compile(r"\\(?:text|mbox|mathrm|textbf)\s*\{[^{}]*\}(?:\^\{?\d\}?)?")
"""Words in a formula, such as a unit, which math-verify does not read."""


@dataclass
class Config(RewardConfig):
    """The math reward's settings."""

    column: str = "answer"
    """Column with the right answer: a number, LaTeX, or a solution that ends with it."""
    tag: str = "answer"
    """Judge what stands last in `<tag>...</tag>`, where the completion has it; else what follows its thoughts."""


@hookimpl
def ftcore_check_plan(plan: Plan) -> list[Problem]:
    """The rows have the answer."""
    return check_column(plan, "math", plan.config(Config).column)


@hookimpl
def ftcore_rewards(plan: Plan) -> Sequence[Reward]:
    """One function, named `math` in the metrics."""
    config = plan.config(Config)
    return [one_by_one("math", partial(score, column=config.column, tag=config.tag), config.weight)]


def score(text: str, row: Mapping[str, Any], column: str, tag: str) -> float | None:
    """Whether the two are equal; None where the row's own answer is no mathematics."""
    from math_verify import parse, verify

    # Its own time limits would take the alarm of ours, and swallow what it raises.
    right = parse(as_answer(row[column]), parsing_timeout=None)
    return float(verify(right, parse(judged(text, tag), parsing_timeout=None), timeout_seconds=None)) if right else None


def judged(text: str, tag: str) -> str:
    """The part of a completion that is its answer: math-verify would take the last number that it can read."""
    name = re.escape(tag)
    found = re.findall(rf"<{name}>(.*?)</{name}>", text, re.DOTALL) if tag else []
    answer: str = found[-1] if found else text.rpartition("</think>")[2]
    return answer.strip()


def as_answer(value: Any) -> str:
    """The answer marked as mathematics, so that `1/2` and `x + 1` are read whole; in words one is looked for."""
    text = str(value).rpartition(FINAL)[2].strip()
    if "$" in text or "\\boxed" in text:
        return text
    formula = UNIT.sub("", text).strip() or text
    return text if PROSE.search(formula) else f"${formula}$"
