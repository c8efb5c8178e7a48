"""Conversations that call tools: `messages` with `tool_calls` and answers of role `tool`, and the `tools`."""

from __future__ import annotations

from dataclasses import dataclass

from ftcore import DataConfig, DataFormat, Shape, hookimpl
from ftcore_data import messages
from ftcore_data._rows import Row, missing, sample


@dataclass
class Config(DataConfig):
    """The tools format has no settings of its own."""


@hookimpl
def ftcore_data_format() -> DataFormat:
    """Shape `messages`, with the column `tools`."""
    return DataFormat(
        name="tools",
        shape=Shape.MESSAGES,
        convert="ftcore_data.messages:convert",
        check="ftcore_data.tools:check",
        sample=sample("tools.jsonl"),
        columns=(*messages.COLUMNS, "tools"),
        over={"messages": ("tools",)},
    )


def check(row: Row) -> str | None:
    """A conversation with its tools, or with none of them in rows that need none."""
    return missing(row, "tools") or messages.check(row)
