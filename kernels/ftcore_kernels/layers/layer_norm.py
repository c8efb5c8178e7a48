"""LayerNorm modules with the op in one pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ftcore import Plan, Role, bind

Op = Callable[..., torch.Tensor]


def forward(module: Any, x: torch.Tensor, *, op: Op) -> torch.Tensor:
    """x [..., H] -> the same shape; in float32 under autocast, as PyTorch's own."""
    if torch.is_autocast_enabled(x.device.type):
        x = x.float()
    return op(x, module.weight, module.bias, module.eps)


def fits(module: Any, role: Role, plan: Plan) -> str | None:
    """Why the op is not this module, or None."""
    if len(module.normalized_shape) != 1:
        return "normalises the last dimension only"
    return None if module.weight is not None else "needs a weight"


def install_triton(module: nn.Module, role: Role) -> None:
    """Bind the Triton op."""
    from ftcore_kernels.ops.layer_norm import layer_norm

    bind(module, forward, op=layer_norm)


def install_reference(module: nn.Module, role: Role) -> None:
    """Bind the plain PyTorch op."""
    from ftcore_kernels.reference.layer_norm import layer_norm

    bind(module, forward, op=layer_norm)
