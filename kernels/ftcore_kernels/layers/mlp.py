"""Gated MLP with the activation and the product in one kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ftcore import Role, bind

if TYPE_CHECKING:
    import torch
    from torch import nn

Op = Callable[..., "torch.Tensor"]


def forward(module: nn.Module, hidden_states: torch.Tensor, *, op: Op) -> torch.Tensor:
    """hidden_states [..., H] -> [..., H]; the projections may carry adapters."""
    return module.down_proj(op(module.gate_proj(hidden_states), module.up_proj(hidden_states)))  # type: ignore[operator,no-any-return]


def install_triton(module: nn.Module, role: Role) -> None:
    """Bind the Triton op."""
    from ftcore_kernels.ops.swiglu import swiglu

    bind(module, forward, op=swiglu)


def install_reference(module: nn.Module, role: Role) -> None:
    """Bind the plain PyTorch op."""
    from ftcore_kernels.reference.swiglu import swiglu

    bind(module, forward, op=swiglu)
