"""Batches of few lengths, so that launches that were recorded for one batch serve many."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

STEP = 64
"""No length below 512 tokens is another."""
ORIGINAL = "original_max_position_embeddings"
PARTS = 8
"""Above, an octave is so many lengths: an eighth of a batch is wasted at most."""


@dataclass(frozen=True)
class Buckets:
    """Fills batches up with pads on their right, without labels, if they are small enough to be recorded."""

    tokens: float
    """Only batches of fewer tokens, pads among them, are filled up."""
    pad: int
    """Token id of a pad."""
    contexts: frozenset[int] = frozenset()
    """Lengths that no batch is filled up beyond, because the angles of RoPE may be others there."""

    def fill(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch of `input_ids` and `labels` `[B, S]` in the next length.

        Positions of packed documents go on with the pads as one more document, in TRL's offsets as well.
        """
        rows, length = batch["input_ids"].shape
        more = min([rounded_up(length), *(end for end in self.contexts if end >= length)]) - length
        if not more or rows * (length + more) >= self.tokens:
            return batch
        filled = dict(batch, input_ids=F.pad(batch["input_ids"], (0, more), value=self.pad))
        filled["labels"] = F.pad(batch["labels"], (0, more), value=-100)
        if "position_ids" in batch:
            pads = torch.arange(more, dtype=batch["position_ids"].dtype).expand(rows, more)
            filled["position_ids"] = torch.cat([batch["position_ids"], pads], dim=1)
        for side in ("q", "k"):
            if (offsets := batch.get(f"cu_seq_lens_{side}")) is not None:
                filled[f"cu_seq_lens_{side}"] = torch.cat([offsets, offsets[-1:] + more])
                filled[f"max_length_{side}"] = max(batch[f"max_length_{side}"], more)
        if "seq_idx" in batch:
            filled["seq_idx"] = torch.cat([batch["seq_idx"], (batch["seq_idx"][:, -1:] + 1).expand(rows, more)], dim=1)
        return filled


def contexts(config: Any) -> frozenset[int]:
    """Context lengths that a model's RoPE may go by: now, and before it was stretched."""
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    found = [
        text.max_position_embeddings,
        *(kind.get(ORIGINAL) for kind in (rope, *rope.values()) if type(kind) is dict),
    ]
    return frozenset(length for length in (*found, getattr(text, ORIGINAL, None)) if length)


def rounded_up(length: int) -> int:
    """The next multiple of 64, or of an eighth of the power of two below, whichever is more."""
    step = max(STEP, (1 << (length.bit_length() - 1)) // PARTS)
    return -(-length // step) * step
