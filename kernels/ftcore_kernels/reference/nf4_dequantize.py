"""Dequantization of NF4 weights in the layout of bitsandbytes, in plain PyTorch."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

# Quantiles of the normal distribution, scaled to [-1, 1]: appendix E of the QLoRA paper, as bitsandbytes rounds them.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


class AbsmaxState(NamedTuple):
    """Doubly quantized scales: a code c of block b stands for `code[c] * absmax2[b // blocksize2] + offset`."""

    code: torch.Tensor
    """`[256]` fp32: `state2.code` of bitsandbytes."""
    absmax2: torch.Tensor
    """`[ceil(blocks / blocksize2)]` fp32: `state2.absmax`."""
    offset: torch.Tensor
    """One fp32 number on the device: `offset`."""
    blocksize2: int = 256


def nf4_dequantize(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    shape: Sequence[int],
    blocksize: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    absmax_state: AbsmaxState | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the weights that bitsandbytes packed as NF4.

    :param packed: uint8, contiguous, any shape: two weights a byte, the first in the high half; the last half byte of
        an odd number is not used.
    :param absmax: The scale of every `blocksize` weights of the flattened tensor, the last block may be short:
        `[ceil(n / blocksize)]` fp32, or uint8 codes with `absmax_state`.
    :param shape: Of the weights.
    :param blocksize: A power of two, at least 2.
    :param dtype: Of the result: fp16, bf16 or fp32.
    :param absmax_state: What doubly quantized scales need.
    :param out: Contiguous memory for the result, in `shape` and `dtype`.
    :returns: Contiguous, in `shape` and `dtype`. No gradients.
    """
    check(packed, absmax, shape, blocksize, dtype, absmax_state)
    number = math.prod(shape)
    if absmax_state is not None:
        code, absmax2, offset, blocksize2 = absmax_state
        scale2 = absmax2.repeat_interleave(blocksize2)[: absmax.numel()]
        absmax = code[absmax.reshape(-1).int()] * scale2 + offset
    packed = packed.reshape(-1)
    halves = torch.stack((packed >> 4, packed & 15), dim=1).reshape(-1)[:number]
    values = torch.tensor(NF4, dtype=torch.float32, device=packed.device)[halves.int()]
    weights = (values * absmax.reshape(-1).repeat_interleave(blocksize)[:number]).to(dtype).view(tuple(shape))
    if out is None:
        return weights
    check_out(out, shape, dtype)
    return out.copy_(weights)


def check_out(out: torch.Tensor, shape: Sequence[int], dtype: torch.dtype) -> None:
    """Refuse memory that the result does not fit."""
    if tuple(out.shape) != tuple(shape) or out.dtype != dtype or not out.is_contiguous():
        raise ValueError(f"out is {tuple(out.shape)} {out.dtype}; it must be contiguous {tuple(shape)} {dtype}")


def check(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    shape: Sequence[int],
    blocksize: int,
    dtype: torch.dtype,
    absmax_state: AbsmaxState | None,
) -> None:
    """Refuse tensors that are not one packed weight: reading past the end of one would return noise."""
    number = math.prod(shape)
    blocks = -(-number // max(blocksize, 1))
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise TypeError(f"dtype is {dtype}; it must be float16, bfloat16 or float32")
    if packed.dtype != torch.uint8 or not packed.is_contiguous():
        raise TypeError(f"packed is {packed.dtype}; it must be contiguous uint8: view another storage dtype as that")
    scales = torch.float32 if absmax_state is None else torch.uint8
    if absmax.dtype != scales:
        given = "without" if absmax_state is None else "with"
        raise TypeError(f"absmax is {absmax.dtype}; it must be {scales} {given} absmax_state")
    if blocksize < 2 or blocksize & (blocksize - 1):
        raise ValueError(f"blocksize is {blocksize}; it must be a power of two, at least 2")
    if packed.numel() != (number + 1) // 2 or absmax.numel() != blocks:
        raise ValueError(
            f"shape {tuple(shape)} needs {(number + 1) // 2} packed bytes and {blocks} scales, "
            f"and got {packed.numel()} and {absmax.numel()}"
        )
    if absmax_state is not None:
        code, absmax2, offset, blocksize2 = absmax_state
        blocks2 = -(-blocks // blocksize2)
        if any(tensor.dtype != torch.float32 for tensor in (code, absmax2, offset)):
            raise TypeError("the tensors of absmax_state must be float32")
        if (code.numel(), absmax2.numel(), offset.numel()) != (256, blocks2, 1):
            raise ValueError(
                f"absmax_state needs 256 codes, {blocks2} scales and one offset, "
                f"and got {code.numel()}, {absmax2.numel()} and {offset.numel()}"
            )
