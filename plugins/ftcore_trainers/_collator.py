"""Batches padded on the right, without an attention mask.

A causal query sees no key after its own, so it never sees a pad on its right, and what stands at the pads has no label.
With a mask transformers would build a dense one of the whole batch, and attention would lose its fast kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Batch = dict[str, Any]


@dataclass(frozen=True)
class WithoutMask:
    """Takes the mask out of the batches of a collator that pads on the right, and counts its tokens."""

    collate: Callable[[Sequence[Any]], Batch]

    def __call__(self, rows: Sequence[Any]) -> Batch:
        """Return the batch with `num_tokens`, the number of tokens that are no padding, for the mask."""
        batch = self.collate(rows)
        batch["num_tokens"] = int(batch.pop("attention_mask").sum())
        return batch


def causal(config: Any) -> bool:
    """Whether no query of the model sees a later key."""
    text = config.get_text_config()
    both_ways = getattr(text, "use_bidirectional_attention", None)
    return not config.is_encoder_decoder and getattr(text, "is_causal", True) is not False and not both_ways
