"""Batches of rows with images: tokens padded on the right, and the images as the family's processor makes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ftcore import Vision
from ftcore.manager import import_function
from ftcore.tokens import IGNORED
from ftcore.vision import PICTURES, opened


@dataclass(frozen=True)
class VisionCollator:
    """Opens the images of a batch only now, so that none is kept in memory for longer than its step."""

    processor: Any
    vision: Vision

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Rows with `input_ids`, `labels` and `pictures` -> `[B, S]` tensors, and what the model takes of images."""
        tokenizer = self.processor.tokenizer
        ids = [list(row["input_ids"]) for row in rows]
        length = max(map(len, ids))
        batch = {
            "input_ids": _padded(ids, length, tokenizer.pad_token_id),
            "attention_mask": _padded([[1] * len(row) for row in ids], length, 0),
            "labels": _padded([list(row["labels"]) for row in rows], length, IGNORED),
        }
        if self.vision.token_types:
            image = tokenizer.convert_tokens_to_ids(self.vision.image)
            batch[self.vision.token_types] = (batch["input_ids"] == image).long()
        images = [[opened(picture) for picture in row[PICTURES]] for row in rows]
        inputs: Callable[..., dict[str, Any]] = import_function(self.vision.inputs, "model")
        return batch | inputs(self.processor, images, ids)


def _padded(rows: Sequence[list[int]], length: int, value: int) -> torch.Tensor:
    return torch.tensor([row + [value] * (length - len(row)) for row in rows])
