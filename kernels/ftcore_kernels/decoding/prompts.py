"""Attention inside prompts: several in one row, which do not see one another, or one with the mask of its model."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F

from ftcore_kernels.layers.decoder.attention import Capped, Cudnn, Documents, Flash, Mask, taken
from ftcore_kernels.layers.decoder.attention.choice import fused
from ftcore_kernels.layers.uncovered import Uncovered
from ftcore_kernels.reference.decode_attention import Scores

AT_ONCE = 2**26
"""Scores that are there at a time, of all heads, where they are not computed by a kernel."""


class Packed:
    """Prompts of these lengths, one behind the other."""

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self._lengths, self._device = list(lengths), device
        self._documents: dict[int | None, Documents | None] = {}

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores) -> torch.Tensor:
        """q `[1, Hq, T, D]`, k and v `[1, Hkv, T, D]` -> `[1, T, Hq, D]`: causal, each prompt for itself."""
        pieces = self._pieces(scores.chunk)
        window = None if scores.window is None or scores.window >= max(pieces) else scores.window
        if scores.softcap is not None and scores.sinks is None:
            return Capped(scores.scale, scores.softcap, window, self._as_documents(scores.chunk)).forward(q, k, v)[0]
        kernel = None
        if scores.softcap is None:
            kernel = fused(q, q.shape[-1], scores.scale, window, self._as_documents(scores.chunk))
        if kernel is not None and scores.sinks is not None and isinstance(kernel, Cudnn):
            kernel = Flash(scores.scale)  # whose sums have a known shape
        if kernel is None:
            whole = [slice(*ends) for ends in pairwise(accumulate(pieces, initial=0))]
            parts = [_plain(q[:, :, at], k[:, :, at], v[:, :, at], scores._replace(window=window)) for at in whole]
            return torch.cat(parts, 1)
        out, rest = kernel.forward(q, k, v)
        if scores.sinks is None:
            return out
        # A key without a value takes its part of every softmax: exp(sum) / (exp(sum) + exp(sink)) is left.
        kept = torch.sigmoid(rest[0].view(q.shape[1], -1) - scores.sinks.float()[:, None])
        return out * kept.T[None, :, :, None].to(out.dtype)

    def _pieces(self, chunk: int | None) -> list[int]:
        """Tokens that see one another: a chunk is as good as a prompt of its own."""
        if chunk is None:
            return self._lengths
        return [min(chunk, length - at) for length in self._lengths for at in range(0, length, chunk)]

    def _as_documents(self, chunk: int | None) -> Documents | None:
        if chunk not in self._documents:
            pieces, made = self._pieces(chunk), None
            if len(pieces) > 1:
                first = torch.zeros((1, sum(pieces)), dtype=torch.bool)
                first[0, list(accumulate(pieces[:-1], initial=0))] = True
                made = Documents.beginning(first, self._device)
            self._documents[chunk] = made
        return self._documents[chunk]


def masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores, mask: Any) -> torch.Tensor:
    """Of one prompt `[1, H, T, D]` -> `[1, T, Hq, D]`, with what its model hands to its attention.

    :param mask: Dense `[1, 1, T, T]`, bool or to be added; a described one; or None for plain causality.
    """
    mask = taken(mask)
    if isinstance(mask, Mask):
        mask = mask.dense_on(q.device)
    if mask is None or mask.ndim != 4:  # FlashAttention's is of two dimensions, and says which tokens are pads
        return Packed([q.shape[2]], q.device).attend(q, k, v, scores)
    if scores.softcap is not None or scores.sinks is not None:
        raise Uncovered("scores are capped, or have sinks, in a prompt with a mask of its own")
    if mask.dtype != torch.bool:
        mask = mask.to(q.dtype)
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scores.scale, enable_gqa=gqa).transpose(1, 2)


def behind(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores) -> torch.Tensor:
    """The last tokens of one prompt `[1, Hq, T, D]` see all of it `[1, Hkv, L, D]` -> `[1, T, Hq, D]`.

    A few queries at a time, with the keys that they reach: their mask and scores are dense.
    """
    number, length = q.shape[2], k.shape[2]
    size, parts = max(1, AT_ONCE // (q.shape[1] * length)), []
    for start in range(length - number, length, size):
        end = min(start + size, length)
        first = 0 if scores.window is None else max(0, start - scores.window + 1)
        if scores.chunk is not None:
            first = start // scores.chunk * scores.chunk
        block = q[:, :, start - length + number : end - length + number]
        parts.append(_plain(block, k[:, :, first:end], v[:, :, first:end], scores))
    return torch.cat(parts, 1)


def _plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scores: Scores) -> torch.Tensor:
    """Causal attention in plain PyTorch of the last T tokens, `[1, H, T, D]` -> `[1, T, Hq, D]`."""
    length, gqa = k.shape[2], q.shape[1] != k.shape[1]
    plain = scores.softcap is None and scores.sinks is None
    if plain and q.shape[2] < length:
        sees = _sees(q.shape[2], length, scores, q.device)
        return F.scaled_dot_product_attention(q, k, v, sees, scale=scores.scale, enable_gqa=gqa).transpose(1, 2)
    if plain and scores.window is None and length <= (scores.chunk or length):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scores.scale, enable_gqa=gqa)
        return out.transpose(1, 2)
    sees = _sees(q.shape[2], length, scores, q.device)
    wide = torch.promote_types(q.dtype, torch.float32)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1).to(wide) for x in (k, v))
    found = q.to(wide) @ k.mT * scores.scale
    if scores.softcap is not None:
        found = scores.softcap * torch.tanh(found / scores.softcap)
    found = found.masked_fill(~sees, -torch.inf)
    if scores.sinks is not None:
        sinks = scores.sinks.to(wide).view(1, -1, 1, 1).expand(*found.shape[:3], 1)
        found = torch.cat((found, sinks), -1)
    return (found.softmax(-1)[..., :length] @ v).to(q.dtype).transpose(1, 2)


def _sees(number: int, length: int, scores: Scores, device: torch.device) -> torch.Tensor:
    """Bool `[number, length]`: which tokens the last ones see; a chunk begins with the first."""
    key = torch.arange(length, device=device)
    query = key[length - number :, None]
    sees = key <= query
    if scores.chunk is not None:
        return sees & (key >= query // scores.chunk * scores.chunk)
    return sees if scores.window is None else sees & (key > query - scores.window)
