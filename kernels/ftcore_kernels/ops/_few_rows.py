"""What products of a few rows share: how K is cut into parts, rows that are not quantized, and the sum of the parts."""

# Triton has no types.
# mypy: disable-error-code="import-untyped,no-untyped-call,no-untyped-def,untyped-decorator"

import torch
import triton
import triton.language as tl

BELOW = 16
"""Rows that are not quantized, for a program."""
_SUM = 512
"""Elements for a program that adds parts."""


def tile(rows: int) -> int:
    """Rows of x for a program: what its matrix unit takes at least, 64 at most."""
    return min(64, max(16, int(triton.next_power_of_2(rows))))


def parts(programs: int, chunks: int, wanted: int) -> int:
    """Parts of K for so many programs as are wanted, none of them empty."""
    number = min(chunks, max(1, round(wanted / programs)))
    return int(triton.cdiv(chunks, triton.cdiv(chunks, number)))


def add_parts(sums: torch.Tensor, out: torch.Tensor) -> None:
    """Add fp32 `[parts, ...]` to contiguous `[...]`, in one order: the same bits every time."""
    number = out.numel()
    _sum_kernel[(triton.cdiv(number, _SUM),)](
        sums, out, number, sums.shape[0], PARTS=triton.next_power_of_2(sums.shape[0]), BLOCK=_SUM, num_warps=4
    )


@triton.jit(do_not_specialize=["parts"])
def _sum_kernel(sums_ptr, out_ptr, number, parts, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """One program per BLOCK elements: sums [parts, number] -> out [number]."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    part = tl.arange(0, PARTS)
    place = part.to(tl.int64)[:, None] * number + at[None, :]
    found = tl.load(sums_ptr + place, mask=(part < parts)[:, None] & (at < number)[None, :], other=0.0)
    tl.store(out_ptr + at, tl.sum(found, 0), mask=at < number)


@triton.jit
def part_of(part, inputs, CHUNK: tl.constexpr):
    """Where a part of K begins and ends; the launch has the parts on its second axis."""
    share = tl.cdiv(tl.cdiv(inputs, CHUNK), tl.num_programs(1)) * CHUNK
    begin = part.to(tl.int32) * share
    return begin, tl.minimum(begin + share, inputs)


@triton.jit
def chunk_of(rows, k, end, EVEN: tl.constexpr, CHUNK: tl.constexpr):
    """A chunk of rows whose first elements are given, zeros from the end on."""
    at = k + tl.arange(0, CHUNK)
    if EVEN:
        return tl.load(rows + at[None, :])
    return tl.load(rows + at[None, :], mask=(at < end)[None, :], other=0.0)


@triton.jit
def below_of(
    x_rows, below_ptr, out_ptr, block, row, begin, end, rows, inputs, extra, width,
    BELOW: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """The last columns of out, from weights that are not quantized: x [ROWS, K], below [extra, K]."""
    column = block * BELOW + tl.arange(0, BELOW)
    source = below_ptr + tl.minimum(column, extra - 1)[:, None] * inputs
    sums = tl.zeros((BELOW, ROWS), tl.float32)
    for k in tl.range(begin, end, CHUNK, num_stages=3):
        x = chunk_of(x_rows, k, end, EVEN, CHUNK)
        sums = tl.dot(chunk_of(source, k, end, EVEN, CHUNK), tl.trans(x), sums, input_precision="ieee")
    mask = (row < rows)[:, None] & (column < extra)[None, :]
    place = out_ptr + row[:, None] * width + (width - extra + column)[None, :]
    tl.store(place, tl.trans(sums), mask=mask)
