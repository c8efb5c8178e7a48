"""`silu(gate) * up`, the activation of Llama-like MLPs: one kernel forward, one backward, fp32 in between."""

# Triton has no types.
# mypy: disable-error-code="import-untyped,no-untyped-call,no-untyped-def,untyped-decorator"

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from ftcore_kernels.ops import _launch
from ftcore_kernels.ops._launch import Rows, row_start

_BLOCK = 2048


def swiglu(gate: torch.Tensor, up: torch.Tensor, round_silu: bool = True) -> torch.Tensor:
    """Return `silu(gate) * up`.

    :param gate: `[..., I]`, fp16, bf16 or fp32, any strides: a half of a fused `[M, 2 I]` buffer is not copied.
    :param up: The shape and dtype of `gate`.
    :param round_silu: Round what eager PyTorch stores in between, as transformers does; else round each result once.
    :returns: Contiguous, in the shape and dtype of `gate`.
    """
    _launch.check(gate=gate, up=up)
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f"gate {tuple(gate.shape)} {gate.dtype} and up {tuple(up.shape)} {up.dtype} must agree")
    out: torch.Tensor = _SwiGLU.apply(gate, up, round_silu)
    return out


@triton.jit
def _forward_kernel(
    gate_ptr, gate_inner, gate_outer_stride, gate_inner_stride, up_ptr, up_inner, up_outer_stride, up_inner_stride,
    out_ptr, width, ROUND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK columns of a row: gate, up [rows, width] -> out [rows, width] contiguous."""
    row, col = _place(width, BLOCK)
    gate_ptr += row_start(row, gate_inner, gate_outer_stride, gate_inner_stride)
    up_ptr += row_start(row, up_inner, up_outer_stride, up_inner_stride)
    gate = tl.load(gate_ptr + col, mask=col < width, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + col, mask=col < width, other=0.0).to(tl.float32)
    silu = gate / (1.0 + tl.exp(-gate))
    if ROUND:
        silu = silu.to(out_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + row * width + col, silu * up, mask=col < width)


@triton.jit
def _backward_kernel(
    dout_ptr, dout_inner, dout_outer_stride, dout_inner_stride,
    gate_ptr, gate_inner, gate_outer_stride, gate_inner_stride, up_ptr, up_inner, up_outer_stride, up_inner_stride,
    dgate_ptr, dup_ptr, width, ROUND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK columns of a row. With s = sigmoid(gate): dup = dout * gate * s,
    dgate = dout * up * s * (1 + gate * (1 - s)); both [rows, width] contiguous."""
    row, col = _place(width, BLOCK)
    dout_ptr += row_start(row, dout_inner, dout_outer_stride, dout_inner_stride)
    gate_ptr += row_start(row, gate_inner, gate_outer_stride, gate_inner_stride)
    up_ptr += row_start(row, up_inner, up_outer_stride, up_inner_stride)
    dout = tl.load(dout_ptr + col, mask=col < width, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + col, mask=col < width, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + col, mask=col < width, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    silu = gate * sigmoid
    dsilu = dout * up
    if ROUND:
        silu = silu.to(dup_ptr.dtype.element_ty).to(tl.float32)
        dsilu = dsilu.to(dgate_ptr.dtype.element_ty).to(tl.float32)
    dgate = dsilu * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    tl.store(dgate_ptr + row * width + col, dgate, mask=col < width)
    tl.store(dup_ptr + row * width + col, dout * silu, mask=col < width)


@triton.jit
def _place(width, BLOCK: tl.constexpr):
    """This program's row and columns, int64. One grid axis, because only the first may exceed 65535."""
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(width, BLOCK)
    return program // blocks, program % blocks * BLOCK + tl.arange(0, BLOCK)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, round_silu: bool) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.round_silu = round_silu
        out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        _launch_over(_forward_kernel, (gate, up), (out,), round_silu)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        dup = torch.empty(up.shape, dtype=up.dtype, device=up.device)
        _launch_over(_backward_kernel, (dout, gate, up), (dgate, dup), ctx.round_silu)
        return dgate, dup, None


def _launch_over(
    kernel: Any, inputs: tuple[torch.Tensor, ...], outputs: tuple[torch.Tensor, ...], round_silu: bool
) -> None:
    """Run an elementwise kernel over equal shapes; the outputs are contiguous."""
    if not outputs[0].numel():
        return
    if all(tensor.is_contiguous() for tensor in inputs):
        inputs = tuple(tensor.view(1, -1) for tensor in inputs)  # one long row: no row has a ragged end
    rows: list[Rows] = [_launch.as_rows(tensor) for tensor in inputs]
    width = inputs[0].shape[-1]
    block = min(_BLOCK, triton.next_power_of_2(width))
    with torch.cuda.device_of(outputs[0]):
        kernel[(rows[0].number * triton.cdiv(width, block),)](
            *(field for row in rows for field in row), *outputs, width,
            ROUND=round_silu, BLOCK=block, num_warps=_launch.warps(block),
        )  # fmt: skip
