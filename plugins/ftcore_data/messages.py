"""Conversations as `messages`: [{role, content}, ...], the form of OpenAI and of chat templates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ftcore import DataConfig, DataFormat, Shape, hookimpl
from ftcore_data._rows import Row, check_messages, missing, plain_messages, sample


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
        sample_eval=sample("messages.eval.jsonl"),
        sample_prompts=("Why does a rainbow have colours?",),
    )


def check(row: Row) -> str | None:
    """Known roles, no empty turn, at least one answer."""
    return missing(row, "messages") or check_messages(row["messages"])


def convert(row: Row) -> dict[str, Any]:
    """Already in shape; null keys that `datasets` adds go."""
    tools = {"tools": row["tools"]} if row.get("tools") else {}
    return {"messages": plain_messages(row["messages"]), **tools}
