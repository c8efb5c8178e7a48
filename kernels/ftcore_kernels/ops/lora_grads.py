"""The two gradients of a low-rank update that read the gradient of its product, in one pass over that.

`dy B` adds up over columns and `dy^T xa` over rows. A program owns a block of both: it walks down its rows, keeps its
columns' part of the second sum in registers, and leaves its part of the first for each row. The parts are added in a
fixed order, so two runs agree to the last bit.
"""

# Triton has no types.
# mypy: disable-error-code="import-untyped,no-untyped-call,no-untyped-def,untyped-decorator"

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ftcore_kernels.ops import _launch
from ftcore_kernels.reference import lora_grads as reference

_ROWS = 32
_WALKS = (128, 256, 512, 1024)
_SEGMENTS, _SUMMED = 3, 64


def lora_grads(
    dy: torch.Tensor,
    xa: torch.Tensor,
    b: torch.Tensor,
    widths: Sequence[int],
    scales: Sequence[float],
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of `xa` and of B, where `y = xa @ b.T` and `b = scale * B` per segment of columns.

    :param dy: `[M, N]` with contiguous rows.
    :param xa: `[M, P R]` with contiguous rows: the P segments' inputs side by side; R a power of two from 16 on.
    :param b: `[N, R]` contiguous: the segments one under the other.
    :param widths: Columns of `dy` in each of at most three segments; they add up to N.
    :param scales: Of each segment.
    :param out: Memory for the gradient of `xa`, with contiguous rows; may be that of `xa`.
    :returns: `[M, P R]` in the dtype of `dy`, and `[N, R]` fp32.
    """
    _launch.check(dy=dy, xa=xa, b=b)
    if len(widths) > _SEGMENTS or sum(widths) != dy.shape[1] or b.shape[1] * len(widths) != xa.shape[1]:
        raise ValueError(f"segments {tuple(widths)} do not fit dy {tuple(dy.shape)} and xa {tuple(xa.shape)}")
    (tokens, width), rank = dy.shape, b.shape[1]
    if not dy.numel():
        return reference.lora_grads(dy, xa, b, widths, scales, out)
    columns, stages = _tile(rank, dy)
    blocks = [triton.cdiv(segment, columns) for segment in widths]
    walk = _walk(tokens, sum(blocks), _launch.processors(dy.device))
    walks = triton.cdiv(tokens, walk)
    dxa_parts = torch.empty((sum(blocks), tokens, rank), dtype=torch.float32, device=dy.device)
    db_parts = torch.empty((walks, width, rank), dtype=torch.float32, device=dy.device)
    dxa = torch.empty(xa.shape, dtype=dy.dtype, device=dy.device) if out is None else out
    db = torch.empty((width, rank), dtype=torch.float32, device=dy.device)
    segments, factors = (*widths, 0, 0)[:_SEGMENTS], (*map(float, scales), 1.0, 1.0)[:_SEGMENTS]
    rows = triton.cdiv(tokens, _SUMMED) * len(widths)
    with torch.cuda.device_of(dy):
        _lora_grads_kernel[(sum(blocks), walks)](
            dy, dy.stride(0), xa, xa.stride(0), b, dxa_parts, db_parts, tokens, width, *segments,
            RANK=rank, COLUMNS=columns, ROWS=_ROWS, WALK=walk, num_warps=4, num_stages=stages,
        )  # fmt: skip
        _lora_sums_kernel[(rows + triton.cdiv(width, _SUMMED),)](
            dxa_parts, dxa, dxa.stride(0), db_parts, db, tokens, width, walks, *segments, *factors,
            RANK=rank, COLUMNS=columns, SEGMENTS=len(widths), ROWS=_SUMMED, num_warps=4,
        )  # fmt: skip
    return dxa, db


def _tile(rank: int, dy: torch.Tensor) -> tuple[int, int]:
    """Columns of a program, and the depth of its loads in flight, for the shared memory that there is."""
    room = _launch.shared_memory(dy.device) * 2 // dy.element_size()
    if room >= 160_000:
        return 512, 3
    return (128, 2) if room >= _launch.SMALL or (rank <= 16 and room >= 60_000) else (64, 1)


def _walk(tokens: int, blocks: int, processors: int) -> int:
    """Rows of a program: as many as leave every processor two programs, for each walk leaves a part of dB to add."""
    for walk in reversed(_WALKS):
        if triton.cdiv(tokens, walk) * blocks >= 2 * processors:
            return walk
    return _WALKS[0]


@triton.jit
def _lora_grads_kernel(
    dy_ptr, dy_stride, xa_ptr, xa_stride, b_ptr, dxa_ptr, db_ptr, tokens, width, first_width, second_width, third_width,
    RANK: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, WALK: tl.constexpr,
):  # fmt: skip
    """One program per COLUMNS of a segment and WALK rows."""
    block = tl.program_id(0).to(tl.int64)
    first_blocks, second_blocks = tl.cdiv(first_width, COLUMNS), tl.cdiv(second_width, COLUMNS)
    segment = (block >= first_blocks).to(tl.int32) + (block >= first_blocks + second_blocks).to(tl.int32)
    inner = block - tl.where(segment > 0, first_blocks, 0) - tl.where(segment > 1, second_blocks, 0)
    start = tl.where(segment > 0, first_width, 0) + tl.where(segment > 1, second_width, 0)
    end = start + tl.where(segment == 0, first_width, tl.where(segment == 1, second_width, third_width))
    column = (start + inner * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    rank = tl.arange(0, RANK)
    b = tl.load(b_ptr + column[:, None] * RANK + rank[None, :], mask=(column < end)[:, None], other=0.0)
    db = tl.zeros((COLUMNS, RANK), tl.float32)
    walk = tl.program_id(1).to(tl.int64) * WALK
    for step in range(0, WALK, ROWS):
        row = walk + step + tl.arange(0, ROWS)
        rows = row < tokens
        dy = tl.load(
            dy_ptr + row[:, None] * dy_stride + column[None, :], mask=rows[:, None] & (column < end)[None, :], other=0.0
        )
        xa = tl.load(xa_ptr + row[:, None] * xa_stride + segment * RANK + rank[None, :], mask=rows[:, None], other=0.0)
        dxa = tl.dot(dy, b, input_precision="ieee")
        tl.store(dxa_ptr + (block * tokens + row[:, None]) * RANK + rank[None, :], dxa, mask=rows[:, None])
        db += tl.dot(tl.trans(dy), xa, input_precision="ieee")
    at = (tl.program_id(1).to(tl.int64) * width + column[:, None]) * RANK + rank[None, :]
    tl.store(db_ptr + at, db, mask=(column < end)[:, None])


@triton.jit
def _lora_sums_kernel(
    dxa_parts_ptr, dxa_ptr, dxa_stride, db_parts_ptr, db_ptr, tokens, width, walks,
    first_width, second_width, third_width, first_scale, second_scale, third_scale,
    RANK: tl.constexpr, COLUMNS: tl.constexpr, SEGMENTS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program per ROWS rows and segment of dxa, then one per ROWS rows of dB: the parts added up."""
    program, rank = tl.program_id(0).to(tl.int64), tl.arange(0, RANK)
    first_blocks, second_blocks = tl.cdiv(first_width, COLUMNS), tl.cdiv(second_width, COLUMNS)
    summed_rows = tl.cdiv(tokens, ROWS) * SEGMENTS
    total = tl.zeros((ROWS, RANK), tl.float32)
    if program < summed_rows:
        segment = program % SEGMENTS
        start = tl.where(segment > 0, first_blocks, 0) + tl.where(segment > 1, second_blocks, 0)
        third_blocks = tl.cdiv(third_width, COLUMNS)
        blocks = tl.where(segment == 0, first_blocks, tl.where(segment == 1, second_blocks, third_blocks))
        row = program // SEGMENTS * ROWS + tl.arange(0, ROWS)
        mask = (row < tokens)[:, None]
        for block in range(blocks):
            at = ((start + block) * tokens + row[:, None]) * RANK + rank[None, :]
            total += tl.load(dxa_parts_ptr + at, mask=mask, other=0.0)
        tl.store(dxa_ptr + row[:, None] * dxa_stride + segment * RANK + rank[None, :], total, mask=mask)
    else:
        row = (program - summed_rows) * ROWS + tl.arange(0, ROWS)
        mask = (row < width)[:, None]
        for walk in range(walks):
            at = (walk * width + row[:, None]) * RANK + rank[None, :]
            total += tl.load(db_parts_ptr + at, mask=mask, other=0.0)
        later = tl.where(row < first_width + second_width, second_scale, third_scale)
        scale = tl.where(row < first_width, first_scale, later)
        tl.store(db_ptr + row[:, None] * RANK + rank[None, :], total * scale[:, None], mask=mask)
