"""Merged weights, read a few rows at a time: what exporters write, without the whole model in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

CHUNK = 8 * 2**20
"""Values that `Weight.chunks` reads at once: 32 MiB in float32."""


@dataclass(frozen=True)
class Weight:
    """One merged tensor under its published name. Nothing is read before it is asked for."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    """The type that it is stored in; rows that an adapter changed come in float32, to be rounded once."""
    read: Callable[[int, int], torch.Tensor]
    """`read(start, stop)`: those rows (of the first dimension), on the CPU; of a tensor without dimensions, itself."""
    exact: bool = False
    """Whether the model keeps it in its own type when the rest is rounded to 16 bits, as a router's bias."""

    @property
    def numel(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` of the first dimension, on the CPU: `[stop - start, *shape[1:]]`."""
        return self.read(start, stop)

    def whole(self) -> torch.Tensor:
        """All of it, `shape`, on the CPU."""
        return self.read(0, self.shape[0] if self.shape else 1)

    def chunks(self, values: int = CHUNK) -> Iterator[torch.Tensor]:
        """All of it in order, at most about `values` values at a time, in whole rows."""
        if not self.shape:
            yield self.whole()
            return
        step = max(1, values // max(math.prod(self.shape[1:]), 1))
        for start in range(0, self.shape[0], step):
            yield self.read(start, min(start + step, self.shape[0]))


Weights = Mapping[str, Weight]
"""Published names, as on the hub (`model.layers.0.self_attn.q_proj.weight`, experts one by one), to weights.

A tensor that is tied to another one is left out.
"""
