"""Pairs of texts that belong together, for embeddings: `anchor` and `positive`, or two sentences with a `score`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import chain
from typing import Any

from ftcore import DataConfig, DataFormat, Shape, hookimpl
from ftcore_data._rows import Row, first_pair, kind, missing_all, not_text, sample, unused

ALIKE = (("anchor", "positive"), ("query", "positive"), ("query", "document"), ("query", "passage"))
SCORED = (("sentence1", "sentence2"), ("premise", "hypothesis"))
SCORES = ("score", "label")


@dataclass
class Config(DataConfig):
    """The pairs format has no settings of its own."""


@hookimpl
def ftcore_data_format() -> DataFormat:
    """Shape `pairs`: `anchor`, `positive` and perhaps `negative`, or `sentence1`, `sentence2` and `score`."""
    return DataFormat(
        name="pairs",
        shape=Shape.PAIRS,
        convert="ftcore_data.pairs:convert",
        check="ftcore_data.pairs:check",
        sample=sample("pairs.jsonl"),
        columns=tuple(dict.fromkeys((*chain(*ALIKE, *SCORED), "negative", *SCORES))),
    )


def check(row: Row) -> str | None:
    """Words in both, in the negative where there is one, and a number as the score."""
    pair = first_pair(row, ALIKE + SCORED)
    if pair is None:
        return missing_all(row, ALIKE[0])
    names = [*pair, *(["negative"] if row.get("negative") is not None else [])]
    if reason := next(filter(None, (not_text(row, name) for name in names)), None):
        return reason
    if pair in ALIKE:
        return unused(row, *SCORES)  # it may say that they are not alike
    score = _score(row)
    if score is None or not math.isfinite(score):
        column = next((name for name in SCORES if name in row), None)
        if column is None:
            return missing_all(row, SCORES)
        return f"column '{column}' is {kind(row[column])}, not a number\ngive how alike the two are, such as 0.8"
    return None


def convert(row: Row) -> dict[str, Any]:
    """The columns by their usual names."""
    pair = first_pair(row, ALIKE + SCORED)
    assert pair is not None
    one, other = (row[name] for name in pair)
    if pair in SCORED:
        return {"sentence1": one, "sentence2": other, "score": _score(row)}
    negative = row.get("negative")
    return {"anchor": one, "positive": other, **({} if negative is None else {"negative": negative})}


def _score(row: Row) -> float | None:
    value = next((row[name] for name in SCORES if row.get(name) is not None), None)
    try:
        return float(value) if isinstance(value, (int, float, str)) else None
    except ValueError:
        return None
