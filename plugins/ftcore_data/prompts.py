"""Prompts without answers: `prompt` as text or messages, or `question`; other columns go to the rewards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ftcore import DataConfig, DataFormat, Shape, hookimpl
from ftcore_data._messages import asked, check_messages, check_system, plain_messages, with_system
from ftcore_data._rows import Row, first, missing_all, not_text, sample

COLUMNS = ("prompt", "question")


@dataclass
class Config(DataConfig):
    """The prompts format has no settings of its own."""


@hookimpl
def ftcore_data_format() -> DataFormat:
    """Shape `prompts`: a conversation that ends with the user, and the columns that rewards read."""
    return DataFormat(
        name="prompts",
        shape=Shape.PROMPTS,
        convert="ftcore_data.prompts:convert",
        check="ftcore_data.prompts:check",
        sample=sample("prompts.jsonl"),
        sample_prompts=("What is 6 plus 7?",),
    )


def check(row: Row) -> str | None:
    """A prompt that ends with the user's words; the system's are told once."""
    column = first(row, COLUMNS)
    if column is None:
        return missing_all(row, COLUMNS)
    if isinstance(row[column], list):
        reason = check_messages(row[column], column, answered=False)
    else:
        reason = not_text(row, column)
    return reason or (check_system(row, row[column]) if _told(row) else None)


def convert(row: Row) -> dict[str, Any]:
    """The prompt as messages, after the words of a column `system`; every other column stays as it is."""
    column = next(c for c in COLUMNS if c in row)
    prompt = row[column]
    messages = plain_messages(prompt) if isinstance(prompt, list) else asked(prompt)
    messages = with_system(messages, row) if _told(row) else messages
    return {**{k: v for k, v in row.items() if k != column}, "prompt": messages}


def _told(row: Row) -> bool:
    """Whether `system` is what the model is told, and not something else that rewards read."""
    return isinstance(row.get("system"), str)
