"""Rotary position embedding of queries and keys in one launch, forward and backward.

A program owns one token: it loads the token's angles once and turns every head of `q` and `k` by them, in fp32 and
with one rounding. The backward is the same kernel with the matrix of every pair transposed.
"""

# Triton has no types.
# mypy: disable-error-code="import-untyped,no-untyped-call,no-untyped-def,untyped-decorator"

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from ftcore_kernels.ops import _launch

_TILE = 2048  # pairs turned at a time


def rope(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate the first `Dr` channels of every head of `q` and `k`; the other channels pass through.

    :param q: `[B, Hq, S, D]`, fp16, bf16 or fp32, any strides.
    :param k: `[B, Hk, S, D]`, likewise.
    :param cos: `[B or 1, S, Dr]`, both members of a pair given (they may differ), fp16, bf16 or fp32. No gradient.
    :param sin: As `cos`.
    :param interleaved: Pair channels `(2i, 2i + 1)` instead of `(i, i + Dr / 2)`.
    :returns: The rotated `q` and `k`, in their own dtypes: `[B, H, S, D]` views of contiguous `[B, S, H, D]`.
    """
    _launch.check(q=q, k=k, cos=cos, sin=sin)
    batch, _, length, head_dim = q.shape
    if (k.shape[0], *k.shape[2:]) != (batch, length, head_dim):
        raise ValueError(f"q {tuple(q.shape)} and k {tuple(k.shape)} may differ in the number of heads only")
    if cos.shape != sin.shape or cos.dim() != 3 or cos.shape[0] not in (1, batch) or cos.shape[1] != length:
        raise ValueError(f"cos {tuple(cos.shape)} and sin {tuple(sin.shape)} must be [{batch} or 1, {length}, Dr]")
    if cos.shape[2] % 2 or cos.shape[2] > head_dim:
        raise ValueError(f"cos rotates {cos.shape[2]} channels: it must be an even number, at most {head_dim}")
    if cos.requires_grad or sin.requires_grad:
        raise ValueError("this kernel computes no gradient for cos and sin: use ftcore_kernels.reference.rope")
    out: tuple[torch.Tensor, torch.Tensor] = _Rope.apply(q, k, cos, sin, interleaved)
    return out


@triton.jit
def _rope_kernel(
    q_ptr, q_batch_stride, q_head_stride, q_token_stride, k_ptr, k_batch_stride, k_head_stride, k_token_stride,
    cos_ptr, cos_batch_stride, cos_token_stride, sin_ptr, sin_batch_stride, sin_token_stride,
    q_out_ptr, k_out_ptr, length, q_heads, k_heads, head_dim, pairs,
    TRANSPOSED: tl.constexpr, INTERLEAVED: tl.constexpr, Q_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr,
    PAIR_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per token: every pair (a, b) becomes (cos_a a + to_a b, cos_b b + to_b a). Writes [B, S, H, D]."""
    program = tl.program_id(0).to(tl.int64)
    batch, token = program // length, program % length
    cos_ptr += batch * cos_batch_stride + token * cos_token_stride
    sin_ptr += batch * sin_batch_stride + token * sin_token_stride
    one = tl.zeros((1, 1), dtype=tl.int32)  # a table has one row where q and k have one per head
    cos_a, cos_b = _load_pairs(cos_ptr + one, one == 0, pairs, PAIR_BLOCK, INTERLEAVED)
    sin_a, sin_b = _load_pairs(sin_ptr + one, one == 0, pairs, PAIR_BLOCK, INTERLEAVED)
    if TRANSPOSED:
        to_a, to_b = sin_b, -sin_a
    else:
        to_a, to_b = -sin_a, sin_b
    q_ptr += batch * q_batch_stride + token * q_token_stride
    k_ptr += batch * k_batch_stride + token * k_token_stride
    q_out_ptr += program * q_heads * head_dim
    k_out_ptr += program * k_heads * head_dim
    _turn_heads(q_ptr, q_head_stride, q_out_ptr, q_heads, head_dim, pairs, cos_a, cos_b, to_a, to_b,
                INTERLEAVED, Q_BLOCK, PAIR_BLOCK, REST_BLOCK)  # fmt: skip
    _turn_heads(k_ptr, k_head_stride, k_out_ptr, k_heads, head_dim, pairs, cos_a, cos_b, to_a, to_b,
                INTERLEAVED, K_BLOCK, PAIR_BLOCK, REST_BLOCK)  # fmt: skip


@triton.jit
def _turn_heads(
    x_ptr, head_stride, out_ptr, heads, head_dim, pairs, cos_a, cos_b, to_a, to_b,
    INTERLEAVED: tl.constexpr, HEAD_BLOCK: tl.constexpr, PAIR_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr,
):  # fmt: skip
    """Turn the heads of one token, HEAD_BLOCK at a time, and copy the channels past the rotated ones."""
    for first in range(0, heads, HEAD_BLOCK):
        head = first + tl.arange(0, HEAD_BLOCK)[:, None]
        # A head stride is S * D in a [B, H, S, D] buffer: heads times it passes 2^31 in long contexts.
        source = x_ptr + head.to(tl.int64) * head_stride
        target = out_ptr + head * head_dim
        a, b = _load_pairs(source, head < heads, pairs, PAIR_BLOCK, INTERLEAVED)
        new_a = a * cos_a + b * to_a
        new_b = b * cos_b + a * to_b
        _store_pairs(target, new_a, new_b, head < heads, pairs, PAIR_BLOCK, INTERLEAVED)
        if REST_BLOCK:
            rest = 2 * pairs + tl.arange(0, REST_BLOCK)[None, :]
            mask = (head < heads) & (rest < head_dim)
            tl.store(target + rest, tl.load(source + rest, mask=mask, other=0.0), mask=mask)


@triton.jit
def _load_pairs(ptr, row_mask, pairs, BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The two channels of every pair, each [R, BLOCK] fp32, of the rows at ptr [R, 1]."""
    if INTERLEAVED:
        # Read neighbours together and part them in registers: a load of every other channel would not be vectorised.
        channel = tl.arange(0, 2 * BLOCK)[None, :]
        both = tl.load(ptr + channel, mask=row_mask & (channel < 2 * pairs), other=0.0)
        a, b = tl.split(tl.reshape(both, (both.shape[0], BLOCK, 2)))
    else:
        channel = tl.arange(0, BLOCK)[None, :]
        a = tl.load(ptr + channel, mask=row_mask & (channel < pairs), other=0.0)
        b = tl.load(ptr + pairs + channel, mask=row_mask & (channel < pairs), other=0.0)
    return a.to(tl.float32), b.to(tl.float32)


@triton.jit
def _store_pairs(ptr, a, b, row_mask, pairs, BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The inverse of _load_pairs."""
    if INTERLEAVED:
        channel = tl.arange(0, 2 * BLOCK)[None, :]
        both = tl.reshape(tl.join(a, b), (a.shape[0], 2 * BLOCK))
        tl.store(ptr + channel, both, mask=row_mask & (channel < 2 * pairs))
    else:
        channel = tl.arange(0, BLOCK)[None, :]
        tl.store(ptr + channel, a, mask=row_mask & (channel < pairs))
        tl.store(ptr + pairs + channel, b, mask=row_mask & (channel < pairs))


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _turn(q, k, cos, sin, interleaved, transposed=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: torch.Tensor, dk: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return *_turn(dq, dk, cos, sin, ctx.interleaved, transposed=True), None, None, None


def _turn(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, transposed: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the kernel; `transposed` applies the transpose of the rotation, its inverse if it is a true one."""
    q, k, cos, sin = (_launch.last_contiguous(tensor) for tensor in (q, k, cos, sin))
    batch, q_heads, length, head_dim = q.shape
    k_heads, pairs = k.shape[1], cos.shape[2] // 2
    q_out = torch.empty((batch, length, q_heads, head_dim), dtype=q.dtype, device=q.device)
    k_out = torch.empty((batch, length, k_heads, head_dim), dtype=k.dtype, device=k.device)
    if q.numel() or k.numel():
        pair_block = triton.next_power_of_2(max(pairs, 1))
        q_block, k_block = (_head_block(heads, pair_block) for heads in (q_heads, k_heads))
        rest = head_dim - 2 * pairs
        with torch.cuda.device_of(q):
            _rope_kernel[(batch * length,)](
                q, *q.stride()[:3], k, *k.stride()[:3], *_table(cos, batch), *_table(sin, batch),
                q_out, k_out, length, q_heads, k_heads, head_dim, pairs,
                TRANSPOSED=transposed, INTERLEAVED=interleaved, Q_BLOCK=q_block, K_BLOCK=k_block,
                PAIR_BLOCK=pair_block, REST_BLOCK=triton.next_power_of_2(rest) if rest else 0,
                num_warps=_launch.warps(q_block * pair_block),
            )  # fmt: skip
    return q_out.transpose(1, 2), k_out.transpose(1, 2)


def _table(table: torch.Tensor, batch: int) -> tuple[torch.Tensor, int, int]:
    """A cos or sin table and its batch and token strides; a table of one row serves the whole batch."""
    return table, table.stride(0) if table.shape[0] == batch else 0, table.stride(1)


def _head_block(heads: int, pair_block: int) -> int:
    """How many heads a program turns at a time."""
    return min(int(triton.next_power_of_2(max(heads, 1))), max(_TILE // pair_block, 1))
