"""What comes between the query-key-value product and attention in plain PyTorch, rounded once, at the end."""

from typing import NamedTuple

import torch

from ftcore_kernels.reference._precision import widen


class Heads(NamedTuple):
    """Query heads, key-value heads, and the width of each."""

    q: int
    kv: int
    dim: int


class Update(NamedTuple):
    """LoRA's part of a fused product: columns of segment s get `xa[:, blocks[s] R : (blocks[s] + 1) R] @ b.T`."""

    xa: torch.Tensor
    """`[M, P R]`: the input times A of each of the P adapted projections, R the padded rank."""
    b: torch.Tensor
    """`[N, R]`: B of all projections, the scale included, one under the other."""
    blocks: tuple[int, ...]
    """Which of the P belongs to each segment of the N columns."""


class HeadNorm(NamedTuple):
    """RMS norm on every query and key head."""

    q_weight: torch.Tensor
    k_weight: torch.Tensor
    """`[D]`."""
    eps: float
    offset: float = 0.0
    gemma: bool = False
    """Round once, at the end, instead of before the weight as well."""


def lora_rope(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    heads: Heads,
    update: Update | None = None,
    norm: HeadNorm | None = None,
) -> torch.Tensor:
    """Add the low-rank update, normalise query and key heads, and rotate them.

    :param qkv: `[M, (Hq + 2 Hkv) D]` of M = B S tokens. Overwritten and returned if there is no `norm`.
    :param cos: `[B or 1, S, Dr]`.
    :param sin: As `cos`.
    :param heads: Their numbers and their width D.
    :param update: LoRA's part of the projections, or None.
    :param norm: The norm on query and key heads, or None.
    :returns: `[M, (Hq + 2 Hkv) D]`: rotated queries, rotated keys, values.
    """
    whole = updated(qkv, (heads.q * heads.dim, heads.kv * heads.dim, heads.kv * heads.dim), update)
    turned, v = whole.unflatten(1, (-1, heads.dim)).split((heads.q + heads.kv, heads.kv), dim=1)
    if norm is not None:
        q, k, _ = split(whole, heads)
        weighted = ((q, norm.q_weight), (k, norm.k_weight))
        turned = torch.cat([_normed(x, weight, norm, qkv.dtype) for x, weight in weighted], dim=1)
    out = torch.cat((_rotate(turned, cos, sin).flatten(1), v.flatten(1)), dim=1).to(qkv.dtype)
    return out if norm is not None else qkv.copy_(out)


def lora_rope_backward(
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    heads: Heads,
    qkv: torch.Tensor | None = None,
    update: Update | None = None,
    norm: HeadNorm | None = None,
    weight_grads: bool = False,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Return the gradient of the fused product's output, and those of the norm's weights.

    :param dq: `[B, Hq, S, D]`, of the rotated queries.
    :param dk: `[B, Hkv, S, D]`.
    :param dv: `[B, Hkv, S, D]`.
    :param qkv: With a norm, what the forward was given; not needed otherwise.
    :param weight_grads: Whether the norm's weights are trained.
    :param out: Memory for the first result.
    :returns: `[M, (Hq + 2 Hkv) D]`, and two `[D]` or None.
    """
    q, k, v = (widen(x).transpose(1, 2).flatten(0, 1) for x in (dq, dk, dv))
    q, k = _rotate_back(q, cos, sin), _rotate_back(k, cos, sin)
    grads: list[torch.Tensor | None] = [None, None]
    if norm is not None:
        assert qkv is not None
        widths = (heads.q * heads.dim, heads.kv * heads.dim, heads.kv * heads.dim)
        raw_q, raw_k, _ = split(updated(qkv, widths, update), heads)
        q, dq_weight = _norm_backward(q, raw_q, norm.q_weight, norm)
        k, dk_weight = _norm_backward(k, raw_k, norm.k_weight, norm)
        grads = [dq_weight, dk_weight] if weight_grads else grads
    dqkv = torch.cat([part.flatten(1) for part in (q, k, v)], dim=1).to(dq.dtype)
    return dqkv if out is None else out.copy_(dqkv), grads[0], grads[1]


def updated(base: torch.Tensor, widths: tuple[int, ...], update: Update | None) -> torch.Tensor:
    """`base` `[M, N]`, wide, with the low-rank update added to the segments of `widths`."""
    base = widen(base)
    if update is None:
        return base
    rank, parts, first = update.b.shape[1], [], 0
    for width, block in zip(widths, update.blocks, strict=True):
        xa = widen(update.xa[:, block * rank : (block + 1) * rank])
        parts.append(base[:, first : first + width] + xa @ widen(update.b[first : first + width]).T)
        first += width
    return torch.cat(parts, dim=1)


def split(qkv: torch.Tensor, heads: Heads) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Views of queries `[M, Hq, D]`, keys and values `[M, Hkv, D]` in the fused buffer."""
    q, k, v = qkv.unflatten(1, (-1, heads.dim)).split((heads.q, heads.kv, heads.kv), dim=1)
    return q, k, v


def _normed(x: torch.Tensor, weight: torch.Tensor, norm: HeadNorm, dtype: torch.dtype) -> torch.Tensor:
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.eps)
    return (x if norm.gemma else widen(x.to(dtype))) * (norm.offset + widen(weight))


def _norm_backward(
    dout: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, norm: HeadNorm
) -> tuple[torch.Tensor, torch.Tensor]:
    rstd = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.eps)
    normed = x * rstd
    dweight = (dout * normed).sum((0, 1))
    dout = dout * (norm.offset + widen(weight))
    return rstd * (dout - normed * (dout * normed).mean(-1, keepdim=True)), dweight


def _tables(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`[M, 1, Dr]` each, wide."""
    batch = x.shape[0] // max(cos.shape[1], 1)
    cos, sin = (widen(table).expand(batch, -1, -1).flatten(0, 1).unsqueeze(1) for table in (cos, sin))
    return cos, sin


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    cos, sin = _tables(x, cos, sin)
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    a, b = turned.chunk(2, dim=-1)
    return torch.cat((turned * cos + torch.cat((-b, a), dim=-1) * sin, rest), dim=-1)


def _rotate_back(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    cos, sin = _tables(x, cos, sin)
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    a, b = (turned * sin).chunk(2, dim=-1)
    return torch.cat((turned * cos + torch.cat((b, -a), dim=-1), rest), dim=-1)
