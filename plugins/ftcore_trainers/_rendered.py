"""Rows that TRL tokenizes are tried on the chat template before any weight is read, so that none stops a run later."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Mapping
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from ftcore import Refused, hookimpl

if TYPE_CHECKING:
    from datasets import DatasetDict
    from transformers import PreTrainedTokenizerBase

TRIED = 1000
"""Rows of each split."""
ANSWERS = ("chosen", "rejected", "completion")


@hookimpl(wrapper=True)
def ftcore_format_dataset(tokenizer: PreTrainedTokenizerBase) -> Generator[None, DatasetDict, DatasetDict]:
    """Raises Refused for a conversation that the template does not take, or of which it leaves words out."""
    splits = yield
    try_rows(splits, lambda row: _try(row, tokenizer))
    return splits


def try_rows(splits: DatasetDict, attempt: Callable[[Mapping[str, Any]], None]) -> None:
    """Make the attempt on the first rows of each split; what it raises of `data` is said of its row."""
    for name, rows in splits.items():
        for number, row in enumerate(islice(rows, TRIED), 1):
            try:
                attempt(row)
            except Refused as refused:
                place = f"row {number} of the {name} split"
                raise Refused(*(replace(p, key=place) if p.key == "data" else p for p in refused.problems)) from refused


def _try(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    from ftcore.chat import render_whole

    prompt, tools = row.get("prompt") or [], row.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools
    for answer in filter(None, map(row.get, ANSWERS)):
        if isinstance(answer, list):
            render_whole(tokenizer, [*prompt, *answer], answers_from=len(prompt), tools=tools)
