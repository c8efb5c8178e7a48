"""Conversations as ShareGPT has them: `conversations`: [{from, value}, ...]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ftcore import DataConfig, DataFormat, Shape, hookimpl
from ftcore_data._rows import Row, check_messages, missing, one_of, sample

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
}
"""Speaker names in the wild to roles."""
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
    )


def check(row: Row) -> str | None:
    """Known speakers, no empty turn, at least one answer."""
    if reason := missing(row, "conversations"):
        return reason
    turns = row["conversations"]
    for number, turn in enumerate(turns if isinstance(turns, list) else (), 1):
        if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
            return f"turn {number} is not an object with 'from' and 'value'\na turn looks like {TURN}"
        if str(turn["from"]) not in ROLES:
            return f"turn {number} has the unknown speaker {turn['from']!r}\n{one_of(turn['from'], ROLES)}"
    return check_messages(_messages(turns) if isinstance(turns, list) else turns, "conversations")


def convert(row: Row) -> dict[str, Any]:
    """Speakers become roles."""
    return {"messages": _messages(row["conversations"])}


def _messages(turns: list[Row]) -> list[dict[str, Any]]:
    return [{"role": ROLES[turn["from"]], "content": turn["value"]} for turn in turns]
