"""Weights of linear modules that share an input, one behind the other in memory, with room for a border below.

One product then serves them all. In the border stand the rows of LoRA's A: the product's last columns are `x A^T`, and
the product of the backward, over columns that hold the gradient of those, adds its part to the gradient of x. Neither
needs a pass over memory of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

ALIGNED = 32
"""Rows of a border come in multiples of this, so that rows of a product and its border start at whole sectors."""


def border_of(sources: int, rank: int) -> int:
    """Rows that the A of so many modules take, of padded rank `rank` each."""
    return -(-sources * rank // ALIGNED) * ALIGNED


class Stack:
    """`[N + P, K]`: the weights, and P rows below them."""

    def __init__(self, whole: torch.Tensor, rows: int) -> None:
        self.whole = whole
        self.rows = rows
        self.owner: object | None = None
        """Whose A stands in the border."""
        self._filled = 0

    @property
    def spare(self) -> int:
        """Rows below the weights."""
        return self.whole.shape[0] - self.rows

    def holds(self, weights: Sequence[torch.Tensor]) -> bool:
        """Whether the weights still lie here: somebody may have moved or replaced them."""
        address, size = self.whole.data_ptr(), self.whole.element_size()
        for weight in weights:
            if weight.data_ptr() != address or weight.dtype != self.whole.dtype or not weight.is_contiguous():
                return False
            address += weight.numel() * size
        return weights[0].device == self.whole.device

    def claim(self, rows: int, owner: object) -> torch.Tensor:
        """The place of the owner's A, so many rows of the border; the others are zero."""
        place = self.whole[self.rows : self.rows + rows]
        if self._filled > rows:
            self.whole[self.rows + rows : self.rows + self._filled].zero_()
        self._filled, self.owner = rows, owner
        return place


def stack(weights: Sequence[nn.Parameter], spare: int) -> Stack | None:
    """Move contiguous parameters of one width behind each other; None if they are not of one kind.

    Each keeps its values, shape and identity; only its memory moves.
    """
    if len({(weight.dtype, weight.device, weight.shape[1]) for weight in weights}) > 1:
        return None
    rows, first = sum(weight.shape[0] for weight in weights), weights[0].detach()
    if len(weights) == 1 and not spare and first.is_contiguous():
        return Stack(first, rows)
    whole = first.new_zeros((rows + spare, first.shape[1]))
    for weight, part in zip(weights, whole.split([*(weight.shape[0] for weight in weights), spare]), strict=False):
        part.copy_(weight.detach())
        weight.data = part
    return Stack(whole, rows)
