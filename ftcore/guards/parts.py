"""Batches cut into parts by their rows."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch


def spans(rows: int, most: int) -> list[tuple[int, int]]:
    """Beginnings and ends of as few parts as hold at most so many rows each, nearly alike in size."""
    number = -(-rows // most)
    edges = [rows * part // number for part in range(number + 1)]
    return list(pairwise(edges))


def rows_of(batch: Any) -> int:
    """Rows of a batch: the length of a list, or of the first tensor that has one."""
    if isinstance(batch, Mapping):
        for value in batch.values():
            if torch.is_tensor(value) and value.dim():
                return len(value)
        return max((len(value) for value in batch.values() if isinstance(value, list)), default=1)
    return len(batch) if isinstance(batch, list) else 1


def sliced(batch: Any, start: int, end: int) -> Any:
    """Some rows of a batch of tensors and lists by row; what has no rows, such as a number, is every part's."""
    if not isinstance(batch, Mapping):
        return batch[start:end]
    rows = rows_of(batch)

    def cut(value: Any) -> Any:
        by_row = (torch.is_tensor(value) and value.dim() > 0) or isinstance(value, list)
        return value[start:end] if by_row and len(value) == rows else value

    return {name: cut(value) for name, value in batch.items()}
