"""Conversations as ShareGPT has them: `conversations`: [{from, value}, ...], optional `system` and `tools`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from ftcore import DataConfig, DataFormat, Shape, hookimpl
from ftcore_data._messages import (
    Message,
    check_messages,
    check_system,
    check_tools,
    plain_messages,
    with_system,
    with_tools,
)
from ftcore_data._rows import MEDIA, Row, first, missing, one_of, sample, unused

COLUMNS = ("conversations", "conversation")
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_call": "assistant",
}
"""Speaker names in the wild to roles."""
CALL = "function_call"
TURN = '{"from": "human", "value": "..."}'


@dataclass
class Config(DataConfig):
    """The ShareGPT format has no settings of its own."""


@hookimpl
def ftcore_data_format() -> DataFormat:
    """Shape `messages`."""
    return DataFormat(
        name="sharegpt",
        shape=Shape.MESSAGES,
        convert="ftcore_data.sharegpt:convert",
        check="ftcore_data.sharegpt:check",
        sample=sample("sharegpt.jsonl"),
        columns=(*COLUMNS, "system", "tools"),
    )


def check(row: Row) -> str | None:
    """Known speakers, no empty turn, at least one answer."""
    column = first(row, COLUMNS)
    if column is None:
        return missing(row, COLUMNS[0])
    if reason := unused(row, *MEDIA, "chosen", "rejected"):
        return reason
    if reason := check_system(row, row[column]):
        return reason
    return check_turns(row[column]) or check_messages(_checkable(row[column]), column) or check_tools(row)


def check_turns(turns: Any) -> str | None:
    """Each turn has a known speaker, and each call of a function is one."""
    for number, turn in enumerate(turns if isinstance(turns, list) else (), 1):
        if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
            return f"turn {number} is not an object with 'from' and 'value'\na turn looks like {TURN}"
        if str(turn["from"]) not in ROLES:
            return f"turn {number} has the unknown speaker {turn['from']!r}\n{one_of(turn['from'], ROLES)}"
        if turn["from"] == CALL and _calls(turn["value"]) is None:
            fix = 'a call looks like {"name": "...", "arguments": {...}}'
            return f"turn {number} is a call of a function, but its value is no JSON of one\n{fix}"
    return None


def convert(row: Row) -> dict[str, Any]:
    """Speakers become roles, calls of functions `tool_calls`."""
    column = first(row, COLUMNS)
    assert column is not None
    return with_tools(with_system(to_messages(row[column]), row), row)


def to_messages(turns: list[Row]) -> list[Message]:
    """Turns as messages."""
    return plain_messages([_message(turn) for turn in turns])


def _message(turn: Row) -> Message:
    weight = {} if turn.get("weight") is None else {"weight": turn["weight"]}
    if turn["from"] == CALL:
        return {"role": "assistant", "tool_calls": _calls(turn["value"]), **weight}
    return {"role": ROLES[turn["from"]], "content": turn["value"], **weight}


def _checkable(turns: Any) -> Any:
    return to_messages(turns) if isinstance(turns, list) else turns


def _calls(value: Any) -> list[dict[str, Any]] | None:
    try:
        calls = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return None
    calls = calls if isinstance(calls, list) else [calls]
    good = calls and all(isinstance(c, dict) and c.get("name") and _arguments(c) is not None for c in calls)
    return [{"name": c["name"], "arguments": _arguments(c)} for c in calls] if good else None


def _arguments(call: dict[str, Any]) -> dict[str, Any] | None:
    arguments = call.get("arguments", {})
    try:
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        return None
    return arguments if isinstance(arguments, dict) else None
