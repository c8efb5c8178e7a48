"""Products of a few rows with NF4 weights, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ftcore_kernels.reference.nf4_dequantize import AbsmaxState, nf4_dequantize


class Packed(NamedTuple):
    """A weight `[N, K]` as bitsandbytes packs it; `nf4_dequantize` says more."""

    packed: torch.Tensor
    """uint8, two weights a byte."""
    absmax: torch.Tensor
    """The scale of every `blocksize` weights."""
    shape: torch.Size
    blocksize: int = 64
    nested: AbsmaxState | None = None
    """What doubly quantized scales need."""


def nf4_rows(x: torch.Tensor, weights: Sequence[Packed], below: torch.Tensor | None = None) -> torch.Tensor:
    """Return `x W^T` of all weights side by side, summed in fp32 over the weights that `nf4_dequantize` returns.

    :param x: `[M, K]`, fp16, bf16 or fp32, contiguous rows.
    :param weights: Of one K, which is a multiple of their block size; all with doubly quantized scales, or none.
    :param below: `[P, K]` contiguous, in the dtype of x: further rows, not packed, such as those of LoRA's A.
    :returns: `[M, N + P]` contiguous, in the dtype of x. No gradients.
    """
    check(x, weights, below)
    wide = x.float()
    dense = [nf4_dequantize(w.packed, w.absmax, w.shape, w.blocksize, x.dtype, w.nested) for w in weights]
    parts = [wide @ matrix.float().T for matrix in (*dense, *(() if below is None else (below,)))]
    return torch.cat(parts, dim=1).to(x.dtype)


def fits(weights: Sequence[Packed]) -> bool:
    """Whether blocks of scales end with the rows, and all scales are of one kind."""
    first = weights[0]
    return all(
        len(w.shape) == 2
        and w.shape[1] % w.blocksize == 0
        and w.blocksize >= 8
        and (w.shape[1], w.blocksize, w.nested is None) == (first.shape[1], first.blocksize, first.nested is None)
        and (w.nested is None or first.nested is None or w.nested.blocksize2 == first.nested.blocksize2)
        for w in weights
    )


def check(x: torch.Tensor, weights: Sequence[Packed], below: torch.Tensor | None) -> None:
    """Refuse what is not one product."""
    if not weights or not fits(weights):
        raise ValueError("weights must share K, a multiple of their block size, and the kind of their scales")
    width = weights[0].shape[1]
    if x.dim() != 2 or x.shape[1] != width or x.stride(1) != 1:
        raise ValueError(f"x is {tuple(x.shape)}; it must be [M, {width}] with contiguous rows")
    if below is not None and (below.shape[1:] != (width,) or below.dtype != x.dtype or not below.is_contiguous()):
        raise ValueError(f"below is {tuple(below.shape)} {below.dtype}; it must be contiguous [P, {width}] {x.dtype}")
