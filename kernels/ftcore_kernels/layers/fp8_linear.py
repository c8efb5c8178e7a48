"""A frozen linear layer with weights in float8_e4m3fn, for adapters on top. An approximation."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from ftcore_kernels.reference.fp8_linear import E4M3, dequantize


class Fp8Linear(nn.Linear):
    """`x @ (weight * scale)^T + bias`, where x is rounded to fp8 row by row; the weights have no gradient.

    `weight` is `[out, in]` float8_e4m3fn and `scale` `[out]` float32. `weight_t`, a second copy `[in, out]`, lets the
    gradient of x be an fp8 product too; without it the weights are dequantized for that one.
    """

    scale: torch.Tensor
    weight_t: torch.Tensor | None

    def __init__(self, linear: nn.Linear, transposed: bool = True) -> None:
        """Quantize the weight of `linear`, 16 or 32 bits, where it is; its bias is kept and frozen.

        :param transposed: Keep the second copy.
        """
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        q, scale = _ops(linear.weight).quantize_weight(linear.weight.detach())
        self.weight = nn.Parameter(q, requires_grad=False)
        self.bias = linear.bias
        self.register_buffer("scale", scale)
        self.register_buffer("weight_t", q.t().contiguous() if transposed else None, persistent=False)
        # The dtype that PEFT takes for adapters of this layer, which it then raises to float32 as for any 16-bit layer.
        self.compute_dtype = linear.weight.dtype
        self.requires_grad_(False).train(linear.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x `[..., in]`, fp16, bf16 or fp32 -> `[..., out]` in the same dtype."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        out: torch.Tensor = _Fp8Product.apply(x, self.weight, self.weight_t, self.scale)  # type: ignore[no-untyped-call]
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def dequantize(self) -> torch.Tensor:
        """The weights `[out, in]` as they are multiplied, in float32."""
        return dequantize(self.weight.detach(), self.scale)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """Move to another device with the rest of the model, but stay in fp8 when the rest changes its dtype."""

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            there = fn(tensor)
            fixed = tensor.dtype == E4M3 or tensor is self.scale
            return there if not fixed or there.dtype == tensor.dtype else tensor.to(there.device)

        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype, device=self.scale.device)).dtype
        return super()._apply(moved, recurse)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        super()._load_from_state_dict(*args, **options)
        if self.weight_t is not None:  # it is in no state dict
            self.weight_t.copy_(self.weight.detach().t())


class _Fp8Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, q: torch.Tensor, q_t: torch.Tensor | None, scale: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(q, q_t, scale)
        out: torch.Tensor = _ops(x).fp8_mm(_matrix(x), q, scale)
        return out.view(*x.shape[:-1], q.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, q_t, scale = ctx.saved_tensors
        dx: torch.Tensor = _ops(dout).fp8_mm_t(_matrix(dout), q_t, q, scale)
        return dx.view(*dout.shape[:-1], q.shape[1]), None, None, None


def _matrix(x: torch.Tensor) -> torch.Tensor:
    """`[..., N]` as `[rows, N]`."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _ops(x: torch.Tensor) -> ModuleType:
    """The Triton ops on a GPU, if triton is installed; else their twins."""
    if x.device.type == "cuda" and find_spec("triton") is not None:
        from ftcore_kernels.ops import fp8_linear

        return fp8_linear
    from ftcore_kernels.reference import fp8_linear as reference

    return reference
