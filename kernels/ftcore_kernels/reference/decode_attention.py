"""Attention of one new token a row over a cache of keys and values, in plain PyTorch."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Scores(NamedTuple):
    """How a query's scores come about."""

    scale: float
    window: int | None = None
    """Tokens that a query sees, itself among them; None sees all."""
    softcap: float | None = None
    """`c tanh(score / c)`, before the mask."""


def decode_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    scores: Scores,
) -> torch.Tensor:
    """Write the new key and value into the cache, and attend to all up to them.

    :param q: `[B, Hq, 1, D]`, any strides with contiguous last dimension.
    :param k: `[B, Hkv, 1, D]`, likewise; `v` too.
    :param keys: `[B, Hkv, L, D]` contiguous, written to at `positions`; `values` too.
    :param positions: Int64 `[B]`, of the new token: each below L.
    :returns: `[B, 1, Hq, D]` contiguous, in the dtype of q.
    """
    batch, heads, _, dim = q.shape
    rows = torch.arange(batch, device=q.device)
    keys[rows, :, positions] = k[:, :, 0]
    values[rows, :, positions] = v[:, :, 0]
    group = heads // keys.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    asked = q[:, :, 0].reshape(batch, -1, group, dim).to(wide)
    found = asked @ keys.to(wide).transpose(2, 3) * scores.scale
    if scores.softcap is not None:
        found = scores.softcap * torch.tanh(found / scores.softcap)
    at = torch.arange(keys.shape[2], device=q.device)
    seen = at <= positions[:, None]
    if scores.window is not None:
        seen &= at > positions[:, None] - scores.window
    found = found.masked_fill(~seen[:, None, None], -torch.inf)
    # What nobody wrote may be anything, and nothing times NaN is not nothing.
    there = torch.where(seen[:, None, :, None], values, 0).to(wide)
    return (found.softmax(-1) @ there).to(q.dtype).reshape(batch, 1, heads, dim)
