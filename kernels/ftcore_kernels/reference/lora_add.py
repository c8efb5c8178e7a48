"""A projection's output with its low-rank update, added to the residual stream, in plain PyTorch."""

import torch

from ftcore_kernels.reference._precision import widen


def lora_add(
    residual: torch.Tensor | None,
    x: torch.Tensor,
    xa: torch.Tensor | None = None,
    b: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return `residual + x + xa @ b.T`, rounded once.

    :param residual: `[M, N]`, or None.
    :param x: `[M, N]`. Overwritten if there is no `out`.
    :param xa: `[M, R]`, or None.
    :param b: `[N, R]`.
    :param out: `[M, N]`, memory for the result instead of that of `x`.
    """
    total = widen(x)
    if residual is not None:
        total = total + widen(residual)
    if xa is not None and b is not None:
        total = total + widen(xa) @ widen(b).T
    return (x if out is None else out).copy_(total)
