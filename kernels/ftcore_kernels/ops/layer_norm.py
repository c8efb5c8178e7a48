"""Layer normalisation, forward and backward, each one pass over the input.

A program holds a tile of whole rows in registers, so the variance is that of the centred row: nothing cancels. The
backward needs `x`, `weight` and two fp32 numbers per row, nothing else is saved.
"""

# Triton has no types.
# mypy: disable-error-code="import-untyped,no-untyped-call,no-untyped-def,untyped-decorator"

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from ftcore_kernels.ops import _launch
from ftcore_kernels.ops._launch import row_start
from ftcore_kernels.ops.rms_norm import _PROGRAMS_PER_PROCESSOR, MAX_WIDTH, _tile


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """Shift and scale each row of `x` to mean 0 and variance 1, then multiply by `weight` and add `bias`.

    :param x: `[..., H]`, fp16, bf16 or fp32, H at most `MAX_WIDTH`, any strides.
    :param weight: `[H]`, fp16, bf16 or fp32; need not be the dtype of `x`.
    :param bias: As `weight`, or None.
    :param eps: Added to the (biased) variance.
    :returns: `[..., H]` in `x.dtype`, contiguous, rounded once.
    """
    _launch.check(x=x, weight=weight, **({} if bias is None else {"bias": bias}))
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.shape != x.shape[-1:]:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, the rows of x have shape {tuple(x.shape[-1:])}")
    if x.shape[-1] > MAX_WIDTH:
        raise ValueError(f"rows of {x.shape[-1]} elements are longer than this kernel's limit of {MAX_WIDTH}")
    out: torch.Tensor = _LayerNorm.apply(x, weight.contiguous(), None if bias is None else bias.contiguous(), eps)
    return out


@triton.jit
def _forward_kernel(
    x_ptr, x_inner, x_outer_stride, x_inner_stride, weight_ptr, bias_ptr, out_ptr, mean_ptr, rstd_ptr,
    rows, width, eps, BIAS: tl.constexpr, TILE_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per TILE_ROWS rows: x [rows, width] -> out [rows, width] contiguous, mean and rstd [rows] fp32."""
    row = tl.program_id(0).to(tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    col = tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (col < width)[None, :]
    x = tl.load(x_ptr + row_start(row, x_inner, x_outer_stride, x_inner_stride)[:, None] + col, mask=mask, other=0.0)
    hidden = x.to(tl.float32)
    mean = tl.sum(hidden, axis=1) / width
    centred = tl.where(mask, hidden - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / width + eps)
    weight = tl.load(weight_ptr + col, mask=col < width, other=0.0).to(tl.float32)
    out = centred * rstd[:, None] * weight[None, :]
    if BIAS:
        out += tl.load(bias_ptr + col, mask=col < width, other=0.0).to(tl.float32)[None, :]
    tl.store(out_ptr + row[:, None] * width + col, out, mask=mask)
    tl.store(mean_ptr + row, mean, mask=row < rows)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)


@triton.jit
def _backward_kernel(
    dout_ptr, dout_inner, dout_outer_stride, dout_inner_stride, x_ptr, x_inner, x_outer_stride, x_inner_stride,
    weight_ptr, mean_ptr, rstd_ptr, dx_ptr, dweight_ptr, dbias_ptr, rows, width,
    WEIGHT_GRAD: tl.constexpr, BIAS_GRAD: tl.constexpr, TILE_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """With n = (x - mean) * rstd and g = dout * weight: dx = rstd * (g - mean(g) - n * mean(g * n)), and as sums over
    rows dweight of dout * n and dbias of dout, which every program leaves for its own rows in [programs, width]."""
    program = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + col, mask=col < width, other=0.0).to(tl.float32)[None, :]
    dweight = tl.zeros((TILE_ROWS, BLOCK), dtype=tl.float32)
    dbias = tl.zeros((TILE_ROWS, BLOCK), dtype=tl.float32)
    for tile in range(program, tl.cdiv(rows, TILE_ROWS), tl.num_programs(0)):
        row = (tile * TILE_ROWS + tl.arange(0, TILE_ROWS)).to(tl.int64)
        mask = (row < rows)[:, None] & (col < width)[None, :]
        x_start = row_start(row, x_inner, x_outer_stride, x_inner_stride)
        dout_start = row_start(row, dout_inner, dout_outer_stride, dout_inner_stride)
        x = tl.load(x_ptr + x_start[:, None] + col, mask=mask, other=0.0).to(tl.float32)
        dout = tl.load(dout_ptr + dout_start[:, None] + col, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + row, mask=row < rows, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)[:, None]
        normed = (x - mean) * rstd
        dnormed = dout * weight
        along = tl.sum(dnormed * normed, axis=1)[:, None] / width
        shift = tl.sum(dnormed, axis=1)[:, None] / width
        tl.store(dx_ptr + row[:, None] * width + col, rstd * (dnormed - shift - normed * along), mask=mask)
        if WEIGHT_GRAD:
            dweight += dout * normed
        if BIAS_GRAD:
            dbias += dout
    if WEIGHT_GRAD:
        tl.store(dweight_ptr + program * width + col, tl.sum(dweight, axis=0), mask=col < width)
    if BIAS_GRAD:
        tl.store(dbias_ptr + program * width + col, tl.sum(dbias, axis=0), mask=col < width)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
        rows, width = _launch.as_rows(x), x.shape[-1]
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        mean, rstd = (torch.empty(rows.number, dtype=torch.float32, device=x.device) for _ in range(2))
        tile_rows, block = _tile(width)
        if x.numel():
            with torch.cuda.device_of(x):
                _forward_kernel[(triton.cdiv(rows.number, tile_rows),)](
                    *rows, weight, weight if bias is None else bias, out, mean, rstd, rows.number, width, eps,
                    BIAS=bias is not None, TILE_ROWS=tile_rows, BLOCK=block,
                    num_warps=_launch.warps(tile_rows * block),
                )  # fmt: skip
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        rows, width = _launch.as_rows(x), x.shape[-1]
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        tile_rows, block = _tile(width)
        programs = triton.cdiv(rows.number, tile_rows) if x.numel() else 0
        _, weight_grad, bias_grad, _ = ctx.needs_input_grad
        if weight_grad or bias_grad:
            programs = min(programs, _PROGRAMS_PER_PROCESSOR * _launch.processors(x.device))
        dweights, dbiases = (
            torch.empty((programs if needed else 0, width), dtype=torch.float32, device=x.device)
            for needed in (weight_grad, bias_grad)
        )
        if programs:
            with torch.cuda.device_of(x):
                _backward_kernel[(programs,)](
                    *_launch.as_rows(dout), *rows, weight, mean, rstd, dx, dweights, dbiases, rows.number, width,
                    WEIGHT_GRAD=weight_grad, BIAS_GRAD=bias_grad, TILE_ROWS=tile_rows, BLOCK=block,
                    num_warps=_launch.warps(tile_rows * block),
                )  # fmt: skip
        dweight = dweights.sum(0).to(weight.dtype) if weight_grad else None
        dbias = dbiases.sum(0).to(ctx.bias_dtype) if bias_grad else None
        return dx, dweight, dbias, None
