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
    chunk: int | None = None
    """A query sees the keys of its own chunk of so many tokens; then there is no window."""
    sinks: torch.Tensor | None = None
    """`[Hq]`: a further score of each head, of a key without a value."""

    @property
    def reach(self) -> int | None:
        """Tokens that a query sees at most, or None for all."""
        return self.window if self.chunk is None else self.chunk


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
    written, reach = (int(end) + 1 for end in positions.aminmax())  # a host that computes has them at hand
    keys, values = keys[:, :, :reach], values[:, :, :reach]
    group = heads // keys.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    asked = q[:, :, 0].reshape(batch, -1, group, dim).to(wide)
    found = asked @ keys.to(wide).transpose(2, 3) * scores.scale
    if scores.softcap is not None:
        found = scores.softcap * torch.tanh(found / scores.softcap)
    at = torch.arange(reach, device=q.device)
    seen = at <= positions[:, None]
    if scores.chunk is not None:
        seen &= at >= positions[:, None] // scores.chunk * scores.chunk
    elif scores.window is not None:
        seen &= at > positions[:, None] - scores.window
    if not seen.all():
        found = found.masked_fill(~seen[:, None, None], -torch.inf)
    if scores.sinks is not None:
        sinks = scores.sinks.to(wide).view(-1, group, 1).expand(batch, -1, -1, -1)
        found = torch.cat((found, sinks), -1)
    weights = found.softmax(-1)[..., :reach]
    out = weights[..., :written] @ values[:, :, :written].to(wide)
    if reach > written:  # what nobody wrote may be anything, and nothing times NaN is not nothing
        last = torch.where(seen[:, None, written:, None], values[:, :, written:], 0).to(wide)
        out += weights[..., written:] @ last
    return out.to(q.dtype).reshape(batch, 1, heads, dim)
