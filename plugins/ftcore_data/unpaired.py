"""An answer and whether it is wanted, as KTO takes them: `prompt`, `completion` or `messages`, and `label`."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import Any

from ftcore import DataConfig, DataFormat, Shape, hookimpl
from ftcore_data import prompt_completion
from ftcore_data._messages import (
    answered,
    asked,
    check_messages,
    check_system,
    check_tools,
    plain_messages,
    tools_of,
    with_system,
)
from ftcore_data._rows import MEDIA, Row, first_pair, kind, missing, sample, truth, unused


@dataclass
class Config(DataConfig):
    """The unpaired format has no settings of its own."""


@hookimpl
def ftcore_data_format() -> DataFormat:
    """Shape `unpaired`."""
    return DataFormat(
        name="unpaired",
        shape=Shape.UNPAIRED,
        convert="ftcore_data.unpaired:convert",
        check="ftcore_data.unpaired:check",
        sample=sample("unpaired.jsonl"),
        columns=tuple(dict.fromkeys(("messages", *chain(*prompt_completion.PAIRS), "label", "system", "tools"))),
        over={"prompts": ("label",), "prompt_completion": ("label",), "messages": ("label",)},
    )


def check(row: Row) -> str | None:
    """A conversation that ends with an answer, and true or false."""
    if "messages" in row:
        reason = missing(row, "label") or unused(row, *MEDIA) or check_messages(row["messages"])
        if reason := reason or check_system(row, row["messages"]) or check_tools(row):
            return reason
        if row["messages"][-1]["role"] != "assistant" or len(row["messages"]) < 2:
            return "does not end with the assistant's answer to something\ntake what follows it out"
    elif reason := prompt_completion.check(row) or missing(row, "label"):
        return reason
    if truth(row["label"]) is None:
        fix = "write true for a wanted answer and false for an unwanted one, or name the format with data=NAME"
        return f"column 'label' is {kind(row['label'])} ({row['label']!r}), not true or false\n{fix}"
    return None


def convert(row: Row) -> dict[str, Any]:
    """Prompt and completion as messages, and the label."""
    label, tools = truth(row["label"]), tools_of(row)
    if "messages" in row:
        messages = with_system(plain_messages(row["messages"]), row)
        prompt, completion = messages[:-1], messages[-1:]
    else:
        pair = first_pair(row, prompt_completion.PAIRS)
        assert pair is not None
        texts = isinstance(row[pair[0]], str)
        prompt = asked(row[pair[0]]) if texts else plain_messages(row[pair[0]])
        completion = answered(row[pair[1]]) if texts else plain_messages(row[pair[1]])
    return {"prompt": prompt, "completion": completion, "label": label, **({"tools": tools} if tools else {})}
