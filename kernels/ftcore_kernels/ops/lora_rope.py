"""What comes between the query-key-value product and attention, in one pass over the fused buffer, and back.

That is the low-rank update of the three projections, the norm on every query and key head where the family has one,
and the rotary position embedding. The backward turns the three gradients of attention back and packs them as the
gradient of the product's output, which spares the copy that three separate gradients would need.

These are plain steps of a manual backward, not differentiable functions: `ftcore_kernels.layers.decoder` puts them
together.
"""

# Triton has no types.
# mypy: disable-error-code="import-untyped,no-untyped-call,no-untyped-def,untyped-decorator"

import torch
import triton
import triton.language as tl

from ftcore_kernels.ops import _launch
from ftcore_kernels.reference.lora_rope import HeadNorm, Heads, Update

_TILE = 1024  # pairs of a program's tile


def lora_rope(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    heads: Heads,
    update: Update | None = None,
    norm: HeadNorm | None = None,
) -> torch.Tensor:
    """Add the low-rank update, normalise query and key heads, and rotate them.

    :param qkv: `[M, (Hq + 2 Hkv) D]` with contiguous rows, M = B S. Overwritten and returned if there is no `norm`.
    :param cos: `[B or 1, S, Dr]`, Dr even and at most D, fp16, bf16 or fp32.
    :param sin: As `cos`.
    :param heads: Their numbers and their width D.
    :param update: LoRA's part of the projections, or None.
    :param norm: The norm on query and key heads, or None.
    :returns: `[M, (Hq + 2 Hkv) D]`: rotated queries, rotated keys, values.
    """
    _launch.check(qkv=qkv, cos=cos, sin=sin)
    out = qkv if norm is None else qkv.new_empty(qkv.shape)
    if qkv.numel():
        grid, arguments, constants = _arguments(qkv, cos, sin, heads, update, norm)
        with torch.cuda.device_of(qkv):
            _lora_rope_kernel[grid](qkv, qkv.stride(0), out, out.stride(0), *arguments, **constants)
    return out


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

    :param dq: `[B, Hq, S, D]`, any strides, of the rotated queries.
    :param dk: `[B, Hkv, S, D]`.
    :param dv: `[B, Hkv, S, D]`.
    :param qkv: With a norm, what the forward was given; not needed otherwise.
    :param weight_grads: Whether the norm's weights are trained.
    :param out: Memory for the first result, with contiguous rows.
    :returns: `[M, (Hq + 2 Hkv) D]`, and two `[D]` fp32 or None.
    """
    dq, dk, dv = (_launch.last_contiguous(tensor) for tensor in (dq, dk, dv))
    _launch.check(dq=dq, dk=dk, dv=dv)
    batch, _, length, dim = dq.shape
    dqkv = dq.new_empty((batch * length, (heads.q + 2 * heads.kv) * dim)) if out is None else out
    partial = dq.new_empty((0,), dtype=torch.float32)
    if not dqkv.numel():
        zeros = [dq.new_zeros((dim,), dtype=torch.float32) if weight_grads else None for _ in range(2)]
        return dqkv, zeros[0], zeros[1]
    grid, arguments, constants = _arguments(dqkv, cos, sin, heads, update, norm)
    if weight_grads:
        partial = torch.empty((grid[0], grid[1] - heads.kv, dim), dtype=torch.float32, device=dq.device)
    with torch.cuda.device_of(dq):
        _lora_rope_back_kernel[grid](
            dq, *dq.stride()[:3], dk, *dk.stride()[:3], dv, *dv.stride()[:3], partial,
            dqkv if qkv is None else qkv, 0 if qkv is None else qkv.stride(0), dqkv, dqkv.stride(0), *arguments,
            **constants, WEIGHT_GRADS=weight_grads,
        )  # fmt: skip
    if not weight_grads:
        return dqkv, None, None
    return dqkv, partial[:, : heads.q].sum((0, 1)), partial[:, heads.q :].sum((0, 1))


def _arguments(qkv, cos, sin, heads, update, norm):
    """The launch grid (token blocks, heads) and what both kernels take."""
    cos, sin = _launch.last_contiguous(cos), _launch.last_contiguous(sin)
    tokens, length, pairs = qkv.shape[0], cos.shape[1], cos.shape[2] // 2
    batch = tokens // length
    pair_block = max(triton.next_power_of_2(max(pairs, 1)), 16)
    rest = heads.dim - 2 * pairs
    token_block = max(min(_TILE // pair_block, triton.next_power_of_2(tokens)), 16)
    xa, b, blocks = (qkv, qkv, (0, 0, 0)) if update is None else update
    q_weight, k_weight = (qkv, qkv) if norm is None else (norm.q_weight, norm.k_weight)
    arguments = (
        cos, cos.stride(0) if cos.shape[0] == batch else 0, cos.stride(1),
        sin, sin.stride(0) if sin.shape[0] == batch else 0, sin.stride(1),
        xa, xa.stride(0), b, q_weight, k_weight,
        tokens, length, heads.q, heads.kv, heads.dim, pairs,
        0.0 if norm is None else norm.eps, 0.0 if norm is None else norm.offset,
    )  # fmt: skip
    constants = {
        "RANK": 0 if update is None else b.shape[1],
        "Q_RANKS": blocks[0], "K_RANKS": blocks[1], "V_RANKS": blocks[2],
        "NORM": norm is not None, "GEMMA": norm is not None and norm.gemma,
        "TOKENS": token_block, "PAIR_BLOCK": pair_block,
        "REST_BLOCK": max(triton.next_power_of_2(rest), 16) if rest else 0,
        "num_warps": min(max(token_block * pair_block // 1024, 1), 8),
    }  # fmt: skip
    return (triton.cdiv(tokens, token_block), heads.q + 2 * heads.kv), arguments, constants


@triton.jit
def _lora_rope_kernel(
    qkv_ptr, qkv_stride, out_ptr, out_stride,
    cos_ptr, cos_batch_stride, cos_token_stride, sin_ptr, sin_batch_stride, sin_token_stride,
    xa_ptr, xa_stride, b_ptr, q_weight_ptr, k_weight_ptr, tokens, length, q_heads, kv_heads, dim, pairs, eps, offset,
    RANK: tl.constexpr, Q_RANKS: tl.constexpr, K_RANKS: tl.constexpr, V_RANKS: tl.constexpr, NORM: tl.constexpr,
    GEMMA: tl.constexpr, TOKENS: tl.constexpr, PAIR_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per block of tokens and head: [TOKENS, D] of the fused buffer in, the same out."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    head = tl.program_id(1).to(tl.int64)
    mask = (token < tokens)[:, None]
    source = qkv_ptr + token[:, None] * qkv_stride + head * dim
    target = out_ptr + token[:, None] * out_stride + head * dim
    ranks = Q_RANKS if head < q_heads else (K_RANKS if head < q_heads + kv_heads else V_RANKS)
    xa_ptr += token[:, None] * xa_stride + ranks * RANK
    b_ptr += head * dim * RANK
    a, b, rest = _load_head(source, xa_ptr, b_ptr, mask, dim, pairs, RANK, PAIR_BLOCK, REST_BLOCK)
    if head < q_heads + kv_heads:
        if NORM:
            weight_ptr = q_weight_ptr if head < q_heads else k_weight_ptr
            rstd = _rstd(a, b, rest, dim, eps, REST_BLOCK)
            if not GEMMA:
                a, b = _round(a * rstd, out_ptr), _round(b * rstd, out_ptr)
                rest = _round(rest * rstd, out_ptr)
            else:
                a, b, rest = a * rstd, b * rstd, rest * rstd
            weight_a, weight_b, weight_rest = _weights(weight_ptr, offset, dim, pairs, PAIR_BLOCK, REST_BLOCK)
            a, b, rest = a * weight_a, b * weight_b, rest * weight_rest
        cos_a, cos_b = _angles(cos_ptr, cos_batch_stride, cos_token_stride, token, tokens, length, pairs, PAIR_BLOCK)
        sin_a, sin_b = _angles(sin_ptr, sin_batch_stride, sin_token_stride, token, tokens, length, pairs, PAIR_BLOCK)
        a, b = a * cos_a - b * sin_a, b * cos_b + a * sin_b
    _store_head(target, a, b, rest, mask, dim, pairs, PAIR_BLOCK, REST_BLOCK)


@triton.jit
def _lora_rope_back_kernel(
    dq_ptr, dq_batch_stride, dq_head_stride, dq_token_stride,
    dk_ptr, dk_batch_stride, dk_head_stride, dk_token_stride,
    dv_ptr, dv_batch_stride, dv_head_stride, dv_token_stride, partial_ptr,
    qkv_ptr, qkv_stride, out_ptr, out_stride,
    cos_ptr, cos_batch_stride, cos_token_stride, sin_ptr, sin_batch_stride, sin_token_stride,
    xa_ptr, xa_stride, b_ptr, q_weight_ptr, k_weight_ptr, tokens, length, q_heads, kv_heads, dim, pairs, eps, offset,
    RANK: tl.constexpr, Q_RANKS: tl.constexpr, K_RANKS: tl.constexpr, V_RANKS: tl.constexpr, NORM: tl.constexpr,
    GEMMA: tl.constexpr, TOKENS: tl.constexpr, PAIR_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
    WEIGHT_GRADS: tl.constexpr,
):  # fmt: skip
    """As the forward: the gradients of a head's tokens in, those of the fused buffer out."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    head = tl.program_id(1).to(tl.int64)
    mask = (token < tokens)[:, None]
    batch, position = (token // length)[:, None], (token % length)[:, None]
    if head < q_heads:
        source = dq_ptr + batch * dq_batch_stride + head * dq_head_stride + position * dq_token_stride
    elif head < q_heads + kv_heads:
        inner = head - q_heads
        source = dk_ptr + batch * dk_batch_stride + inner * dk_head_stride + position * dk_token_stride
    else:
        inner = head - q_heads - kv_heads
        source = dv_ptr + batch * dv_batch_stride + inner * dv_head_stride + position * dv_token_stride
    a, b, rest = _load_head(source, xa_ptr, b_ptr, mask, dim, pairs, 0, PAIR_BLOCK, REST_BLOCK)
    target = out_ptr + token[:, None] * out_stride + head * dim
    if head < q_heads + kv_heads:
        cos_a, cos_b = _angles(cos_ptr, cos_batch_stride, cos_token_stride, token, tokens, length, pairs, PAIR_BLOCK)
        sin_a, sin_b = _angles(sin_ptr, sin_batch_stride, sin_token_stride, token, tokens, length, pairs, PAIR_BLOCK)
        a, b = a * cos_a + b * sin_b, b * cos_b - a * sin_a
        if NORM:
            ranks = Q_RANKS if head < q_heads else K_RANKS
            raw_a, raw_b, raw_rest = _load_head(
                qkv_ptr + token[:, None] * qkv_stride + head * dim, xa_ptr + token[:, None] * xa_stride + ranks * RANK,
                b_ptr + head * dim * RANK, mask, dim, pairs, RANK, PAIR_BLOCK, REST_BLOCK,
            )  # fmt: skip
            rstd = _rstd(raw_a, raw_b, raw_rest, dim, eps, REST_BLOCK)
            raw_a, raw_b, raw_rest = raw_a * rstd, raw_b * rstd, raw_rest * rstd
            if WEIGHT_GRADS:
                row = partial_ptr + (tl.program_id(0).to(tl.int64) * (q_heads + kv_heads) + head) * dim
                one = tl.full((1, 1), 1, tl.int1)
                _store_head(
                    row + tl.zeros((1, 1), tl.int32), tl.sum(a * raw_a, axis=0)[None, :],
                    tl.sum(b * raw_b, axis=0)[None, :], tl.sum(rest * raw_rest, axis=0)[None, :], one, dim, pairs,
                    PAIR_BLOCK, REST_BLOCK,
                )  # fmt: skip
            weight_ptr = q_weight_ptr if head < q_heads else k_weight_ptr
            weight_a, weight_b, weight_rest = _weights(weight_ptr, offset, dim, pairs, PAIR_BLOCK, REST_BLOCK)
            a, b, rest = a * weight_a, b * weight_b, rest * weight_rest
            mean = tl.sum(a * raw_a, axis=1) + tl.sum(b * raw_b, axis=1)
            if REST_BLOCK:
                mean += tl.sum(rest * raw_rest, axis=1)
            mean = (mean / dim)[:, None]
            a, b, rest = rstd * (a - raw_a * mean), rstd * (b - raw_b * mean), rstd * (rest - raw_rest * mean)
    _store_head(target, a, b, rest, mask, dim, pairs, PAIR_BLOCK, REST_BLOCK)


@triton.jit
def _load_head(
    source, xa_ptr, b_ptr, mask, dim, pairs, RANK: tl.constexpr, PAIR_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr
):  # fmt: skip
    """The first and second members of the pairs and the unrotated rest of a head, fp32, the update added."""
    pair = tl.arange(0, PAIR_BLOCK)[None, :]
    a = tl.load(source + pair, mask=mask & (pair < pairs), other=0.0).to(tl.float32)
    b = tl.load(source + pairs + pair, mask=mask & (pair < pairs), other=0.0).to(tl.float32)
    rest = tl.zeros((a.shape[0], 1), tl.float32)
    if REST_BLOCK:
        other = 2 * pairs + tl.arange(0, REST_BLOCK)[None, :]
        rest = tl.load(source + other, mask=mask & (other < dim), other=0.0).to(tl.float32)
    if RANK:
        rank = tl.arange(0, RANK)
        xa = tl.load(xa_ptr + rank[None, :], mask=mask, other=0.0)
        column = tl.arange(0, PAIR_BLOCK)[None, :]
        b_a = tl.load(b_ptr + column * RANK + rank[:, None], mask=column < pairs, other=0.0)
        b_b = tl.load(b_ptr + (pairs + column) * RANK + rank[:, None], mask=column < pairs, other=0.0)
        a += tl.dot(xa, b_a, input_precision="ieee")
        b += tl.dot(xa, b_b, input_precision="ieee")
        if REST_BLOCK:
            other = 2 * pairs + tl.arange(0, REST_BLOCK)[None, :]
            b_rest = tl.load(b_ptr + other * RANK + rank[:, None], mask=other < dim, other=0.0)
            rest += tl.dot(xa, b_rest, input_precision="ieee")
    return a, b, rest


@triton.jit
def _store_head(
    target, a, b, rest, mask, dim, pairs, PAIR_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr
):  # fmt: skip
    pair = tl.arange(0, PAIR_BLOCK)[None, :]
    tl.store(target + pair, a, mask=mask & (pair < pairs))
    tl.store(target + pairs + pair, b, mask=mask & (pair < pairs))
    if REST_BLOCK:
        other = 2 * pairs + tl.arange(0, REST_BLOCK)[None, :]
        tl.store(target + other, rest, mask=mask & (other < dim))


@triton.jit
def _angles(table_ptr, batch_stride, token_stride, token, tokens, length, pairs, PAIR_BLOCK: tl.constexpr):
    """Both members' entries of a table for every token, each [TOKENS, PAIR_BLOCK] fp32."""
    pair = tl.arange(0, PAIR_BLOCK)[None, :]
    row = table_ptr + ((token // length) * batch_stride + (token % length) * token_stride)[:, None]
    mask = (token < tokens)[:, None] & (pair < pairs)
    a = tl.load(row + pair, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(row + pairs + pair, mask=mask, other=0.0).to(tl.float32)
    return a, b


@triton.jit
def _weights(weight_ptr, offset, dim, pairs, PAIR_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr):
    pair = tl.arange(0, PAIR_BLOCK)[None, :]
    a = tl.load(weight_ptr + pair, mask=pair < pairs, other=0.0).to(tl.float32) + offset
    b = tl.load(weight_ptr + pairs + pair, mask=pair < pairs, other=0.0).to(tl.float32) + offset
    rest = tl.zeros((1, 1), tl.float32)
    if REST_BLOCK:
        other = 2 * pairs + tl.arange(0, REST_BLOCK)[None, :]
        rest = tl.load(weight_ptr + other, mask=other < dim, other=0.0).to(tl.float32) + offset
    return a, b, rest


@triton.jit
def _rstd(a, b, rest, dim, eps, REST_BLOCK: tl.constexpr):
    squares = tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)
    if REST_BLOCK:
        squares += tl.sum(rest * rest, axis=1)
    return tl.rsqrt(squares / dim + eps)[:, None]


@triton.jit
def _round(x, out_ptr):
    return x.to(out_ptr.dtype.element_ty).to(tl.float32)
