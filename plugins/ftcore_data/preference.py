"""A chosen and a rejected answer to a prompt, which is a column of its own or the turns that both begin with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ftcore import DataConfig, DataFormat, Shape, hookimpl
from ftcore_data import alpaca, sharegpt
from ftcore_data._messages import (
    Message,
    answered,
    asked,
    check_messages,
    check_system,
    check_tools,
    plain_messages,
    tools_of,
    with_system,
)
from ftcore_data._rows import MEDIA, UNUSED, Row, first, kind, missing, not_text, sample, unused

PROMPTS = ("prompt", "question", "instruction", "conversations")
BOTH = ("chosen", "rejected")


@dataclass
class Config(DataConfig):
    """The preference format has no settings of its own."""


@hookimpl
def ftcore_data_format() -> DataFormat:
    """Shape `preference`: conversations, unless the rows are whole texts without a prompt column."""
    return DataFormat(
        name="preference",
        shape=Shape.PREFERENCE,
        convert="ftcore_data.preference:convert",
        check="ftcore_data.preference:check",
        sample=sample("preference.jsonl"),
        columns=(*PROMPTS, *BOTH, "system", "tools", *alpaca.INPUTS, "history"),
        over={"prompts": BOTH, "prompt_completion": BOTH, "alpaca": BOTH, "sharegpt": BOTH, "messages": BOTH},
    )


def check(row: Row) -> str | None:
    """Both answers are there and differ; the prompt, where it is a column, ends with the user's words."""
    column = first(row, PROMPTS)
    if reason := missing(row, *BOTH) or unused(row, *MEDIA) or _unused(row, column):
        return reason
    if type(row["chosen"]) is not type(row["rejected"]):
        message = f"column 'chosen' is {kind(row['chosen'])}, but column 'rejected' is {kind(row['rejected'])}"
        return f"{message}\ngive both in one form"
    if reason := _check_prompt(row, column) or next(filter(None, (_check_answer(row, name) for name in BOTH)), None):
        return reason
    if row["chosen"] == row["rejected"]:
        return "has the same answer as chosen and as rejected, so it prefers nothing\ntake the row out"
    if column is None and isinstance(row["chosen"], list) and not _shared(row):
        return "has no prompt: chosen and rejected begin otherwise\nput what is asked into a column 'prompt'"
    if column is not None and _tell_all(row) and not _begin_with(row, column):
        message = f"'chosen' and 'rejected' begin neither with the assistant nor with what '{column}' says"
        return f"{message}\ngive the answers alone, or take the column '{column}' out"
    if reason := _no_answers(row, column):
        return reason
    told = row["chosen"] if column is None or _tell_all(row) else row[column]
    return check_system(row, told) or check_tools(row)


def convert(row: Row) -> dict[str, Any]:
    """Prompt, chosen and rejected as messages; whole texts without a prompt column stay texts."""
    column, tools = first(row, PROMPTS), tools_of(row)
    if column is None and isinstance(row["chosen"], str):
        return {name: row[name] for name in BOTH}
    made = {name: _answer(row[name]) for name in BOTH}
    prompt = _prompt(row, column)
    if column is None or _tell_all(row):
        shared = _shared(row)
        asked_before = made["chosen"][:shared]
        prompt = asked_before if _told(asked_before) else [*_told(prompt), *asked_before]
        made = {name: answer[shared:] for name, answer in made.items()}
    return {"prompt": prompt, **made, **({"tools": tools} if tools else {})}


def _unused(row: Row, column: str | None) -> str | None:
    """What a prompt of this kind does not tell; whole texts tell everything themselves."""
    if column is None and isinstance(row["chosen"], str):
        name = next((name for name in alpaca.INPUTS if row.get(name)), None)
        return (
            name and f"{UNUSED} '{name}', but no prompt\nif it is the prompt, set data.columns.prompt={name}"
        ) or unused(row, "system", "tools", "history")
    return None if column == "instruction" else unused(row, "context", "history")


def _no_answers(row: Row, column: str | None) -> str | None:
    """Answers are the assistant's from where they differ to their end."""
    if not isinstance(row["chosen"], list):
        return None
    told = _shared(row) if column is None or _tell_all(row) else 0
    for name in BOTH:
        if row[name][told]["role"] != "assistant":
            return f"'{name}' goes on with a message that is no answer\nask both the same"
        if row[name][-1]["role"] != "assistant":
            return f"'{name}' does not end with the assistant's answer\ntake what follows it out"
    return None


def _check_prompt(row: Row, column: str | None) -> str | None:
    if column is None:
        return None
    if column == "instruction":
        return alpaca.check_prompt(row)
    if column == "conversations":
        turns = row[column]
        return sharegpt.check_turns(turns) or check_messages(
            sharegpt.to_messages(turns) if isinstance(turns, list) else turns, column, answered=False
        )
    if isinstance(row[column], list):
        return check_messages(row[column], column, answered=False)
    return not_text(row, column) or (not_text(row, "system", empty_ok=True) if row.get("system") is not None else None)


def _check_answer(row: Row, column: str) -> str | None:
    value = row[column]
    if isinstance(value, dict):
        return _CHECKS["from" if "from" in value else "role"]([value], column)
    return check_messages(value, column) if isinstance(value, list) else not_text(row, column)


_CHECKS: dict[str, Callable[[list[Any], str], str | None]] = {
    "from": lambda turns, column: sharegpt.check_turns(turns) or check_messages(sharegpt.to_messages(turns), column),
    "role": check_messages,
}


def _prompt(row: Row, column: str | None) -> list[Message]:
    if column == "instruction":
        return alpaca.prompt(row)
    if column is None:
        messages = []
    elif column == "conversations":
        messages = sharegpt.to_messages(row[column])
    else:
        messages = plain_messages(row[column]) if isinstance(row[column], list) else asked(row[column])
    return with_system(messages, row)


def _tell_all(row: Row) -> bool:
    """Whether the answers are whole conversations, of which a column with the prompt is the beginning once more."""
    answers = [row[name] for name in BOTH if isinstance(row[name], list)]
    return any(answer[0].get("role") != "assistant" for answer in answers)


def _begin_with(row: Row, column: str) -> bool:
    """Whether both answers begin with what the column says."""
    said = [message for message in _prompt(row, column) if message["role"] != "system"]
    before = [m for m in plain_messages(row["chosen"])[: _shared(row)] if m["role"] != "system"]
    return list(map(_words, said)) == list(map(_words, before[: len(said)]))


def _words(message: Message) -> tuple[str, Any]:
    content = message.get("content")
    return message["role"], content.strip() if isinstance(content, str) else content


def _told(messages: list[Message]) -> list[Message]:
    """The system message that a conversation begins with."""
    return [message for message in messages[:1] if message["role"] == "system"]


def _answer(value: Any) -> list[Message]:
    if isinstance(value, str):
        return answered(value)
    if isinstance(value, dict):
        return sharegpt.to_messages([value]) if "from" in value else plain_messages([value])
    return plain_messages(value)


def _shared(row: Row) -> int:
    """How many turns both conversations begin with, the last answer of either left out."""
    both = [plain_messages(row[name]) for name in BOTH]
    pairs = zip(both[0][:-1], both[1][:-1], strict=False)
    return next((i for i, (one, other) in enumerate(pairs) if one != other), min(map(len, both)) - 1)
