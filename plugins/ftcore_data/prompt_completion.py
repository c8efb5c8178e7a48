"""A prompt and its completion, both text or both messages: only the completion is trained."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import Any

from ftcore import DataConfig, DataFormat, Shape, hookimpl
from ftcore_data._messages import check_messages, check_tools, plain_messages, tools_of
from ftcore_data._rows import MEDIA, UNUSED, Row, first_pair, kind, missing_all, not_text, sample, unused

PAIRS = (("prompt", "completion"), ("prompt", "response"), ("question", "answer"), ("input", "output"))


@dataclass
class Config(DataConfig):
    """The prompt-completion format has no settings of its own."""


@hookimpl
def ftcore_data_format() -> DataFormat:
    """Shape `prompt_completion`: text goes to the model as it is, messages through the chat template."""
    return DataFormat(
        name="prompt_completion",
        shape=Shape.PROMPT_COMPLETION,
        convert="ftcore_data.prompt_completion:convert",
        check="ftcore_data.prompt_completion:check",
        sample=sample("prompt_completion.jsonl"),
        columns=tuple(dict.fromkeys((*chain(*PAIRS), "tools"))),
        over={"prompts": ("completion",)},
    )


def check(row: Row) -> str | None:
    """A prompt that ends with the user's words, and a completion that begins with the assistant's."""
    pair = first_pair(row, PAIRS)
    if pair is None:
        return missing_all(row, ("prompt", "completion"))
    if reason := unused(row, *MEDIA, "instruction", "system", "history"):
        return reason
    if row.get("context"):
        columns = f"data.columns.instruction={pair[0]} data.columns.output={pair[1]}"
        fix = f"take it out, or put it behind what is asked: data=alpaca {columns}"
        return f"{UNUSED} 'context' that rows of this format do not use\n{fix}"
    prompt, completion = (row[name] for name in pair)
    if isinstance(prompt, list) != isinstance(completion, list):
        message = f"column '{pair[0]}' is {kind(prompt)}, but column '{pair[1]}' is {kind(completion)}"
        return f"{message}\ngive text in both, or messages in both"
    if not isinstance(prompt, list):
        return unused(row, "tools") or not_text(row, pair[0]) or not_text(row, pair[1])
    if reason := check_messages(prompt, pair[0], answered=False) or check_messages(completion, pair[1]):
        return reason
    if completion[0]["role"] != "assistant":
        return f"column '{pair[1]}' does not begin with the assistant\nput what is asked into '{pair[0]}'"
    return check_tools(row)


def convert(row: Row) -> dict[str, Any]:
    """The two columns, by their usual names."""
    pair = first_pair(row, PAIRS)
    assert pair is not None
    prompt, completion = (row[name] for name in pair)
    if not isinstance(prompt, list):
        return {"prompt": prompt, "completion": completion}
    tools = tools_of(row)
    made = {"prompt": plain_messages(prompt), "completion": plain_messages(completion)}
    return {**made, **({"tools": tools} if tools else {})}
