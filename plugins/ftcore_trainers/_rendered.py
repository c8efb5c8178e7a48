"""Rows that TRL tokenizes are tried on the chat template before any weight is read, so that none stops a run later."""

from __future__ import annotations

from collections.abc import Generator, Mapping
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
    """Raises Refused for a conversation that the template does not take."""
    splits = yield
    for name, rows in splits.items():
        for number, row in enumerate(islice(rows, TRIED), 1):
            try:
                _try(row, tokenizer)
            except Refused as refused:
                place = f"row {number} of the {name} split"
                raise Refused(*(replace(p, key=place) if p.key == "data" else p for p in refused.problems)) from refused
    return splits


def _try(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    from ftcore.chat import render

    prompt, tools = row.get("prompt") or [], row.get("tools")
    for answer in filter(None, map(row.get, ANSWERS)):
        if isinstance(answer, list):
            render(tokenizer, [*prompt, *answer], tools=tools)
