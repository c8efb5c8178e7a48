"""Instructions as Alpaca has them: `instruction`, optional `input`, `output`, and optional `system` and `history`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ftcore import DataConfig, DataFormat, Shape, hookimpl
from ftcore_data._rows import Row, missing, not_text, sample


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
    )


def check(row: Row) -> str | None:
    """An instruction and an output with words in them; the system message is text, and the history pairs of text."""
    if reason := missing(row, "instruction", "output") or not_text(row, "instruction") or not_text(row, "output"):
        return reason
    for column in ("input", "system"):
        if row.get(column) is not None and (reason := not_text(row, column, empty_ok=True)):
            return reason
    history = row.get("history") or []
    if not isinstance(history, list) or any(not isinstance(pair, list) or len(pair) != 2 for pair in history):
        return 'column \'history\' is not a list of [question, answer] pairs\nwrite it as [["question", "answer"], ...]'
    for number, pair in enumerate(history, 1):
        if not all(isinstance(text, str) and text.strip() for text in pair):
            fix = "put text in both, or take the pair out"
            return f"column 'history': pair {number} has a question or an answer that is empty or not text\n{fix}"
    return None


def convert(row: Row) -> dict[str, Any]:
    """The input follows the instruction after an empty line, both in the user's message."""
    messages = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    for question, answer in row.get("history") or []:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    asked = f"{row['instruction']}\n\n{row['input']}" if row.get("input") else row["instruction"]
    messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": row["output"]}]
    return {"messages": messages}
