"""What every launch needs: a device that can run it, rows without copies, and block sizes by plain arithmetic."""

# Triton has no types.
# mypy: disable-error-code="import-untyped,no-untyped-call,no-untyped-def,untyped-decorator"

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

# Triton decides this when a kernel is decorated, so read it at the same time: at import.
INTERPRETED: bool = bool(triton.knobs.runtime.interpret)

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class Rows(NamedTuple):
    """A `[..., N]` tensor as contiguous rows: `tensor` is the data, `row_start` finds row r from the rest."""

    tensor: torch.Tensor
    inner: int
    outer_stride: int
    inner_stride: int

    @property
    def number(self) -> int:
        """How many rows there are."""
        return math.prod(self.tensor.shape[:-1])


def check(**tensors: torch.Tensor) -> None:
    """Refuse tensors that no kernel here can read, by name."""
    device = next(iter(tensors.values())).device
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"{name} is {tensor.dtype}; these kernels take float16, bfloat16 and float32")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, the first argument is on {device}")
    if device.type == "cpu" and not INTERPRETED:
        raise RuntimeError(
            "Triton kernels need a GPU and got CPU tensors: call the same function of ftcore_kernels.reference, "
            "or set TRITON_INTERPRET=1 before the first import of triton to run the kernels in its interpreter"
        )


def last_contiguous(x: torch.Tensor) -> torch.Tensor:
    """Return `x` itself if its last dimension is contiguous, else a contiguous copy."""
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def as_rows(x: torch.Tensor) -> Rows:
    """View `x` `[..., N]` as rows. Copies only if the leading dimensions need more than two strides."""
    x = last_contiguous(x)
    dims = _merged_leading_dims(x)
    if len(dims) > 2:
        x = x.contiguous()
        dims = _merged_leading_dims(x)
    # Padded on the inner side, the usual case of one stride has inner == 1: a constant to Triton, so no division.
    (_, outer_stride), (inner, inner_stride) = (*dims, (1, 0), (1, 0))[:2]
    return Rows(x, inner, outer_stride, inner_stride)


def _merged_leading_dims(x: torch.Tensor) -> list[tuple[int, int]]:
    """(size, stride) of the leading dimensions, neighbours joined where one stride walks both."""
    dims: list[tuple[int, int]] = []
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if size == 1:
            continue
        if dims and dims[-1][1] == size * stride:
            dims[-1] = (dims[-1][0] * size, stride)
        else:
            dims.append((size, stride))
    return dims


@triton.jit
def row_start(row, inner, outer_stride, inner_stride):
    """Offset of `row` in the tensor of a `Rows`, in int64: int32 overflows at 2^31 elements."""
    row = row.to(tl.int64)
    return row // inner * outer_stride + row % inner * inner_stride


@triton.jit
def place(width, BLOCK: tl.constexpr):
    """This program's row and columns, int64. One grid axis, because only the first may exceed 65535."""
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(width, BLOCK)
    return program // blocks, program % blocks * BLOCK + tl.arange(0, BLOCK)


def elementwise(
    kernel: Any, inputs: tuple[torch.Tensor, ...], outputs: tuple[torch.Tensor, ...], block: int, **constants: Any
) -> None:
    """Run a kernel that finds its elements by `place` over inputs of one shape; the outputs are contiguous."""
    if not outputs[0].numel():
        return
    if all(tensor.is_contiguous() for tensor in inputs):
        inputs = tuple(tensor.view(1, -1) for tensor in inputs)  # one long row: no row has a ragged end
    rows = [as_rows(tensor) for tensor in inputs]
    width = inputs[0].shape[-1]
    block = min(block, triton.next_power_of_2(width))
    with torch.cuda.device_of(outputs[0]):
        kernel[(rows[0].number * triton.cdiv(width, block),)](
            *(field for row in rows for field in row), *outputs, width,
            **constants, BLOCK=block, num_warps=warps(block),
        )  # fmt: skip


def warps(tile: int) -> int:
    """Warps for a tile of `tile` elements: 16 elements a thread, which is two 16-byte loads in 16-bit dtypes."""
    return min(max(tile // 512, 1), 32)


def processors(device: torch.device) -> int:
    """Streaming multiprocessors of `device`; two in the interpreter, enough to exercise partial sums."""
    if device.type != "cuda":
        return 2
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


SMALL = 100_000
"""Bytes of shared memory below which kernels with tiles for dot products take smaller ones: GPUs before sm_80."""


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may take; plenty in the interpreter."""
    if device.type != "cuda":
        return 2**20
    return int(torch.cuda.get_device_properties(device).shared_memory_per_block_optin)
