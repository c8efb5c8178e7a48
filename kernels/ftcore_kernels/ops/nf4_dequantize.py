"""Dequantization of NF4 weights in the layout of bitsandbytes, also with doubly quantized scales, in one pass.

A program unpacks a run of bytes. The arithmetic is that of bitsandbytes, fp32 with a rounding after every step, so the
result is the same to the last bit.
"""

# Triton has no types.
# mypy: disable-error-code="import-untyped,no-untyped-call,no-untyped-def,untyped-decorator"

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ftcore_kernels.ops import _launch
from ftcore_kernels.reference.nf4_dequantize import NF4, AbsmaxState, check, check_out

_BLOCK = 2048  # bytes


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
    _launch.check(absmax=absmax if absmax_state is None else absmax_state.absmax2)
    tensors = (absmax,) if absmax_state is None else (absmax, absmax_state.code, absmax_state.absmax2,
                                                      absmax_state.offset)  # fmt: skip
    if any(tensor.device != packed.device for tensor in tensors):
        raise ValueError(f"packed is on {packed.device}; all that belongs to it must be there too")
    if out is None:
        out = torch.empty(tuple(shape), dtype=dtype, device=packed.device)
    check_out(out, shape, dtype)
    number = out.numel()
    if number:
        code, absmax2, offset, blocksize2 = absmax_state or (absmax, absmax, absmax, 2)
        block = min(_BLOCK, triton.next_power_of_2((number + 1) // 2))
        with torch.cuda.device_of(packed):
            _dequantize_kernel[(triton.cdiv(number, 2 * block),)](
                packed, absmax.contiguous(), codebook(packed.device), code.contiguous(), absmax2.contiguous(),
                offset, out, number, HALF_BLOCKSIZE=blocksize // 2, BLOCKSIZE2=blocksize2,
                DOUBLE=absmax_state is not None, BLOCK=block, num_warps=_launch.warps(2 * block),
                # A fused multiplication and addition would round the scale once where bitsandbytes rounds it twice.
                enable_fp_fusion=False,
            )  # fmt: skip
    return out


@triton.jit
def _dequantize_kernel(
    packed_ptr, absmax_ptr, codebook_ptr, code_ptr, absmax2_ptr, offset_ptr, out_ptr, number,
    HALF_BLOCKSIZE: tl.constexpr, BLOCKSIZE2: tl.constexpr, DOUBLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK bytes: packed [ceil(number / 2)], absmax [blocks] -> out [number]."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    byte = first + tl.arange(0, BLOCK)
    mask = 2 * byte < number
    both = tl.load(packed_ptr + byte, mask=mask, other=0).to(tl.int32)
    scale_at = byte // HALF_BLOCKSIZE
    scale = tl.load(absmax_ptr + scale_at, mask=mask, other=0)
    if DOUBLE:
        code = tl.load(code_ptr + scale.to(tl.int32), mask=mask, other=0.0)
        scale2 = tl.load(absmax2_ptr + scale_at // BLOCKSIZE2, mask=mask, other=0.0)
        scale = code * scale2 + tl.load(offset_ptr)
    # Sixteen numbers, in the first-level cache after the first load.
    high = tl.load(codebook_ptr + (both >> 4)) * scale
    low = tl.load(codebook_ptr + (both & 15)) * scale
    at = 2 * first + tl.arange(0, 2 * BLOCK)
    tl.store(out_ptr + at, tl.reshape(tl.join(high, low), (2 * BLOCK,)), mask=at < number)


_codebooks: dict[torch.device, torch.Tensor] = {}


def codebook(device: torch.device) -> torch.Tensor:
    """The sixteen numbers on `device`, copied there once."""
    if device not in _codebooks:
        _codebooks[device] = torch.tensor(NF4, dtype=torch.float32, device=device)
    return _codebooks[device]
