"""Texts, or pairs of texts, with the class that they belong to: `text` and `label`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import chain
from typing import Any

from ftcore import DataConfig, DataFormat, Shape, hookimpl
from ftcore_data._rows import MEDIA, Row, first, first_pair, kind, missing, missing_all, not_text, sample, unused

TEXTS = ("text", "sentence")
PAIRS = (("premise", "hypothesis"), ("sentence1", "sentence2"))


@dataclass
class Config(DataConfig):
    """The labels format has no settings of its own."""


@hookimpl
def ftcore_data_format() -> DataFormat:
    """Shape `labels`."""
    return DataFormat(
        name="labels",
        shape=Shape.LABELS,
        convert="ftcore_data.labels:convert",
        check="ftcore_data.labels:check",
        sample=sample("labels.jsonl"),
        columns=(*TEXTS, *chain(*PAIRS), "label"),
        over={"text": ("label",)},
    )


def check(row: Row) -> str | None:
    """Words, and a label: a name, a number, true or false, or a list of them where several hold."""
    names = first_pair(row, PAIRS) or tuple(filter(None, [first(row, TEXTS)]))
    if not names:
        return missing_all(row, TEXTS[:1])
    if reason := missing(row, "label") or unused(row, *MEDIA):
        return reason
    if reason := next(filter(None, (not_text(row, name) for name in names)), None):
        return reason
    label = row["label"]
    for one in label if isinstance(label, list) else [label]:
        nothing = isinstance(one, str) and not one.strip()
        unreal = isinstance(one, float) and not math.isfinite(one)
        if not isinstance(one, (str, int, float)) or nothing or unreal:
            fix = "give the name or the number of the class, or take the row out"
            return f"column 'label' is {'empty' if one == '' else one if unreal else kind(one)}, not a class\n{fix}"
    return None


def convert(row: Row) -> dict[str, Any]:
    """`text`, `text_pair` where there are two, and `label` as it is."""
    pair = first_pair(row, PAIRS)
    if pair:
        return {"text": row[pair[0]], "text_pair": row[pair[1]], "label": row["label"]}
    column = first(row, TEXTS)
    assert column is not None
    return {"text": row[column], "label": row["label"]}
