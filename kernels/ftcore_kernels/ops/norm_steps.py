"""RMS normalisation as the separate steps of a manual backward, which hands back what it computed on the way.

The same kernels as `rms_norm` and `add_rms_norm`. The backward adds the gradient of the residual stream, and can write
the normalised rows again over the gradient that it has read: the weight gradients of the product behind the norm need
them, and writing them here is half the traffic of normalising twice.
"""

# Triton has no types.
# mypy: disable-error-code="import-untyped,no-untyped-call,no-untyped-def,untyped-decorator"

import torch
import triton

from ftcore_kernels.ops import _launch
from ftcore_kernels.ops.add_rms_norm import _add_rms_norm_back_kernel, _add_rms_norm_kernel
from ftcore_kernels.ops.rms_norm import _PROGRAMS_PER_PROCESSOR, _rms_norm_kernel, _tile
from ftcore_kernels.reference.norm_steps import Norm, check


def norm(x: torch.Tensor, with_: Norm) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalise rows.

    :param x: `[M, H]` contiguous.
    :returns: `[M, H]` in `x.dtype`, and the reciprocal root mean squares `[M]` fp32.
    """
    _launch.check(x=x, weight=with_.weight)
    check(x)
    (rows, width), out = x.shape, torch.empty_like(x)
    rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
    tile_rows, block = _tile(width)
    if x.numel():
        with torch.cuda.device_of(x):
            _rms_norm_kernel[(triton.cdiv(rows, tile_rows),)](
                x, 1, width, 0, with_.weight, out, rstd, rows, width, with_.eps, with_.offset,
                GEMMA=with_.gemma, TILE_ROWS=tile_rows, BLOCK=block, num_warps=_launch.warps(tile_rows * block),
            )  # fmt: skip
    return out, rstd


def add_norm(residual: torch.Tensor, x: torch.Tensor, with_: Norm) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Add `x` to `residual`, both `[M, H]` contiguous, and normalise.

    :returns: The sum, in the memory of `x`; the sum normalised, `[M, H]`; the reciprocal root mean squares `[M]` fp32.
    """
    _launch.check(x=x, residual=residual, weight=with_.weight)
    check(residual, x)
    (rows, width), out = x.shape, torch.empty_like(x)
    rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
    tile_rows, block = _tile(width)
    if x.numel():
        with torch.cuda.device_of(x):
            _add_rms_norm_kernel[(triton.cdiv(rows, tile_rows),)](
                residual, 1, width, 0, x, 1, width, 0, with_.weight, x, out, rstd, rows, width, with_.eps,
                with_.offset, GEMMA=with_.gemma, TILE_ROWS=tile_rows, BLOCK=block,
                num_warps=_launch.warps(tile_rows * block),
            )  # fmt: skip
    return x, out, rstd


def norm_backward(
    dout: torch.Tensor,
    x: torch.Tensor,
    rstd: torch.Tensor,
    with_: Norm,
    residual_grad: torch.Tensor | None = None,
    *,
    into: torch.Tensor | None = None,
    normed: bool = False,
    weight_grad: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the gradient of the rows, plus that of the residual stream, and that of the weight.

    :param dout: `[M, H]` contiguous. Overwritten with the normalised rows if `normed`.
    :param x: `[M, H]` contiguous, what was normalised.
    :param rstd: `[M]` fp32, from the forward.
    :param residual_grad: `[M, H]` contiguous, or None.
    :param into: Memory for the gradient; may be `residual_grad`.
    :param normed: Whether the normalised rows are wanted.
    :param weight_grad: Whether the weight is trained.
    :returns: `[M, H]` in `x.dtype`, and `[H]` fp32 or None.
    """
    (rows, width), dx = x.shape, torch.empty_like(x) if into is None else into
    tile_rows, block = _tile(width)
    programs = triton.cdiv(rows, tile_rows) if x.numel() else 0
    if weight_grad:
        programs = min(programs, _PROGRAMS_PER_PROCESSOR * _launch.processors(x.device))
    partial = torch.empty((programs if weight_grad else 0, width), dtype=torch.float32, device=x.device)
    if programs:
        with torch.cuda.device_of(x):
            _add_rms_norm_back_kernel[(programs,)](
                dout if residual_grad is None else residual_grad, 1, width, 0, dout, 1, width, 0,
                x, with_.weight, rstd, dx, dout, partial, rows, width, with_.offset,
                GEMMA=with_.gemma, TOTAL_GRAD=residual_grad is not None, WEIGHT_GRAD=weight_grad, NORMED=normed,
                TILE_ROWS=tile_rows, BLOCK=block, num_warps=_launch.warps(tile_rows * block),
            )  # fmt: skip
    return dx, partial.sum(0) if weight_grad else None
