"""Plain text as `text`: every token is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ftcore import DataConfig, DataFormat, Shape, hookimpl
from ftcore_data._rows import MEDIA, Row, missing, not_text, sample, unused


@dataclass
class Config(DataConfig):
    """The text format has no settings of its own."""


@hookimpl
def ftcore_data_format() -> DataFormat:
    """Shape `text`."""
    return DataFormat(
        name="text",
        shape=Shape.TEXT,
        convert="ftcore_data.text:convert",
        check="ftcore_data.text:check",
        sample=sample("text.jsonl"),
        columns=("text",),
    )


def check(row: Row) -> str | None:
    """Words in `text`. Blank lines of a .txt file are skipped when it is read, so they are no fault."""
    return missing(row, "text") or unused(row, *MEDIA) or not_text(row, "text")


def convert(row: Row) -> dict[str, Any]:
    """Already in shape."""
    return {"text": row["text"]}
