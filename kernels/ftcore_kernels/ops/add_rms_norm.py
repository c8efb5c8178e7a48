"""The residual addition and the RMS normalisation after it in one pass, forward and backward.

The sum is rounded to its dtype before it is normalised, as in eager PyTorch, where it is stored in between. The
backward adds the gradient of the sum's other users to that of the normalisation in fp32: one tensor for both addends.
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
from ftcore_kernels.ops.rms_norm import _PROGRAMS_PER_PROCESSOR, MAX_WIDTH, _scale, _store_normed, _tile


def add_rms_norm(
    residual: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    offset: float = 0.0,
    cast: Literal["llama", "gemma"] = "llama",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add `x` to `residual`, and normalise the sum as `rms_norm` does.

    :param residual: `[..., H]`, fp16, bf16 or fp32, H at most `MAX_WIDTH`, any strides. Not written to.
    :param x: The shape and dtype of `residual`.
    :param weight: `[H]`, fp16, bf16 or fp32; need not be the dtype of `x`.
    :param eps: Added to the mean square.
    :param offset: Added to the weight; 1 for Gemma.
    :param cast: Where to round. `"llama"`: to `x.dtype` before the weight. `"gemma"`: once, at the end.
    :returns: The sum, `[..., H]` in `x.dtype`, and the sum normalised, in `x.dtype` for gemma and in the promotion of
        `x.dtype` and `weight.dtype` for llama. Both contiguous.
    """
    _launch.check(residual=residual, x=x, weight=weight)
    if cast not in ("llama", "gemma"):
        raise ValueError(f"cast is {cast!r}; it must be 'llama' or 'gemma'")
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise ValueError(
            f"residual {tuple(residual.shape)} {residual.dtype} and x {tuple(x.shape)} {x.dtype} must agree"
        )
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, the rows of x have shape {tuple(x.shape[-1:])}")
    if x.shape[-1] > MAX_WIDTH:
        raise ValueError(f"rows of {x.shape[-1]} elements are longer than this kernel's limit of {MAX_WIDTH}")
    out: tuple[torch.Tensor, torch.Tensor] = _AddRMSNorm.apply(
        residual, x, weight.contiguous(), eps, offset, cast == "gemma"
    )
    return out


@triton.jit
def _add_rms_norm_kernel(
    residual_ptr, residual_inner, residual_outer_stride, residual_inner_stride,
    x_ptr, x_inner, x_outer_stride, x_inner_stride, weight_ptr, total_ptr, out_ptr, rstd_ptr, rows, width, eps, offset,
    GEMMA: tl.constexpr, TILE_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per TILE_ROWS rows: residual, x [rows, width] -> total, out [rows, width] contiguous, rstd [rows]."""
    row = tl.program_id(0).to(tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    col = tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (col < width)[None, :]
    residual_start = row_start(row, residual_inner, residual_outer_stride, residual_inner_stride)
    x_start = row_start(row, x_inner, x_outer_stride, x_inner_stride)
    x = tl.load(x_ptr + x_start[:, None] + col, mask=mask, other=0.0)
    residual = tl.load(residual_ptr + residual_start[:, None] + col, mask=mask, other=0.0)
    total = (residual.to(tl.float32) + x.to(tl.float32)).to(x.dtype)
    tl.store(total_ptr + row[:, None] * width + col, total, mask=mask)
    _store_normed(total, weight_ptr, out_ptr, rstd_ptr, row, rows, col, width, eps, offset, mask, GEMMA)


@triton.jit
def _add_rms_norm_back_kernel(
    dtotal_ptr, dtotal_inner, dtotal_outer_stride, dtotal_inner_stride,
    dout_ptr, dout_inner, dout_outer_stride, dout_inner_stride,
    total_ptr, weight_ptr, rstd_ptr, dx_ptr, normed_ptr, partial_ptr, rows, width, offset,
    GEMMA: tl.constexpr, TOTAL_GRAD: tl.constexpr, WEIGHT_GRAD: tl.constexpr, NORMED: tl.constexpr,
    TILE_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """With n = total * rstd and g = dout * scale: dx = dtotal + rstd * (g - n * mean(g * n)), and dweight as the sum
    over rows of dout * n, which every program leaves for its own rows in partial [programs, width]. With NORMED also
    the forward's normalised rows, which may take the place of dout, as dx may take that of dtotal."""
    program = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    scale = _scale(weight_ptr, offset, col, width, GEMMA)
    dweight = tl.zeros((TILE_ROWS, BLOCK), dtype=tl.float32)
    for tile in range(program, tl.cdiv(rows, TILE_ROWS), tl.num_programs(0)):
        row = (tile * TILE_ROWS + tl.arange(0, TILE_ROWS)).to(tl.int64)
        mask = (row < rows)[:, None] & (col < width)[None, :]
        dout_start = row_start(row, dout_inner, dout_outer_stride, dout_inner_stride)
        dout = tl.load(dout_ptr + dout_start[:, None] + col, mask=mask, other=0.0).to(tl.float32)
        total = tl.load(total_ptr + row[:, None] * width + col, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)[:, None]
        normed = total * rstd
        dnormed = dout * scale
        mean = tl.sum(dnormed * normed, axis=1)[:, None] / width
        dx = rstd * (dnormed - normed * mean)
        if TOTAL_GRAD:
            dtotal_start = row_start(row, dtotal_inner, dtotal_outer_stride, dtotal_inner_stride)
            dx += tl.load(dtotal_ptr + dtotal_start[:, None] + col, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + row[:, None] * width + col, dx, mask=mask)
        if WEIGHT_GRAD:
            dweight += dout * normed
        if NORMED:
            if not GEMMA:
                normed = normed.to(total_ptr.dtype.element_ty).to(tl.float32)
            tl.store(normed_ptr + row[:, None] * width + col, normed * scale, mask=mask)
    if WEIGHT_GRAD:
        tl.store(partial_ptr + program * width + col, tl.sum(dweight, axis=0), mask=col < width)


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, residual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float, gemma: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows, width = _launch.as_rows(x), x.shape[-1]
        dtype = x.dtype if gemma else torch.promote_types(x.dtype, weight.dtype)
        total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        out = torch.empty(x.shape, dtype=dtype, device=x.device)
        rstd = torch.empty(rows.number, dtype=torch.float32, device=x.device)
        tile_rows, block = _tile(width)
        if x.numel():
            with torch.cuda.device_of(x):
                _add_rms_norm_kernel[(triton.cdiv(rows.number, tile_rows),)](
                    *_launch.as_rows(residual), *rows, weight, total, out, rstd, rows.number, width, eps, offset,
                    GEMMA=gemma, TILE_ROWS=tile_rows, BLOCK=block, num_warps=_launch.warps(tile_rows * block),
                )  # fmt: skip
        ctx.save_for_backward(total, weight, rstd)
        ctx.set_materialize_grads(False)
        ctx.offset, ctx.gemma = offset, gemma
        return total, out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtotal: torch.Tensor | None, dout: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if dout is None:  # only the sum was used
            return dtotal, dtotal, None, None, None, None
        total, weight, rstd = ctx.saved_tensors
        rows, width = _launch.as_rows(dout), total.shape[-1]
        dx = torch.empty(total.shape, dtype=total.dtype, device=total.device)
        tile_rows, block = _tile(width)
        programs = triton.cdiv(rows.number, tile_rows) if total.numel() else 0
        weight_grad = ctx.needs_input_grad[2]
        if weight_grad:
            programs = min(programs, _PROGRAMS_PER_PROCESSOR * _launch.processors(total.device))
        partial = torch.empty((programs if weight_grad else 0, width), dtype=torch.float32, device=total.device)
        if programs:
            dtotal_rows = rows if dtotal is None else _launch.as_rows(dtotal)  # not read where there is none
            with torch.cuda.device_of(total):
                _add_rms_norm_back_kernel[(programs,)](
                    *dtotal_rows, *rows, total, weight, rstd, dx, dx, partial, rows.number, width, ctx.offset,
                    GEMMA=ctx.gemma, TOTAL_GRAD=dtotal is not None, WEIGHT_GRAD=weight_grad, NORMED=False,
                    TILE_ROWS=tile_rows, BLOCK=block, num_warps=_launch.warps(tile_rows * block),
                )  # fmt: skip
        dweight = partial.sum(0).to(weight.dtype) if weight_grad else None
        return dx, dx, dweight, None, None, None
