"""Batches without an attention mask: padded on the right, or documents packed one behind the other.

A causal query sees no key after its own, so it never sees a pad on its right, and what stands at the pads has no label.
Packed documents are told apart by their positions. With a mask transformers would build a dense one of the whole batch,
and attention would lose its fast kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ftcore_trainers._buckets import Buckets

Batch = dict[str, Any]

COUNTS = ("num_tokens", "supervised", "begins")
"""What a batch says about itself besides what the model takes."""


@dataclass(frozen=True)
class WithoutMask:
    """Takes the mask out of the batches of a collator that pads on the right or packs, and counts its tokens."""

    collate: Callable[[Sequence[Any]], Batch]
    buckets: Buckets | None = None
    """Lengths that batches are filled up to."""
    find_supervised: bool = True
    """Whether to find the supervised tokens here, where the loss need not wait for a device to count them."""

    def __call__(self, rows: Sequence[Any]) -> Batch:
        """Return the batch with what it says of itself for the mask.

        `num_tokens` is the number of tokens that are no padding, `supervised` `[n]` int64 the places among all `B * S`
        hidden states whose next token has a label. Packed rows also have `begins`, a NumPy bool `[B, S]` that stays on
        the host: whether a token is the first of its document.
        """
        batch = self.collate(rows)
        mask = batch.pop("attention_mask", None)
        batch["num_tokens"] = batch["input_ids"].numel() if mask is None else int(mask.sum())
        batch = batch if self.buckets is None else self.buckets.fill(batch)
        if self.find_supervised:
            after = F.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
            batch["supervised"] = torch.nonzero(after.reshape(-1) != -100).squeeze(1)
            if (positions := batch.get("position_ids")) is not None:
                batch["begins"] = (torch.diff(positions, prepend=positions[:, :1]) != 1).numpy()
        return batch


def causal(config: Any) -> bool:
    """Whether no query of the model sees a later key."""
    text = config.get_text_config()
    both_ways = getattr(text, "use_bidirectional_attention", None)
    return not config.is_encoder_decoder and getattr(text, "is_causal", True) is not False and not both_ways
