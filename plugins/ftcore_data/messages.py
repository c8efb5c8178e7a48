"""Conversations as `messages`: [{role, content}, ...], the form of OpenAI and of chat templates."""

from __future__ import annotations

import json
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
    """Known roles, no empty turn, at least one answer; tools as a list, or as the JSON text of one."""
    return missing(row, "messages") or check_messages(row["messages"]) or _check_tools(row)


def convert(row: Row) -> dict[str, Any]:
    """Already in shape; null keys that `datasets` adds go."""
    tools = _tools(row)
    return {"messages": plain_messages(row["messages"]), **({"tools": tools} if tools else {})}


def _tools(row: Row) -> Any:
    """The row's tools; many data sets keep them as JSON text, since their parameters differ."""
    tools = row.get("tools")
    return json.loads(tools.strip() or "[]") if isinstance(tools, str) else tools


def _check_tools(row: Row) -> str | None:
    fix = 'write the tools as [{"type": "function", "function": {...}}, ...], or take the column out'
    try:
        tools = _tools(row)
    except (ValueError, RecursionError) as error:
        return f"column 'tools' is text that is not JSON: {error}\n{fix}"
    if tools and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        return f"column 'tools' is not a list of objects\n{fix}"
    return None
