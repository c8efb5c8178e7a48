"""Instructions as Alpaca and Dolly have them: `instruction`, `output`, and perhaps `input`, `system` and `history`.

Dolly's names for input and output are `context` and `response`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ftcore import DataConfig, DataFormat, Shape, hookimpl
from ftcore_data._messages import Message, answered, asked, with_system
from ftcore_data._rows import MEDIA, Row, first, missing, not_text, sample, unused

OUTPUTS = ("output", "response")
INPUTS = ("input", "context")


@dataclass
class Config(DataConfig):
    """The Alpaca format has no settings of its own."""


@hookimpl
def ftcore_data_format() -> DataFormat:
    """Shape `messages`: the model's own chat template is used, not Alpaca's prompt text."""
    return DataFormat(
        name="alpaca",
        shape=Shape.MESSAGES,
        convert="ftcore_data.alpaca:convert",
        check="ftcore_data.alpaca:check",
        sample=sample("alpaca.jsonl"),
        columns=("instruction", *INPUTS, *OUTPUTS, "system", "history"),
    )


def check(row: Row) -> str | None:
    """An instruction and an output with words in them; the system message is text, and the history pairs of text."""
    output = first(row, OUTPUTS) or OUTPUTS[0]
    if reason := missing(row, "instruction", output) or unused(row, *MEDIA, "tools"):
        return reason
    return check_prompt(row) or not_text(row, output)


def check_prompt(row: Row) -> str | None:
    """All but the output."""
    if reason := not_text(row, "instruction"):
        return reason
    for column in (*INPUTS, "system"):
        if row.get(column) is not None and (reason := not_text(row, column, empty_ok=True)):
            return reason
    if all((row.get(column) or "").strip() for column in INPUTS):
        return "has a column 'input', and a column 'context' as well\ntake one of them out"
    history = row.get("history") or []
    if not isinstance(history, list) or any(not isinstance(pair, list) or len(pair) != 2 for pair in history):
        return 'column \'history\' is not a list of [question, answer] pairs\nwrite it as [["question", "answer"], ...]'
    for number, pair in enumerate(history, 1):
        if not all(isinstance(text, str) and text.strip() for text in pair):
            fix = "put text in both, or take the pair out"
            return f"column 'history': pair {number} has a question or an answer that is empty or not text\n{fix}"
    return None


def convert(row: Row) -> dict[str, Any]:
    """The prompt, and the output as its answer."""
    output = next(name for name in OUTPUTS if row.get(name) is not None)
    return {"messages": prompt(row) + answered(row[output])}


def prompt(row: Row) -> list[Message]:
    """The input follows the instruction after an empty line, both in the user's message."""
    messages = with_system([], row)
    for question, answer in row.get("history") or []:
        messages += asked(question) + answered(answer)
    given = next((row[name] for name in INPUTS if (row.get(name) or "").strip()), "")
    return messages + asked(f"{row['instruction']}\n\n{given}" if given else row["instruction"])
