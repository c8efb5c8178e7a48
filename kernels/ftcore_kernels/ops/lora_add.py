"""A projection's output with its low-rank update, added to the residual stream in one pass.

A plain step of a manual backward, not a differentiable function: `ftcore_kernels.layers.decoder` uses it.
"""

# Triton has no types.
# mypy: disable-error-code="import-untyped,no-untyped-call,no-untyped-def,untyped-decorator"

import torch
import triton
import triton.language as tl

from ftcore_kernels.ops import _launch
from ftcore_kernels.ops.lora_glu import place

_TOKENS, _COLUMNS, _STEPS = 32, 128, 4


def lora_add(
    residual: torch.Tensor | None,
    x: torch.Tensor,
    xa: torch.Tensor | None = None,
    b: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return `residual + x + xa @ b.T`, rounded once.

    :param residual: `[M, N]` contiguous, or None.
    :param x: `[M, N]` with contiguous rows. Overwritten if there is no `out`.
    :param xa: `[M, R]` with contiguous rows, or None.
    :param b: `[N, R]` contiguous, R a power of two from 16 on.
    :param out: `[M, N]` contiguous, memory for the result instead of that of `x`.
    """
    _launch.check(x=x)
    out = x if out is None else out
    if x.numel():
        tokens, width = x.shape
        grid = (triton.cdiv(tokens, _TOKENS * _STEPS) * triton.cdiv(width, _COLUMNS),)
        update = (x, 0, x) if xa is None or b is None else (xa, xa.stride(0), b)
        with torch.cuda.device_of(x):
            _lora_add_kernel[grid](
                x if residual is None else residual, x, x.stride(0), out, out.stride(0), *update, tokens, width,
                RESIDUAL=residual is not None,
                RANK=0 if b is None else b.shape[1], TOKENS=_TOKENS, COLUMNS=_COLUMNS, STEPS=_STEPS, num_warps=4,
                num_stages=3 if b is None or b.shape[1] <= 16 else 1,
            )  # fmt: skip
    return out


@triton.jit
def _lora_add_kernel(
    residual_ptr, x_ptr, x_stride, out_ptr, out_stride, xa_ptr, xa_stride, b_ptr, tokens, width,
    RESIDUAL: tl.constexpr, RANK: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """One program per STEPS blocks [TOKENS, COLUMNS], one under the other."""
    first, column = place(width, TOKENS * STEPS, COLUMNS)
    b = 0.0
    if RANK:
        b = tl.load(b_ptr + column * RANK + tl.arange(0, RANK)[:, None], mask=column < width, other=0.0)
    for step in range(STEPS):
        token = first + step * TOKENS + tl.arange(0, TOKENS)[:, None]
        mask = (token < tokens) & (column < width)
        x = tl.load(x_ptr + token * x_stride + column, mask=mask, other=0.0).to(tl.float32)
        if RESIDUAL:
            x += tl.load(residual_ptr + token * width + column, mask=mask, other=0.0).to(tl.float32)
        if RANK:
            xa = tl.load(xa_ptr + token * xa_stride + tl.arange(0, RANK)[None, :], mask=token < tokens, other=0.0)
            x += tl.dot(xa, b, input_precision="ieee")
        tl.store(out_ptr + token * out_stride + column, x, mask=mask)
