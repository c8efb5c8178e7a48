"""Products of a few rows with NF4 weights, which are unpacked in registers and never written to memory.

A program takes a block of output columns and a part of K. It multiplies with the weights first, `W x^T`: a block of 64
weight rows fills Hopper's matrix unit, however few the rows of x are. The next weights are on their way while the last
are unpacked. Where K is in parts, a second launch adds their fp32 sums, in one order: the same bits every time.
"""

# Triton has no types.
# mypy: disable-error-code="import-untyped,no-untyped-call,no-untyped-def,untyped-decorator"

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ftcore_kernels.ops import _launch
from ftcore_kernels.ops._few_rows import BELOW, add_parts, below_of, chunk_of, part_of, parts, tile
from ftcore_kernels.ops.nf4_dequantize import codebook
from ftcore_kernels.reference.nf4_dequantize import AbsmaxState
from ftcore_kernels.reference.nf4_dequantize import check as check_packed
from ftcore_kernels.reference.nf4_rows import Packed, check


class Config(NamedTuple):
    """How a product is cut, and how a weight's number is found."""

    block: int
    """Weight rows of a program; from 64 on they fill Hopper's matrix unit."""
    chunk: int
    """Of K at a time."""
    warps: int
    stages: int
    """1 loads the next weights into registers; more have so many chunks in shared memory."""
    fill: int
    """Programs for each multiprocessor; K is cut into parts until there are so many."""
    lookup: str = "shuffle"
    """`shuffle`: a lane of the warp holds each of the sixteen numbers, in PTX; `gather`: shared memory does."""


TABLE = {16: Config(64, 128, 4, 3, 8), 32: Config(128, 128, 8, 3, 2), 64: Config(128, 128, 8, 3, 2)}
"""Rows of x, padded, to how they are multiplied. `tests/bench/few_rows.py` measures others and prints the best."""

_WIDE = 160_000
"""Bytes of shared memory that the stages above take with 32 bits; GPUs beside A100 and H100 have less."""


def nf4_rows(
    x: torch.Tensor, weights: Sequence[Packed], below: torch.Tensor | None = None, config: Config | None = None
) -> torch.Tensor:
    """Return `x W^T` of all weights side by side, summed in fp32 over the weights that `nf4_dequantize` returns.

    :param x: `[M, K]`, fp16, bf16 or fp32, contiguous rows. Every 64 rows read the weights once.
    :param weights: Up to three of one K, which is a multiple of their block size; all with doubly quantized scales, or
        none.
    :param below: `[P, K]` contiguous, in the dtype of x: further rows, not packed, such as those of LoRA's A.
    :param config: Instead of `TABLE`'s.
    :returns: `[M, N + P]` contiguous, in the dtype of x. No gradients.
    """
    check(x, weights, below)
    if len(weights) > 3:
        raise ValueError(f"{len(weights)} weights; a launch takes up to 3")
    for weight in weights:
        check_packed(weight.packed, weight.absmax, weight.shape, weight.blocksize, x.dtype, weight.nested)
    _launch.check(x=x, **({} if below is None else {"below": below}))
    rows, inputs = x.shape
    extra = 0 if below is None else below.shape[0]
    widths = [weight.shape[0] for weight in weights]
    width = sum(widths) + extra
    out = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    chosen = config or TABLE[tile(rows)]
    if config is None and x.element_size() == 4 and _launch.shared_memory(x.device) < _WIDE:
        chosen = chosen._replace(stages=1)
    blocks = sum(triton.cdiv(size, chosen.block) for size in widths) + triton.cdiv(extra, BELOW)
    row_blocks, chunks = triton.cdiv(rows, tile(rows)), triton.cdiv(inputs, chosen.chunk)
    number = parts(blocks * row_blocks, chunks, chosen.fill * _launch.processors(x.device))
    sums = out if number == 1 else torch.empty((number, rows, width), dtype=torch.float32, device=x.device)
    first = weights[0]
    padded = [weights[min(index, len(weights) - 1)] for index in range(3)]
    with torch.cuda.device_of(x):
        _rows_kernel[(row_blocks, number, blocks)](
            x, x.stride(0), *(weight.packed.view(-1).view(torch.int32) for weight in padded),
            *(weight.absmax.contiguous() for weight in padded), *(_nested(weight).code for weight in padded),
            *(_nested(weight).absmax2 for weight in padded), *(_nested(weight).offset for weight in padded),
            codebook(x.device), x if below is None else below, sums, rows, inputs, inputs // 8,
            inputs // first.blocksize, *[*widths, 0, 0][:3], extra, width,
            SOURCES=len(weights), BELOW=BELOW if extra else 0, BLOCKSIZE=first.blocksize,
            BLOCKSIZE2=first.nested.blocksize2 if first.nested is not None else 0, EVEN=inputs % chosen.chunk == 0,
            ROWS=tile(rows), BLOCK=chosen.block, CHUNK=chosen.chunk, STAGES=chosen.stages,
            LOOKUP="gather" if _launch.INTERPRETED else chosen.lookup,
            num_warps=chosen.warps, num_stages=max(chosen.stages, 2),
            enable_fp_fusion=False,  # a nested scale is rounded twice, as bitsandbytes does
        )  # fmt: skip
        if number > 1:
            add_parts(sums, out)
    return out


def _nested(weight: Packed) -> AbsmaxState:
    """What doubly quantized scales need, contiguous; anything where they are not."""
    code, absmax2, offset, blocksize2 = weight.nested or AbsmaxState(weight.absmax, weight.absmax, weight.absmax)
    return AbsmaxState(code.contiguous(), absmax2.contiguous(), offset, blocksize2)


@triton.jit(do_not_specialize=["rows", "width0", "width1", "width2", "extra"])
def _rows_kernel(
    x_ptr, x_stride, words0, words1, words2, absmax0, absmax1, absmax2, code0, code1, code2,
    second0, second1, second2, offset0, offset1, offset2, codebook_ptr, below_ptr, out_ptr,
    rows, inputs, words_per_row, scales_per_row, width0, width1, width2, extra, width,
    SOURCES: tl.constexpr, BELOW: tl.constexpr, BLOCKSIZE: tl.constexpr, BLOCKSIZE2: tl.constexpr, EVEN: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr, LOOKUP: tl.constexpr,
):  # fmt: skip
    """One program per block of outputs, part of K and block of rows: x [ROWS, K] -> out [parts, rows, width]."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1).to(tl.int64)
    block = tl.program_id(2).to(tl.int64)
    begin, end = part_of(part, inputs, CHUNK)
    # Rows that are not there are others again, and are not stored.
    x_rows = x_ptr + tl.minimum(row, rows - 1)[:, None] * x_stride
    out_ptr += part * rows * width
    below_blocks = tl.cdiv(extra, BELOW) if BELOW else 0
    if BELOW and block < below_blocks:
        below_of(
            x_rows, below_ptr, out_ptr, block, row, begin, end, rows, inputs, extra, width,
            BELOW=BELOW, ROWS=ROWS, CHUNK=CHUNK, EVEN=EVEN,
        )  # fmt: skip
    if block >= below_blocks:
        block -= below_blocks
        words_ptr, absmax_ptr, code_ptr, second_ptr, offset_ptr = words0, absmax0, code0, second0, offset0
        number, before = width0, 0
        if SOURCES > 1:
            blocks0 = tl.cdiv(width0, BLOCK)
            if block >= blocks0:
                words_ptr, absmax_ptr, code_ptr, second_ptr, offset_ptr = words1, absmax1, code1, second1, offset1
                block, number, before = block - blocks0, width1, width0
                if SOURCES > 2:
                    blocks1 = tl.cdiv(width1, BLOCK)
                    if block >= blocks1:
                        words_ptr, absmax_ptr, code_ptr = words2, absmax2, code2
                        second_ptr, offset_ptr = second2, offset2
                        block, number, before = block - blocks1, width2, width0 + width1
        _packed(
            x_rows, words_ptr, absmax_ptr, code_ptr, second_ptr, offset_ptr, codebook_ptr, out_ptr + before, block,
            row, begin, end, rows, words_per_row, scales_per_row, number, width,
            BLOCKSIZE=BLOCKSIZE, BLOCKSIZE2=BLOCKSIZE2, EVEN=EVEN, ROWS=ROWS, BLOCK=BLOCK, CHUNK=CHUNK, STAGES=STAGES,
            LOOKUP=LOOKUP,
        )  # fmt: skip


@triton.jit
def _packed(
    x_rows, words_ptr, absmax_ptr, code_ptr, second_ptr, offset_ptr, codebook_ptr, out_ptr, block, row, begin, end,
    rows, words_per_row, scales_per_row, number, width,
    BLOCKSIZE: tl.constexpr, BLOCKSIZE2: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    CHUNK: tl.constexpr, STAGES: tl.constexpr, LOOKUP: tl.constexpr,
):  # fmt: skip
    """Columns of out from packed weights: x [ROWS, K], words [number, K / 8], absmax [number, K / BLOCKSIZE]."""
    SCALES: tl.constexpr = max(CHUNK // BLOCKSIZE, 1)
    column = block * BLOCK + tl.arange(0, BLOCK)
    source = tl.minimum(column, number - 1)
    words = words_ptr + source[:, None] * words_per_row + tl.arange(0, CHUNK // 8)[None, :]
    first_scale = source[:, None] * scales_per_row + tl.arange(0, SCALES)[None, :]
    offset = tl.load(offset_ptr) if BLOCKSIZE2 else 0.0
    table = _table(codebook_ptr, LOOKUP)
    sums = tl.zeros((BLOCK, ROWS), tl.float32)
    if STAGES == 1:
        next_packed, next_scale, next_second = _read(
            words, absmax_ptr, second_ptr, first_scale, begin, end, BLOCKSIZE, BLOCKSIZE2, SCALES, EVEN, CHUNK
        )
    for k in tl.range(begin, end, CHUNK, num_stages=STAGES):
        if STAGES == 1:
            packed, scale, second = next_packed, next_scale, next_second
            ahead = tl.minimum(k + CHUNK, end - CHUNK) if EVEN else k + CHUNK
            next_packed, next_scale, next_second = _read(
                words, absmax_ptr, second_ptr, first_scale, ahead, end, BLOCKSIZE, BLOCKSIZE2, SCALES, EVEN, CHUNK
            )
        else:
            packed, scale, second = _read(
                words, absmax_ptr, second_ptr, first_scale, k, end, BLOCKSIZE, BLOCKSIZE2, SCALES, EVEN, CHUNK
            )
        x = chunk_of(x_rows, k, end, EVEN, CHUNK)
        if BLOCKSIZE2:
            scale = tl.load(code_ptr + scale.to(tl.int32)) * second + offset
        # Eight weights a word, the high half of each byte first.
        nibbles = tl.join(packed, packed >> 16)
        nibbles = tl.join(nibbles, nibbles >> 8)
        nibbles = tl.join(nibbles >> 4, nibbles)
        numbers = _numbers(table, nibbles, LOOKUP)
        numbers = tl.reshape(numbers, (BLOCK, SCALES, CHUNK // SCALES))
        # Rounded as the weights that `nf4_dequantize` writes.
        weight = tl.reshape((numbers * scale[:, :, None]).to(x.dtype), (BLOCK, CHUNK))
        sums = tl.dot(weight, tl.trans(x), sums, input_precision="ieee")
    mask = (row < rows)[:, None] & (column < number)[None, :]
    tl.store(out_ptr + row[:, None] * width + column[None, :], tl.trans(sums), mask=mask)


@triton.jit
def _read(
    words, absmax_ptr, second_ptr, first_scale, k, end,
    BLOCKSIZE: tl.constexpr, BLOCKSIZE2: tl.constexpr, SCALES: tl.constexpr, EVEN: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """A chunk of words and its scales: codes and scales of scales where they are doubly quantized."""
    scale_at = first_scale + k // BLOCKSIZE
    if EVEN:
        packed = tl.load(words + k // 8)
        scale = tl.load(absmax_ptr + scale_at)
        second = tl.load(second_ptr + scale_at // BLOCKSIZE2) if BLOCKSIZE2 else 0.0
    else:
        packed = tl.load(words + k // 8, mask=(k + 8 * tl.arange(0, CHUNK // 8) < end)[None, :], other=0)
        there = (k + BLOCKSIZE * tl.arange(0, SCALES) < end)[None, :]
        scale = tl.load(absmax_ptr + scale_at, mask=there, other=0)
        second = tl.load(second_ptr + scale_at // BLOCKSIZE2, mask=there, other=0.0) if BLOCKSIZE2 else 0.0
    return packed, scale, second


@triton.jit
def _table(codebook_ptr, LOOKUP: tl.constexpr):
    """The sixteen numbers, where `_numbers` looks them up."""
    if LOOKUP == "shuffle":  # number i in lanes i and i + 16: one scalar to Triton, which never looks at it
        return tl.inline_asm_elementwise(
            "{ .reg .u32 lane; .reg .u64 place; mov.u32 lane, %laneid; and.b32 lane, lane, 15; "
            "mad.wide.u32 place, lane, 4, $1; ld.global.nc.b32 $0, [place]; }",
            "=r,l", [codebook_ptr.to(tl.int64)], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return tl.load(codebook_ptr + tl.arange(0, 16))


@triton.jit
def _numbers(table, nibbles, LOOKUP: tl.constexpr):
    """What the lowest four bits of each stand for, fp32; the other bits may be anything."""
    if LOOKUP == "shuffle":  # within each half of a warp, which the hardware cuts the lane's index to
        bits = tl.inline_asm_elementwise(
            "shfl.sync.idx.b32 $0, $1, $2, 0x101f, 0xffffffff;", "=r,r,r", [table, nibbles],
            dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
        return bits.to(tl.float32, bitcast=True)
    else:
        flat = tl.gather(table, tl.reshape(nibbles & 15, (nibbles.numel,)), 0)
        return tl.reshape(flat, nibbles.shape)
