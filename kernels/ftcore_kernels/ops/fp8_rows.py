"""Products of a few rows with weights in float8_e4m3fn, by a kernel for few rows.

cuBLAS has none: `fp8_mm` pads to 272 rows and computes them all. Here a program takes a block of output columns and a
part of K, and multiplies with the weights first, `W x^T`: a block of 64 weight rows fills Hopper's matrix unit, however
few the rows of x are. Where K is in parts, a second launch adds their fp32 sums, in one order.
"""

# Triton has no types.
# mypy: disable-error-code="import-untyped,no-untyped-call,no-untyped-def,untyped-decorator"

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ftcore_kernels.ops import _launch
from ftcore_kernels.ops._few_rows import BELOW, add_parts, below_of, chunk_of, part_of, parts, tile
from ftcore_kernels.ops.fp8_linear import quantize_rows
from ftcore_kernels.reference.fp8_rows import check


class Config(NamedTuple):
    """How a product is cut."""

    block: int
    """Weight rows of a program; from 64 on they fill Hopper's matrix unit."""
    chunk: int
    """Of K at a time."""
    warps: int
    stages: int
    """Chunks that are on their way."""
    fill: int
    """Programs for each multiprocessor; K is cut into parts until there are so many."""


TABLE = {16: Config(64, 128, 4, 4, 3), 32: Config(64, 128, 4, 4, 3), 64: Config(128, 128, 4, 3, 2)}
"""Rows of x, padded, to how they are multiplied. `tests/bench/few_rows.py` measures others and prints the best."""


def fp8_rows(
    x: torch.Tensor,
    q: torch.Tensor,
    scale: torch.Tensor,
    below: torch.Tensor | None = None,
    config: Config | None = None,
) -> torch.Tensor:
    """Return `quantize_rows(x) @ (q * scale)^T`, summed in fp32, and `x below^T` beside it.

    :param x: `[M, K]`, fp16, bf16 or fp32, contiguous rows. Every 64 rows read the weights once.
    :param q: `[N, K]` float8_e4m3fn, contiguous. The GPU must have fp8 tensor cores, `fp8_linear.FP8`.
    :param scale: `[N]` fp32.
    :param below: `[P, K]` contiguous, in the dtype of x: further rows, not quantized, such as those of LoRA's A.
    :param config: Instead of `TABLE`'s.
    :returns: `[M, N + P]` contiguous, in the dtype of x. No gradients.
    """
    check(x, q, scale, below)
    _launch.check(x=x, scale=scale, **({} if below is None else {"below": below}))
    rows, inputs = x.shape
    extra = 0 if below is None else below.shape[0]
    width = q.shape[0] + extra
    out = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    q_x, scale_x = quantize_rows(x)
    chosen = config or TABLE[tile(rows)]
    blocks = triton.cdiv(q.shape[0], chosen.block) + triton.cdiv(extra, BELOW)
    row_blocks, chunks = triton.cdiv(rows, tile(rows)), triton.cdiv(inputs, chosen.chunk)
    number = parts(blocks * row_blocks, chunks, chosen.fill * _launch.processors(x.device))
    sums = out if number == 1 else torch.empty((number, rows, width), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _rows_kernel[(row_blocks, number, blocks)](
            x, x.stride(0), q_x, scale_x, q, scale, x if below is None else below, sums,
            rows, inputs, q.shape[0], extra, width,
            BELOW=BELOW if extra else 0, EVEN=inputs % chosen.chunk == 0, ROWS=tile(rows), BLOCK=chosen.block,
            CHUNK=chosen.chunk, STAGES=chosen.stages, num_warps=chosen.warps, num_stages=chosen.stages,
        )  # fmt: skip
        if number > 1:
            add_parts(sums, out)
    return out


@triton.jit(do_not_specialize=["rows", "number", "extra"])
def _rows_kernel(
    x_ptr, x_stride, q_x_ptr, scale_x_ptr, q_ptr, scale_ptr, below_ptr, out_ptr,
    rows, inputs, number, extra, width,
    BELOW: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One program per block of outputs, part of K and block of rows: x [ROWS, K] -> out [parts, rows, width]."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1).to(tl.int64)
    block = tl.program_id(2).to(tl.int64)
    begin, end = part_of(part, inputs, CHUNK)
    # Rows that are not there are others again, and are not stored.
    there = tl.minimum(row, rows - 1)
    out_ptr += part * rows * width
    below_blocks = tl.cdiv(extra, BELOW) if BELOW else 0
    if BELOW and block < below_blocks:
        below_of(
            x_ptr + there[:, None] * x_stride, below_ptr, out_ptr, block, row, begin, end, rows, inputs, extra, width,
            BELOW=BELOW, ROWS=ROWS, CHUNK=CHUNK, EVEN=EVEN,
        )  # fmt: skip
    if block >= below_blocks:
        PROMOTED: tl.constexpr = min(CHUNK, 128)
        column = (block - below_blocks) * BLOCK + tl.arange(0, BLOCK)
        source = tl.minimum(column, number - 1)
        x_rows = q_x_ptr + there[:, None] * inputs
        weights = q_ptr + source[:, None] * inputs
        sums = tl.zeros((BLOCK, ROWS), tl.float32)
        for k in tl.range(begin, end, CHUNK, num_stages=STAGES):
            weight, x = chunk_of(weights, k, end, EVEN, CHUNK), chunk_of(x_rows, k, end, EVEN, CHUNK)
            # Promoted to fp32 every 128 of K: the accumulators of fp8 tensor cores have about 14 bits.
            sums = tl.dot(weight, tl.trans(x), sums, max_num_imprecise_acc=PROMOTED)
        sums = sums * tl.load(scale_ptr + source)[:, None] * tl.load(scale_x_ptr + there)[None, :]
        mask = (row < rows)[:, None] & (column < number)[None, :]
        tl.store(out_ptr + row[:, None] * width + column[None, :], tl.trans(sums), mask=mask)
