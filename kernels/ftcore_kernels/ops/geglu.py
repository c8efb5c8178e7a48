"""`gelu(gate) * up`, the activation of Gemma-like MLPs: one kernel forward, one backward, fp32 in between.

Both forms are `gate * cdf`, where the exact cdf is the normal one and the tanh form's is a sigmoid, because
`(1 + tanh(u)) / 2 = sigmoid(2 u)`.
"""

# Triton has no types.
# mypy: disable-error-code="import-untyped,no-untyped-call,no-untyped-def,untyped-decorator"

from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from ftcore_kernels.ops import _launch
from ftcore_kernels.ops._launch import place, row_start

_BLOCK = 2048


def geglu(
    gate: torch.Tensor, up: torch.Tensor, approximate: Literal["tanh", "none"] = "tanh", round_gelu: bool = True
) -> torch.Tensor:
    """Return `gelu(gate) * up`.

    :param gate: `[..., I]`, fp16, bf16 or fp32, any strides: a half of a fused `[M, 2 I]` buffer is not copied.
    :param up: The shape and dtype of `gate`.
    :param approximate: `"tanh"` (Gemma: `gelu_pytorch_tanh`) or `"none"`, the exact form.
    :param round_gelu: Round what eager PyTorch stores in between, as transformers does; else round each result once.
    :returns: Contiguous, in the shape and dtype of `gate`.
    """
    _launch.check(gate=gate, up=up)
    if approximate not in ("tanh", "none"):
        raise ValueError(f"approximate is {approximate!r}; it must be 'tanh' or 'none'")
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f"gate {tuple(gate.shape)} {gate.dtype} and up {tuple(up.shape)} {up.dtype} must agree")
    out: torch.Tensor = _GeGLU.apply(gate, up, approximate == "tanh", round_gelu)
    return out


@triton.jit
def _forward_kernel(
    gate_ptr, gate_inner, gate_outer_stride, gate_inner_stride, up_ptr, up_inner, up_outer_stride, up_inner_stride,
    out_ptr, width, TANH: tl.constexpr, ROUND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK columns of a row: gate, up [rows, width] -> out [rows, width] contiguous."""
    row, col = place(width, BLOCK)
    gate_ptr += row_start(row, gate_inner, gate_outer_stride, gate_inner_stride)
    up_ptr += row_start(row, up_inner, up_outer_stride, up_inner_stride)
    gate = tl.load(gate_ptr + col, mask=col < width, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + col, mask=col < width, other=0.0).to(tl.float32)
    cdf, _ = _distribution(gate, TANH)
    gelu = gate * cdf
    if ROUND:
        gelu = gelu.to(out_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + row * width + col, gelu * up, mask=col < width)


@triton.jit
def _backward_kernel(
    dout_ptr, dout_inner, dout_outer_stride, dout_inner_stride,
    gate_ptr, gate_inner, gate_outer_stride, gate_inner_stride, up_ptr, up_inner, up_outer_stride, up_inner_stride,
    dgate_ptr, dup_ptr, width, TANH: tl.constexpr, ROUND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK columns of a row: dup = dout * gate * cdf, dgate = dout * up * (cdf + gate * density);
    both [rows, width] contiguous."""
    row, col = place(width, BLOCK)
    dout_ptr += row_start(row, dout_inner, dout_outer_stride, dout_inner_stride)
    gate_ptr += row_start(row, gate_inner, gate_outer_stride, gate_inner_stride)
    up_ptr += row_start(row, up_inner, up_outer_stride, up_inner_stride)
    dout = tl.load(dout_ptr + col, mask=col < width, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + col, mask=col < width, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + col, mask=col < width, other=0.0).to(tl.float32)
    cdf, density = _distribution(gate, TANH)
    gelu = gate * cdf
    dgelu = dout * up
    if ROUND:
        gelu = gelu.to(dup_ptr.dtype.element_ty).to(tl.float32)
        dgelu = dgelu.to(dgate_ptr.dtype.element_ty).to(tl.float32)
    tl.store(dgate_ptr + row * width + col, dgelu * (cdf + gate * density), mask=col < width)
    tl.store(dup_ptr + row * width + col, dout * gelu, mask=col < width)


@triton.jit
def _distribution(gate, TANH: tl.constexpr):
    """The cdf by which GELU weights its input, and the derivative of that cdf; fp32."""
    if TANH:
        # Saturated long before 100; the square of a larger gate would overflow and give 0 * inf in the density.
        near = tl.minimum(tl.maximum(gate, -100.0), 100.0)
        twice = 1.5957691216057308 * (near + 0.044715 * near * near * near)  # 2 sqrt(2 / pi)
        cdf = 1.0 / (1.0 + tl.exp(-twice))
        density = cdf * (1.0 - cdf) * 1.5957691216057308 * (1.0 + 0.134145 * near * near)
    else:
        cdf = 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
        density = tl.exp(-0.5 * gate * gate) * 0.3989422804014327
    return cdf, density


class _GeGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, tanh: bool, round_gelu: bool) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.tanh, ctx.round_gelu = tanh, round_gelu
        out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        _launch.elementwise(_forward_kernel, (gate, up), (out,), _BLOCK, TANH=tanh, ROUND=round_gelu)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        dup = torch.empty(up.shape, dtype=up.dtype, device=up.device)
        _launch.elementwise(
            _backward_kernel, (dout, gate, up), (dgate, dup), _BLOCK, TANH=ctx.tanh, ROUND=ctx.round_gelu
        )
        return dgate, dup, None, None
