"""Causal attention with a soft cap on the scores, in plain PyTorch, a block of queries at a time.

No library kernel has Gemma 2's cap and its gradient. transformers' eager attention has, with every score of the batch
in memory at once; here they are a block's, keys of the future are not multiplied at all, and the backward makes the
scores again.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ftcore_kernels.layers.decoder.attention.documents import Documents
from ftcore_kernels.layers.decoder.attention.kernels import Tensors

SCORES = 2**23
"""Of a block, at most: 32 MiB in fp32 for each of the tensors that are made of them."""


class Capped:
    """`softmax(cap tanh(scale q k^T / cap)) v`, causal, with a sliding window and with several documents in a row."""

    recordable = by_heads = True

    def __init__(self, scale: float, cap: float, window: int | None, documents: Documents | None) -> None:
        self.scale, self.cap, self.window = scale, cap, window
        self.tables: tuple[torch.Tensor, ...] = () if documents is None else documents.tables

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, Tensors]:
        """As the protocol."""
        batch, heads, length, dim = q.shape
        out = q.new_empty((batch, length, heads, dim))
        first = self._first_seen(q)
        for rows, columns in self._blocks(q):
            weights, _ = self._weights(_grouped(q, k, rows), k[:, :, columns], first, rows, columns)
            part = weights.to(v.dtype) @ v[:, :, columns]
            out[:, rows] = part.view(batch, heads, -1, dim).transpose(1, 2)
        return out, ()

    def backward(
        self, dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, rest: Tensors
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As the protocol."""
        dq = torch.empty_like(q, memory_format=torch.contiguous_format)
        wide = torch.promote_types(q.dtype, torch.float32)
        dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (k, v))
        first, dout = self._first_seen(q), dout.transpose(1, 2)
        for rows, columns in self._blocks(q):
            queries, keys, values = _grouped(q, k, rows), k[:, :, columns], v[:, :, columns]
            weights, slope = self._weights(queries, keys, first, rows, columns)
            dpart = _grouped(dout, k, rows)
            dv[:, :, columns] += weights.to(v.dtype).mT @ dpart
            dweights = (dpart @ values.mT).to(wide)
            dweights -= (weights * dweights).sum(-1, keepdim=True)
            dscores = dweights.mul_(weights).mul_(slope).to(q.dtype)
            dq[:, :, rows] = (dscores @ keys).view(dq[:, :, rows].shape)
            dk[:, :, columns] += dscores.mT @ queries
        return dq, dk.to(k.dtype), dv.to(v.dtype)

    def _weights(
        self, queries: torch.Tensor, keys: torch.Tensor, first: torch.Tensor | None, rows: slice, columns: slice
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The attention weights of a block in at least fp32, and the slope from a product to its capped score."""
        wide = torch.promote_types(queries.dtype, torch.float32)
        capped = (queries @ keys.mT).to(wide).mul_(self.scale / self.cap).tanh_()
        row = torch.arange(rows.start, rows.stop, device=keys.device)[:, None]
        column = torch.arange(columns.start, columns.stop, device=keys.device)
        hidden = column > row
        if self.window is not None:
            hidden |= column <= row - self.window
        if first is not None:
            hidden = hidden | (column < first[:, None, None, rows, None])
        # Heads that share keys stand one behind the other in the rows.
        scores = (capped * self.cap).unflatten(2, (-1, rows.stop - rows.start))
        weights = scores.masked_fill_(hidden, -torch.inf).softmax(-1).flatten(2, 3)
        return weights, capped.square_().neg_().add_(1).mul_(self.scale)

    def _blocks(self, q: torch.Tensor) -> Iterator[tuple[slice, slice]]:
        """Queries, and the keys that any of them may see."""
        batch, heads, length, _ = q.shape
        height = max(16, SCORES // (batch * heads * length))
        for start in range(0, length, height):
            end = min(start + height, length)
            yield slice(start, end), slice(0 if self.window is None else max(0, start - self.window + 1), end)

    def _first_seen(self, q: torch.Tensor) -> torch.Tensor | None:
        """`[B, S]`: where in its row a token's document begins."""
        if not self.tables:
            return None
        batch, _, length, _ = q.shape
        token = torch.arange(batch * length, dtype=torch.int32, device=q.device)
        begins = self.tables[0][torch.searchsorted(self.tables[0], token, right=True) - 1]
        return begins.view(batch, length) - token.view(batch, length)[:, :1]


def _grouped(x: torch.Tensor, k: torch.Tensor, rows: slice) -> torch.Tensor:
    """Rows of `[B, Hq, S, D]` as `[B, Hkv, Hq / Hkv rows, D]`, so that heads that share keys are one product."""
    batch, _, _, dim = x.shape
    return x[:, :, rows].reshape(batch, k.shape[1], -1, dim)
