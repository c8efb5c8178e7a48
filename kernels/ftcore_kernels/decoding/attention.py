"""What the layers' attention is while completions are written: of whole prompts first, then of a token a row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ftcore_kernels.decoding.cache import Cache
from ftcore_kernels.layers.decoder.attention import Attention
from ftcore_kernels.reference.decode_attention import Scores

Choice = Callable[[int, Scores, Any], Attention]
"""The attention of a layer for a call: from its number, how its queries score, and the mask that the model made."""


class Step(Attention):
    """Of one new token a row, over the cache, which it joins."""

    recordable, by_heads = True, False
    tables = ()

    def __init__(
        self, op: Callable[..., torch.Tensor], cache: Cache, layer: int, positions: torch.Tensor, scores: Scores
    ) -> None:
        self._op, self._scores, self._positions = op, scores, positions
        self._keys, self._values = cache.keys[layer], cache.values[layer]

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, tuple[()]]:
        """As the protocol, without a backward."""
        return self._op(q, k, v, self._keys, self._values, self._positions, self._scores), ()

    def backward(self, *_: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """There is none."""
        raise NotImplementedError("nothing is trained while completions are written")


@dataclass
class Prompts(Attention):
    """Of prompts one behind the other in one row, whose keys and values are kept."""

    inner: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    """Of q `[1, Hq, T, D]`, k and v `[1, Hkv, T, D]`; returns `[1, T, Hq, D]`."""
    cache: Cache
    layer: int
    rows: torch.Tensor
    """Int64 `[T]`: of the cache, for each token."""
    places: torch.Tensor
    """Int64 `[T]`: in its prompt."""
    recordable = by_heads = False
    tables = ()

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """As the protocol, without a backward."""
        self.cache.write(self.layer, k, v, self.rows, self.places)
        return self.inner(q, k, v), ()

    def backward(self, *_: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """There is none."""
        raise NotImplementedError("nothing is trained while completions are written")
