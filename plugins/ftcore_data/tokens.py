"""Rows that are tokenized already: `input_ids`, and `labels` with -100 where nothing is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ftcore import DataConfig, DataFormat, Shape, hookimpl
from ftcore_data._rows import Row, kind, missing, sample

IGNORED = -100
MASKS = ("attention_mask", "completion_mask", "assistant_masks")
"""Columns that tell which tokens count, by their names in transformers and TRL."""


@dataclass
class Config(DataConfig):
    """The tokens format has no settings of its own."""


@hookimpl
def ftcore_data_format() -> DataFormat:
    """Shape `tokens`; the sample's ids are those of the byte-level tokenizer of tiny models."""
    return DataFormat(
        name="tokens",
        shape=Shape.TOKENS,
        convert="ftcore_data.tokens:convert",
        check="ftcore_data.tokens:check",
        sample=sample("tokens.jsonl"),
        columns=("input_ids", "labels"),
        over={"text": ("input_ids",), "messages": ("input_ids",)},
    )


def check(row: Row) -> str | None:
    """Ids are whole numbers from 0 on, and labels as many, each its id or -100."""
    if reason := missing(row, "input_ids"):
        return reason
    ids, labels = row["input_ids"], row.get("labels")
    for name, values, least in (("input_ids", ids, 0), ("labels", labels, IGNORED)):
        if values is None and name == "labels":
            return _masked(row, ids)
        if not isinstance(values, list) or not values:
            what = "empty" if values == [] else kind(values)
            return f"column '{name}' is {what}, not a list of token ids\ngive whole numbers, or take the row out"
        if any(not isinstance(value, int) or isinstance(value, bool) or value < least for value in values):
            return f"column '{name}' holds something else than token ids\ngive whole numbers from {least} on"
    if len(ids) != len(labels or ids):
        return (
            f"has {len(ids)} input_ids and {len(labels or ())} labels\ngive one label for each id, -100 to leave it out"
        )
    strange = next(
        (i for i, (t, label) in enumerate(zip(ids, labels or ids, strict=True)) if label not in (t, IGNORED)), None
    )
    if strange is not None:
        fix = "labels stand at their own ids: the model shifts them itself"
        return f"label {strange + 1} is neither its id nor -100\n{fix}"
    return _masked(row, labels or ids)


def _masked(row: Row, labels: list[int]) -> str | None:
    """The tokens that a mask leaves out are not trained."""
    for name in MASKS:
        mask = row.get(name)
        if isinstance(mask, list) and any(not m and label != IGNORED for m, label in zip(mask, labels, strict=False)):
            fix = "give labels, with -100 where nothing is trained, and take padding out"
            return f"column '{name}' leaves out tokens that would be trained\n{fix}"
    return None


def convert(row: Row) -> dict[str, Any]:
    """Ids and labels; without labels every token is trained."""
    return {"input_ids": row["input_ids"], "labels": row.get("labels") or row["input_ids"]}
