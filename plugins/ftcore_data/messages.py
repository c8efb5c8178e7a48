"""Conversations as `messages`: [{role, content}, ...], the form of OpenAI and of chat templates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ftcore import DataConfig, DataFormat, Shape, hookimpl
from ftcore_data._messages import (
    check_messages,
    check_system,
    check_tools,
    plain_messages,
    with_system,
    with_tools,
)
from ftcore_data._rows import MEDIA, NO_COLUMN, Row, first, missing, sample, unused

COLUMNS = ("messages", "conversations", "conversation")


@dataclass
class Config(DataConfig):
    """The messages format has no settings of its own."""


@hookimpl
def ftcore_data_format() -> DataFormat:
    """Shape `messages`; the sample teaches a house style of short answers."""
    return DataFormat(
        name="messages",
        shape=Shape.MESSAGES,
        convert="ftcore_data.messages:convert",
        check="ftcore_data.messages:check",
        sample=sample("messages.jsonl"),
        columns=(*COLUMNS, "system", "tools"),
        sample_eval=sample("messages.eval.jsonl"),
        sample_prompts=("Why does a rainbow have colours?",),
    )


def check(row: Row) -> str | None:
    """Known roles, no empty turn, at least one answer; tools as a list, or as the JSON text of one."""
    column = first(row, COLUMNS)
    if column is None:
        return missing(row, COLUMNS[0])
    if _of_sharegpt(row[column]):
        return f"{NO_COLUMN} of messages: '{column}' has turns of {{from, value}}\nname the format with data=sharegpt"
    reason = unused(row, *MEDIA) or check_messages(row[column], column) or check_tools(row)
    return reason or check_system(row, row[column])


def convert(row: Row) -> dict[str, Any]:
    """Already in shape, but for a column `system`; null keys that `datasets` adds go."""
    column = first(row, COLUMNS)
    assert column is not None
    return with_tools(with_system(plain_messages(row[column]), row), row)


def _of_sharegpt(turns: Any) -> bool:
    turn = turns[0] if isinstance(turns, list) and turns else None
    return isinstance(turn, dict) and "from" in turn and "role" not in turn
