"""Solutions in steps, each right or wrong, as process reward models take them: `prompt`, `completions`, `labels`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ftcore import DataConfig, DataFormat, Shape, hookimpl
from ftcore_data._rows import Row, kind, missing, not_text, sample, truth


@dataclass
class Config(DataConfig):
    """The stepwise format has no settings of its own."""


@hookimpl
def ftcore_data_format() -> DataFormat:
    """Shape `stepwise`."""
    return DataFormat(
        name="stepwise",
        shape=Shape.STEPWISE,
        convert="ftcore_data.stepwise:convert",
        check="ftcore_data.stepwise:check",
        sample=sample("stepwise.jsonl"),
        columns=("prompt", "completions", "labels"),
        over={"prompts": ("completions", "labels")},
    )


def check(row: Row) -> str | None:
    """A prompt, and as many labels as steps."""
    if reason := missing(row, "prompt", "completions", "labels") or not_text(row, "prompt"):
        return reason
    steps, labels = row["completions"], row["labels"]
    for name in ("completions", "labels"):
        if not isinstance(row[name], list) or not row[name]:
            return f"column '{name}' is {kind(row[name])}, not a list of steps\ngive one entry for each step"
    if len(steps) != len(labels):
        return f"has {len(steps)} steps and {len(labels)} labels\ngive one label for each step"
    for number, (step, label) in enumerate(zip(steps, labels, strict=True), 1):
        if not isinstance(step, str) or not step.strip():
            return f"step {number} is empty or not text\nput text in, or take the step and its label out"
        if truth(label) is None:
            return f"label {number} is {label!r}, not true or false\nwrite true for a right step, false for a wrong one"
    return None


def convert(row: Row) -> dict[str, Any]:
    """The three columns."""
    labels = [truth(label) for label in row["labels"]]
    return {"prompt": row["prompt"], "completions": list(row["completions"]), "labels": labels}
