"""Prompts without answers: `prompt` as text or messages, or `question`; other columns go to the rewards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ftcore import DataConfig, DataFormat, Shape, hookimpl
from ftcore_data._messages import asked, check_messages, plain_messages
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
    """A prompt that ends with the user's words."""
    column = first(row, COLUMNS)
    if column is None:
        return missing_all(row, COLUMNS)
    if isinstance(row[column], list):
        return check_messages(row[column], column, answered=False)
    return not_text(row, column)


def convert(row: Row) -> dict[str, Any]:
    """The prompt as messages; every other column stays as it is."""
    column = next(c for c in COLUMNS if c in row)
    prompt = row[column]
    messages = plain_messages(prompt) if isinstance(prompt, list) else asked(prompt)
    return {**{k: v for k, v in row.items() if k != column}, "prompt": messages}
