"""Checks and conversions that formats of conversations share.

A check returns why a row is bad, or None; a second line, where there is one, says what to do about it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ftcore.catalog import nearest

ROLES = ("system", "developer", "user", "assistant", "tool")
MESSAGE = '{"role": "user", "content": "..."}'
NO_COLUMN = "has no column"
"""How every reason begins that says a row is of another format, rather than a bad one of this."""

Row = Mapping[str, Any]
Message = dict[str, Any]


def sample(name: str) -> str:
    """Path of shipped rows."""
    return str(Path(__file__).parent / "samples" / name)


def missing(row: Row, *columns: str) -> str | None:
    """The first column that is absent."""
    absent = next((c for c in columns if c not in row), None)
    if absent is None:
        return None
    near = nearest(absent, row)
    fix = f"rename '{near}' to '{absent}'" if near else "rename the column, or name the format that fits with data=NAME"
    return f"{NO_COLUMN} '{absent}' (it has {', '.join(row) or 'none'})\n{fix}"


def not_text(row: Row, column: str, empty_ok: bool = False) -> str | None:
    """The column holds no words."""
    value = row.get(column)
    if not isinstance(value, str):
        return f"column '{column}' is {_name(value)}, not text\nput text in '{column}', or take the row out"
    return (
        None
        if value.strip() or empty_ok
        else f"column '{column}' is empty\nput text in '{column}', or take the row out"
    )


def check_messages(messages: Any, column: str = "messages", answered: bool = True) -> str | None:
    """A list of {role, content} with known roles, words in each, and at least one answer where one is needed."""
    if not isinstance(messages, list):
        return f"column '{column}' is {_name(messages)}, not a list of messages\na message looks like {MESSAGE}"
    if not messages:
        return f"column '{column}' is an empty conversation\nput a question and an answer in, or take the row out"
    for number, message in enumerate(messages, 1):
        if reason := _check_message(message, number):
            return reason
    roles = [m["role"] for m in messages]
    if answered and "assistant" not in roles:
        return "has no assistant message, so nothing would be trained\nadd the answer, or take the row out"
    if not answered and roles[-1] == "assistant":
        return "ends with an assistant message\na prompt ends with the user's: take the last message out"
    return None


def _check_message(message: Any, number: int) -> str | None:
    if not isinstance(message, dict) or "role" not in message:
        return f"message {number} is not an object with 'role' and 'content'\na message looks like {MESSAGE}"
    if message["role"] not in ROLES:
        return f"message {number} has the unknown role {message['role']!r}\n{one_of(message['role'], ROLES)}"
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return None
    if not isinstance(content, str):
        what = _name(content)
        return f"message {number} ({message['role']}) has {what} as content, not text\nput text in, or take the row out"
    if not content.strip():
        return f"message {number} ({message['role']}) is empty\nput text in, or take the row out"
    return None


def one_of(word: object, known: Iterable[str]) -> str:
    """The fix for a word that is not known."""
    near = nearest(str(word), known)
    return f"did you mean '{near}'?" if near else f"known: {', '.join(known)}"


def plain_messages(messages: Sequence[Row]) -> list[Message]:
    """Messages with the keys that have a value: `datasets` fills absent ones with None."""
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


def _name(value: Any) -> str:
    names = {"NoneType": "null", "str": "text", "dict": "an object", "list": "a list", "bool": "true or false"}
    names |= {"int": "a number", "float": "a number"}
    return names.get(type(value).__name__, f"a {type(value).__name__}")
