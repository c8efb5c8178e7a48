"""RMS normalisation, forward and backward, each one pass over the input.

A program holds a tile of whole rows in registers: one row of hidden states, several where rows are short (QK-norm).
The backward needs `x`, `weight` and one fp32 number per row, nothing else is saved.
"""

# Triton has no types.
# mypy: disable-error-code="import-untyped,no-untyped-call,no-untyped-def,untyped-decorator"

from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from ftcore_kernels.ops import _launch
from ftcore_kernels.ops._launch import row_start

# A row has to fit the registers of one program; longer ones spill.
MAX_WIDTH = 32768

_TILE = 2048
# Of a backward that sums a weight gradient: enough to fill the GPU, few enough to keep the partial sums small.
_PROGRAMS_PER_PROCESSOR = 2


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0, cast: Literal["llama", "gemma"] = "llama"
) -> torch.Tensor:
    """Scale each row of `x` to unit root mean square, then by `offset + weight`.

    :param x: `[..., H]`, fp16, bf16 or fp32, H at most `MAX_WIDTH`, any strides.
    :param weight: `[H]`, fp16, bf16 or fp32; need not be the dtype of `x`.
    :param eps: Added to the mean square.
    :param offset: Added to the weight; 1 for Gemma.
    :param cast: Where to round. `"llama"`: to `x.dtype` before the weight. `"gemma"`: once, at the end.
    :returns: `[..., H]` in `x.dtype` for gemma, in the promotion of `x.dtype` and `weight.dtype` for llama.
    """
    _launch.check(x=x, weight=weight)
    if cast not in ("llama", "gemma"):
        raise ValueError(f"cast is {cast!r}; it must be 'llama' or 'gemma'")
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, the rows of x have shape {tuple(x.shape[-1:])}")
    if x.shape[-1] > MAX_WIDTH:
        raise ValueError(f"rows of {x.shape[-1]} elements are longer than this kernel's limit of {MAX_WIDTH}")
    out: torch.Tensor = _RMSNorm.apply(x, weight.contiguous(), eps, offset, cast == "gemma")
    return out


@triton.jit
def _rms_norm_kernel(
    x_ptr, x_inner, x_outer_stride, x_inner_stride, weight_ptr, out_ptr, rstd_ptr, rows, width, eps, offset,
    GEMMA: tl.constexpr, TILE_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per TILE_ROWS rows: x [rows, width] -> out [rows, width] contiguous, rstd [rows] fp32."""
    row = tl.program_id(0).to(tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    col = tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (col < width)[None, :]
    x = tl.load(x_ptr + row_start(row, x_inner, x_outer_stride, x_inner_stride)[:, None] + col, mask=mask, other=0.0)
    _store_normed(x, weight_ptr, out_ptr, rstd_ptr, row, rows, col, width, eps, offset, mask, GEMMA)


@triton.jit
def _store_normed(x, weight_ptr, out_ptr, rstd_ptr, row, rows, col, width, eps, offset, mask, GEMMA: tl.constexpr):
    """Rows x [TILE_ROWS, BLOCK] normalised, to out [rows, width], and their reciprocal root mean squares to rstd."""
    hidden = x.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(hidden * hidden, axis=1) / width + eps)
    normed = hidden * rstd[:, None]
    if not GEMMA:
        normed = normed.to(x.dtype).to(tl.float32)
    out = normed * _scale(weight_ptr, offset, col, width, GEMMA)
    tl.store(out_ptr + row[:, None] * width + col, out, mask=mask)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)


@triton.jit
def _rms_norm_back_kernel(
    dout_ptr, dout_inner, dout_outer_stride, dout_inner_stride, x_ptr, x_inner, x_outer_stride, x_inner_stride,
    weight_ptr, rstd_ptr, dx_ptr, partial_ptr, rows, width, offset,
    GEMMA: tl.constexpr, WEIGHT_GRAD: tl.constexpr, TILE_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """With n = x * rstd and g = dout * scale: dx = rstd * (g - n * mean(g * n)), dweight = sum over rows of dout * n.

    A program takes every programs-th tile and leaves its own sum of dweight in partial [programs, width]: adding those
    in a fixed order afterwards keeps the result the same in every run, which atomic adds would not.
    """
    program = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    scale = _scale(weight_ptr, offset, col, width, GEMMA)
    dweight = tl.zeros((TILE_ROWS, BLOCK), dtype=tl.float32)
    for tile in range(program, tl.cdiv(rows, TILE_ROWS), tl.num_programs(0)):
        row = (tile * TILE_ROWS + tl.arange(0, TILE_ROWS)).to(tl.int64)
        mask = (row < rows)[:, None] & (col < width)[None, :]
        x_start = row_start(row, x_inner, x_outer_stride, x_inner_stride)
        dout_start = row_start(row, dout_inner, dout_outer_stride, dout_inner_stride)
        x = tl.load(x_ptr + x_start[:, None] + col, mask=mask, other=0.0).to(tl.float32)
        dout = tl.load(dout_ptr + dout_start[:, None] + col, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)[:, None]
        normed = x * rstd
        dnormed = dout * scale
        mean = tl.sum(dnormed * normed, axis=1)[:, None] / width
        tl.store(dx_ptr + row[:, None] * width + col, rstd * (dnormed - normed * mean), mask=mask)
        if WEIGHT_GRAD:
            dweight += dout * normed
    if WEIGHT_GRAD:
        tl.store(partial_ptr + program * width + col, tl.sum(dweight, axis=0), mask=col < width)


@triton.jit
def _scale(weight_ptr, offset, col, width, GEMMA: tl.constexpr):
    """offset + weight as [1, BLOCK] fp32; llama rounds the sum to the weight's dtype as eager PyTorch would."""
    weight = tl.load(weight_ptr + col, mask=col < width, other=0.0)
    scale = weight.to(tl.float32) + offset
    if not GEMMA:
        scale = scale.to(weight.dtype).to(tl.float32)
    return scale[None, :]


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float, gemma: bool
    ) -> torch.Tensor:
        rows, width = _launch.as_rows(x), x.shape[-1]
        dtype = x.dtype if gemma else torch.promote_types(x.dtype, weight.dtype)
        out = torch.empty(x.shape, dtype=dtype, device=x.device)
        rstd = torch.empty(rows.number, dtype=torch.float32, device=x.device)
        tile_rows, block = _tile(width)
        if x.numel():
            with torch.cuda.device_of(x):
                _rms_norm_kernel[(triton.cdiv(rows.number, tile_rows),)](
                    *rows, weight, out, rstd, rows.number, width, eps, offset,
                    GEMMA=gemma, TILE_ROWS=tile_rows, BLOCK=block, num_warps=_launch.warps(tile_rows * block),
                )  # fmt: skip
        ctx.save_for_backward(x, weight, rstd)
        ctx.offset, ctx.gemma = offset, gemma
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        rows, width = _launch.as_rows(x), x.shape[-1]
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        tile_rows, block = _tile(width)
        programs = triton.cdiv(rows.number, tile_rows) if x.numel() else 0
        weight_grad = ctx.needs_input_grad[1]
        if weight_grad:
            programs = min(programs, _PROGRAMS_PER_PROCESSOR * _launch.processors(x.device))
        partial = torch.empty((programs if weight_grad else 0, width), dtype=torch.float32, device=x.device)
        if programs:
            with torch.cuda.device_of(x):
                _rms_norm_back_kernel[(programs,)](
                    *_launch.as_rows(dout), *rows, weight, rstd, dx, partial, rows.number, width, ctx.offset,
                    GEMMA=ctx.gemma, WEIGHT_GRAD=weight_grad, TILE_ROWS=tile_rows, BLOCK=block,
                    num_warps=_launch.warps(tile_rows * block),
                )  # fmt: skip
        dweight = partial.sum(0).to(weight.dtype) if weight_grad else None
        return dx, dweight, None, None, None


def _tile(width: int) -> tuple[int, int]:
    """(rows, padded width) of a program's tile."""
    block = triton.next_power_of_2(max(width, 1))
    return max(_TILE // block, 1), block
