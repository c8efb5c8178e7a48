"""Kinds of rows, and how a data format reads its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


class Shape:
    """Data set shapes, named as TRL names them. An open set: any string is a shape, so third parties add their own."""

    TEXT = "text"
    MESSAGES = "messages"
    PROMPT_COMPLETION = "prompt_completion"
    PROMPTS = "prompts"
    PREFERENCE = "preference"
    UNPAIRED = "unpaired"
    STEPWISE = "stepwise"
    IMAGES = "images"
    AUDIO = "audio"
    CODES = "codes"
    LABELS = "labels"
    PAIRS = "pairs"
    TOKENS = "tokens"


@dataclass(frozen=True, slots=True, kw_only=True)
class DataFormat:
    """How raw rows look and what they become: the answer of a data plugin."""

    name: str
    shape: str
    convert: str
    """`package.module:function`, called with one row; returns the columns of the shape."""
    check: str
    """`package.module:function`, called with one row; returns why the row is bad, or None."""
    sample: str
    """Shipped rows, a path."""
    sample_eval: str | None = None
    """Shipped held-out rows, a path."""
    sample_prompts: tuple[str, ...] = ()
    """Prompts, none of them a training row, answered before and after training on the sample."""
    over: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """More general formats that the rows fit as well, and the columns that say that they are of this one: a row with
    `prompt` and `chosen` is no row of `prompts`."""
    made: bool = False
    """Without a `data.path` the plugin makes as many rows as it is asked for; `sample` shows what they look like."""
    columns: tuple[str, ...] = ()
    """All columns that it reads, for `data.columns`; empty where others are used as well, or for no check."""
    media: tuple[str, ...] = ()
    """Columns that name files; a relative path is one beside the file with the rows."""
    opens: str | None = None
    """`package.module:function`, called with the path or the bytes of each of those files; returns why it cannot be
    read, or None."""
