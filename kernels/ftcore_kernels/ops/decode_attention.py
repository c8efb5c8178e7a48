"""Attention of one new token a row over a cache of keys and values, as few launches as the length allows.

A program serves the queries of one head of keys (grouped-query attention), and a part of the keys where rows and heads
are too few to fill the GPU (flash decoding); then a second launch joins the parts. The program that has the newest key
also writes it into the cache. How far a row reaches is read on the device, so that a recorded launch serves every step.
"""

# Triton has no types.
# mypy: disable-error-code="import-untyped,no-untyped-call,no-untyped-def,untyped-decorator"

import torch
import triton
import triton.language as tl

from ftcore_kernels.ops import _launch
from ftcore_kernels.reference.decode_attention import Scores

_KEYS = 64
"""Keys at a time, fewer where they are wide."""
_LEAST = 256
"""Keys that are worth a program of their own."""
_ROWS = 16
"""Queries that the matrix units take at least."""


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
    kv_heads, length = keys.shape[1], keys.shape[2]
    if any(t.stride(-1) != 1 for t in (q, k, v)) or not (keys.is_contiguous() and values.is_contiguous()):
        raise ValueError("q, k and v need contiguous last dimensions, and the cache must be contiguous")
    out = torch.empty((batch, 1, heads, dim), dtype=q.dtype, device=q.device)
    reach = length if scores.reach is None else min(length, scores.reach)
    parts = _parts(batch * kv_heads, reach, q.device)
    joined = out if parts == 1 else torch.empty((batch, heads, parts, dim), dtype=torch.float32, device=q.device)
    wide = max(16, triton.next_power_of_2(dim))
    weights = torch.empty((2, batch, heads, parts), dtype=torch.float32, device=q.device) if parts > 1 else joined
    with torch.cuda.device_of(q):
        _attend_kernel[(batch * kv_heads * parts,)](
            q, k, v, keys, values, positions, joined, weights, q if scores.sinks is None else scores.sinks,
            q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
            length, kv_heads, scores.scale, scores.softcap or 0.0, batch * heads * parts,
            WINDOW=scores.window or 0, CHUNK=scores.chunk or 0, CAPPED=scores.softcap is not None,
            SINKS=scores.sinks is not None, GROUP=heads // kv_heads,
            ROWS=max(_ROWS, triton.next_power_of_2(heads // kv_heads)), DIM=dim,
            WIDE=wide, KEYS=_keys(wide * q.element_size(), q.device), PARTS=parts, num_warps=4, num_stages=2,
        )  # fmt: skip
        if parts > 1:
            _join_kernel[(batch * heads,)](
                joined, weights, out, batch * heads * parts,
                DIM=dim, WIDE=triton.next_power_of_2(dim), PARTS=parts, ROUND=triton.next_power_of_2(parts),
                num_warps=4,
            )  # fmt: skip
    return out


def _parts(programs: int, reach: int, device: torch.device) -> int:
    """Parts of the keys: two programs for each multiprocessor, if there is that much to do."""
    wanted = triton.cdiv(2 * _launch.processors(device), programs)
    return max(1, min(wanted, triton.cdiv(reach, _LEAST)))


def _keys(size: int, device: torch.device) -> int:
    """Keys of `size` bytes at a time: two loads of them and their values fill half of the shared memory."""
    fit = _launch.shared_memory(device) // (2 * 4 * size)
    return max(16, min(_KEYS, 1 << (fit.bit_length() - 1)))


@triton.jit
def _attend_kernel(
    q_ptr, k_ptr, v_ptr, keys_ptr, values_ptr, positions_ptr, out_ptr, weights_ptr, sinks_ptr,
    q_row, q_head, k_row, k_head, v_row, v_head, length, kv_heads, scale, softcap, all_parts,
    WINDOW: tl.constexpr, CHUNK: tl.constexpr, CAPPED: tl.constexpr, SINKS: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr, KEYS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """One program per row, head of keys and part of the keys: q [GROUP, DIM] -> out or joined [GROUP, DIM]."""
    program = tl.program_id(0).to(tl.int64)
    part, pair = program % PARTS, program // PARTS
    row, head = pair // kv_heads, pair % kv_heads
    position = tl.load(positions_ptr + row)
    first = tl.maximum(position - WINDOW + 1, 0) if WINDOW else position * 0
    first = position // CHUNK * CHUNK if CHUNK else first
    share = tl.cdiv(tl.cdiv(position + 1 - first, PARTS), KEYS) * KEYS
    begin = first + part * share
    end = tl.minimum(begin + share, position + 1)

    member, column = tl.arange(0, ROWS), tl.arange(0, WIDE)
    real = column < DIM
    query = head * GROUP + member
    q = tl.load(
        q_ptr + row * q_row + query[:, None] * q_head + column[None, :],
        mask=(member[:, None] < GROUP) & real[None, :], other=0.0,
    )  # fmt: skip
    new_k = tl.load(k_ptr + row * k_row + head * k_head + column, mask=real, other=0.0)
    new_v = tl.load(v_ptr + row * v_row + head * v_head + column, mask=real, other=0.0)
    cached = (pair * length) * DIM
    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    if SINKS:  # a key without a value, seen before all others by the program of the first part
        sunk = member + part * ROWS < GROUP
        highest = tl.load(sinks_ptr + query, mask=sunk, other=float("-inf")).to(tl.float32)
        total = tl.where(sunk, 1.0, total)
    out = tl.zeros((ROWS, WIDE), tl.float32)
    for start in range(begin, end, KEYS):
        at = start + tl.arange(0, KEYS)
        old = (at < position)[:, None] & (at < end)[:, None] & real[None, :]
        place = cached + at[:, None] * DIM + column[None, :]
        newest = (at == position)[:, None]
        k = tl.where(newest, new_k[None, :], tl.load(keys_ptr + place, mask=old, other=0.0))
        v = tl.where(newest, new_v[None, :], tl.load(values_ptr + place, mask=old, other=0.0))
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if CAPPED:
            score = softcap * (2.0 / (1.0 + tl.exp(-2.0 * score / softcap)) - 1.0)
        score = tl.where((at < end)[None, :], score, float("-inf"))
        raised = tl.maximum(highest, tl.max(score, 1))
        weight, kept = tl.exp(score - raised[:, None]), tl.exp(highest - raised)
        total = total * kept + tl.sum(weight, 1)
        out = out * kept[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
        highest = raised
    if (begin < end) & (end == position + 1):
        tl.store(keys_ptr + cached + position * DIM + column, new_k, mask=real)
        tl.store(values_ptr + cached + position * DIM + column, new_v, mask=real)
    mask = (member[:, None] < GROUP) & real[None, :]
    place = row * kv_heads * GROUP + query
    if PARTS == 1:
        tl.store(out_ptr + place[:, None] * DIM + column[None, :], out / total[:, None], mask=mask)
    else:
        place = place * PARTS + part
        tl.store(out_ptr + place[:, None] * DIM + column[None, :], out, mask=mask)
        tl.store(weights_ptr + place, highest, mask=member < GROUP)
        tl.store(weights_ptr + all_parts + place, total, mask=member < GROUP)


@triton.jit
def _join_kernel(
    joined_ptr, weights_ptr, out_ptr, all_parts,
    DIM: tl.constexpr, WIDE: tl.constexpr, PARTS: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """One program per query: joined [PARTS, DIM] -> out [DIM]."""
    query = tl.program_id(0).to(tl.int64)
    part, column = tl.arange(0, ROUND), tl.arange(0, WIDE)
    there = part < PARTS
    highest = tl.load(weights_ptr + query * PARTS + part, mask=there, other=float("-inf"))
    total = tl.load(weights_ptr + all_parts + query * PARTS + part, mask=there, other=0.0)
    factor = tl.exp(highest - tl.max(highest, 0))
    mask = there[:, None] & (column < DIM)[None, :]
    parts = tl.load(joined_ptr + (query * PARTS + part)[:, None] * DIM + column[None, :], mask=mask, other=0.0)
    out = tl.sum(parts * factor[:, None], 0) / tl.sum(total * factor, 0)
    tl.store(out_ptr + query * DIM + column, out, mask=column < DIM)
