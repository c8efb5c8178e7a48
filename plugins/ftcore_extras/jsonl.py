"""A second copy of the metrics as JSON lines, at a path of your choice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ftcore import ExtraConfig, Plan, Problem, hookimpl

if TYPE_CHECKING:
    from transformers import TrainerCallback


@dataclass
class Config(ExtraConfig):
    """The second copy's settings."""

    path: str = ""
    """File to append to, for example one file for all runs of a sweep."""


@hookimpl
def ftcore_check_plan(plan: Plan) -> list[Problem]:
    """A path is needed."""
    if not plan.config(Config).path:
        return [Problem("extra.jsonl.path", "is empty", "name a file: extra.jsonl.path=all-runs.jsonl")]
    return []


@hookimpl
def ftcore_callbacks(plan: Plan) -> Sequence[TrainerCallback]:
    """The same callback that writes metrics.jsonl."""
    from ftcore.callbacks import JsonlMetrics

    return [JsonlMetrics(Path(plan.config(Config).path))]
