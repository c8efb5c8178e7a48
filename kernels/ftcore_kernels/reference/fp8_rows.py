"""Products of a few rows with float8 weights, in plain PyTorch."""

from __future__ import annotations

import torch

from ftcore_kernels.reference.fp8_linear import check_product, fp8_mm


def fp8_rows(x: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, below: torch.Tensor | None = None) -> torch.Tensor:
    """Return `fp8_mm`, and `x below^T` beside it.

    :param x: `[M, K]`, fp16, bf16 or fp32, contiguous rows.
    :param q: `[N, K]` float8_e4m3fn, contiguous.
    :param scale: `[N]` fp32.
    :param below: `[P, K]` contiguous, in the dtype of x: further rows, not quantized, such as those of LoRA's A.
    :returns: `[M, N + P]` contiguous, in the dtype of x. No gradients.
    """
    check(x, q, scale, below)
    y = fp8_mm(x, q, scale)
    return y if below is None else torch.cat((y, (x.float() @ below.float().T).to(x.dtype)), dim=1)


def check(x: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, below: torch.Tensor | None) -> None:
    """Refuse what is not one product."""
    check_product(x, q, scale)
    if x.stride(1) != 1:
        raise ValueError("x must have contiguous rows")
    if below is not None and (below.shape[1:] != x.shape[1:] or below.dtype != x.dtype or not below.is_contiguous()):
        expected = f"contiguous [P, {x.shape[1]}] {x.dtype}"
        raise ValueError(f"below is {tuple(below.shape)} {below.dtype}; it must be {expected}")
