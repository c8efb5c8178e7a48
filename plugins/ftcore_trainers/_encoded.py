"""Texts as the inputs of a model."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Encoder:
    """Tokenizes texts into one padded batch."""

    tokenizer: Any
    max_length: int
    """Longest row in tokens; the rest is cut off."""
    token_types: bool
    """Whether the model tells the first text of a pair from the second by ids."""

    @classmethod
    def of(cls, model: Any, tokenizer: Any, max_length: int) -> Encoder:
        """The encoder of a model; a model that knows no padding token gets the tokenizer's."""
        base = getattr(model, "get_base_model", lambda: model)()
        text = base.config.get_text_config()
        if getattr(text, "pad_token_id", None) is None:
            text.pad_token_id = tokenizer.pad_token_id
        return cls(tokenizer, max_length, "token_type_ids" in inspect.signature(type(base).forward).parameters)

    def __call__(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> dict[str, Any]:
        """Return `input_ids` and `attention_mask`, both `[rows, longest]`."""
        return dict(
            self.tokenizer(
                list(texts),
                text_pair=list(pairs) if pairs else None,
                truncation=True,
                max_length=self.max_length,
                padding=True,
                return_token_type_ids=self.token_types,
                return_tensors="pt",
            )
        )
