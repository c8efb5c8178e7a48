"""Checks and conversions of conversations and of the tools that they call."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ftcore_data._rows import Row, kind, not_text, one_of

ROLES = ("system", "developer", "user", "assistant", "tool")
MESSAGE = '{"role": "user", "content": "..."}'

Message = dict[str, Any]


def check_messages(messages: Any, column: str = "messages", answered: bool = True, media: bool = False) -> str | None:
    """A list of {role, content} with known roles, words in each, and at least one answer where one is needed.

    :param media: parts may be images and recordings, which the row has columns for.
    """
    if not isinstance(messages, list):
        return f"column '{column}' is {kind(messages)}, not a list of messages\na message looks like {MESSAGE}"
    if not messages:
        return f"column '{column}' is an empty conversation\nput a question and an answer in, or take the row out"
    for number, message in enumerate(messages, 1):
        if reason := _check_message(message, number) or (None if media else _no_media(message, number)):
            return reason
    roles = [m["role"] for m in messages]
    if answered and not any(m["role"] == "assistant" and m.get("weight", 1) != 0 for m in messages):
        return "has no assistant message, so nothing would be trained\nadd the answer, or take the row out"
    if not answered and roles[-1] == "assistant":
        return "ends with an assistant message\na prompt ends with the user's: take the last message out"
    return None


def _check_message(message: Any, number: int) -> str | None:
    if not isinstance(message, dict) or "role" not in message:
        return f"message {number} is not an object with 'role' and 'content'\na message looks like {MESSAGE}"
    if message["role"] not in ROLES:
        return f"message {number} has the unknown role {message['role']!r}\n{one_of(message['role'], ROLES)}"
    if message.get("weight", 1) not in (None, 0, 1):
        return f"message {number} has the weight {message['weight']!r}\ngive 1 to train it, or 0 to read it only"
    content, calls = _as_text(message.get("content")), message.get("tool_calls")
    if reason := _check_calls(calls, number):
        return reason
    if calls and not content:
        return None
    if isinstance(content, list) and content and all(_is_part(part) for part in content):
        return None
    if not isinstance(content, str):
        what = kind(content)
        return f"message {number} ({message['role']}) has {what} as content, not text\nput text in, or take the row out"
    if not content.strip():
        return f"message {number} ({message['role']}) is empty\nput text in, or take the row out"
    return None


def _is_part(part: Any) -> bool:
    return isinstance(part, Mapping) and (isinstance(part.get("text"), str) or part.get("type") in ("image", "audio"))


def _no_media(message: Row, number: int) -> str | None:
    parts = message["content"] if isinstance(message.get("content"), list) else ()
    what = next((part["type"] for part in parts if part.get("type") in ("image", "audio")), None)
    return what and f"message {number} has an {what}, but the row has no column for it\nput it into '{what}s'"


def _check_calls(calls: Any, number: int) -> str | None:
    if not calls:
        return None
    fix = 'a call looks like {"type": "function", "function": {"name": "...", "arguments": {...}}}'
    for call in calls if isinstance(calls, list) else [calls]:
        named = call.get("function") or call if isinstance(call, Mapping) else None
        if not isinstance(named, Mapping) or not named.get("name") or not isinstance(calls, list):
            return f"message {number} has a tool call without a name\n{fix}"
        arguments = named.get("arguments")
        given = _json(arguments) if isinstance(arguments, str) else {} if arguments is None else arguments
        if not isinstance(given, Mapping):
            return f"message {number} calls {named['name']} with arguments that are no JSON object\n{fix}"
    return None


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def plain_messages(messages: Sequence[Row]) -> list[Message]:
    """Messages as every chat template takes them: with the keys that have a value, since `datasets` fills absent ones
    with None, with the arguments of tool calls as objects, and with parts that are all text as text."""
    made = [{key: value for key, value in message.items() if value is not None} for message in messages]
    made = [{key: _as_text(value) if key == "content" else value for key, value in m.items()} for m in made]
    return [_with_objects(message) if message.get("tool_calls") else message for message in made]


def _as_text(content: Any) -> Any:
    """Parts of OpenAI's form, a line each, as vLLM puts them together; anything else as it is."""
    parts = content if isinstance(content, list) and all(isinstance(part, Mapping) for part in content) else []
    texts = [part.get("text") for part in parts]
    alone = all(isinstance(text, str) for text in texts)
    return "\n".join(texts) if texts and alone else content


def with_system(messages: list[Message], row: Row) -> list[Message]:
    """The messages, after the words of a column `system`, where there are any."""
    return [{"role": "system", "content": row["system"]}, *messages] if (row.get("system") or "").strip() else messages


def check_system(row: Row, messages: Any) -> str | None:
    """The column is text, and the messages have no other system message than it."""
    if row.get("system") is None:
        return None
    if reason := not_text(row, "system", empty_ok=True):
        return reason
    first = messages[0] if isinstance(messages, list) and messages else None
    if row["system"].strip() and isinstance(first, dict) and "system" in (first.get("role"), first.get("from")):
        return "has a column 'system', and a system message as well\ntake one of them out"
    return None


def _with_objects(message: Message) -> Message:
    calls = []
    for call in message["tool_calls"]:
        function = dict(call.get("function") or {"name": call.get("name"), "arguments": call.get("arguments")})
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            function["arguments"] = json.loads(arguments)
        elif arguments is None:  # a call of nothing: templates would write null
            function["arguments"] = {}
        rest = {key: value for key, value in call.items() if key not in ("name", "arguments", "function")}
        calls.append({"type": "function", **rest, "function": function})
    return {"content": "", **message, "tool_calls": calls}  # some templates ask for the words even where there are none


def tools_of(row: Row) -> Any:
    """The row's tools, each as {"type": "function", ...}; many data sets keep them as JSON text."""
    tools = row.get("tools")
    tools = json.loads(tools.strip() or "[]") if isinstance(tools, str) else tools
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools or ()]


def check_tools(row: Row) -> str | None:
    """Tools are a list of objects, or the JSON text of one."""
    fix = 'write the tools as [{"type": "function", "function": {...}}, ...], or take the column out'
    tools = row.get("tools")
    try:
        tools = json.loads(tools.strip() or "[]") if isinstance(tools, str) else tools
    except (ValueError, RecursionError) as error:
        return f"column 'tools' is text that is not JSON: {error}\n{fix}"
    if tools and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        return f"column 'tools' is not a list of objects\n{fix}"
    for tool in tools or ():
        function = tool.get("function", tool)
        if not (isinstance(function, dict) and function.get("name")):
            return f"column 'tools' has a tool without a name\n{fix}"
    return None


def with_tools(messages: list[Message], row: Row) -> dict[str, Any]:
    """The columns of shape `messages`."""
    tools = tools_of(row)
    return {"messages": messages, **({"tools": tools} if tools else {})}


def asked(text: str) -> list[Message]:
    """A prompt as a conversation."""
    return [{"role": "user", "content": text}]


def answered(text: str) -> list[Message]:
    """An answer as a conversation."""
    return [{"role": "assistant", "content": text}]
