"""RMS normalisation as the separate steps of a manual backward, in plain PyTorch."""

from typing import NamedTuple

import torch

from ftcore_kernels.reference._precision import widen


class Norm(NamedTuple):
    """An RMS norm: its weight `[H]` and its conventions."""

    weight: torch.Tensor
    eps: float
    offset: float = 0.0
    """Added to the weight; 1 for Gemma."""
    gemma: bool = False
    """Round once, at the end, instead of before the weight as well."""


def norm(x: torch.Tensor, with_: Norm) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalise rows.

    :param x: `[M, H]` contiguous.
    :returns: `[M, H]` in `x.dtype`, and the reciprocal root mean squares `[M]`.
    """
    check(x)
    wide = widen(x)
    rstd = torch.rsqrt(wide.pow(2).mean(-1) + with_.eps)
    return _scaled(wide * rstd[:, None], with_, x.dtype), rstd


def add_norm(residual: torch.Tensor, x: torch.Tensor, with_: Norm) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Add `x` to `residual`, both `[M, H]` contiguous, and normalise.

    :returns: The sum, in the memory of `x`; the sum normalised, `[M, H]`; the reciprocal root mean squares `[M]`.
    """
    check(residual, x)
    x.copy_(widen(residual) + widen(x))
    return x, *norm(x, with_)


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

    :param dout: `[M, H]`. Overwritten with the normalised rows if `normed`.
    :param x: `[M, H]`, what was normalised.
    :param rstd: `[M]`, from the forward.
    :param residual_grad: `[M, H]`, or None.
    :param into: Memory for the gradient; may be `residual_grad`.
    :param normed: Whether the normalised rows are wanted.
    :param weight_grad: Whether the weight is trained.
    :returns: `[M, H]` in `x.dtype`, and `[H]` or None.
    """
    wide, n = widen(dout), widen(x) * rstd[:, None]
    dweight = (wide * n).sum(0) if weight_grad else None
    g = wide * (with_.offset + widen(with_.weight))
    dx = rstd[:, None] * (g - n * (g * n).mean(-1, keepdim=True))
    if residual_grad is not None:
        dx = dx + widen(residual_grad)
    if normed:
        dout.copy_(_scaled(n, with_, x.dtype))
    return (dx.to(x.dtype) if into is None else into.copy_(dx)), dweight


def check(*several: torch.Tensor) -> None:
    """Refuse rows with gaps between them: the kernels walk over them as one block, and would read something else."""
    if not all(rows.is_contiguous() for rows in several):
        raise ValueError("rows must be contiguous, one behind the other")


def _scaled(n: torch.Tensor, with_: Norm, dtype: torch.dtype) -> torch.Tensor:
    if not with_.gemma:
        n = widen(n.to(dtype))
    return (n * (with_.offset + widen(with_.weight))).to(dtype)
