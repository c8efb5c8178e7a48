"""RMSNorm modules with the op in place of the six eager kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ftcore import Role, bind

if TYPE_CHECKING:
    import torch
    from torch import nn

Op = Callable[..., "torch.Tensor"]


def forward(
    module: nn.Module, hidden_states: torch.Tensor, *, op: Op, eps: float, offset: float, cast: str
) -> torch.Tensor:
    """hidden_states [..., H] -> the same shape and dtype."""
    weight = getattr(module, "weight", None)
    if weight is None:  # a family whose norm comes with a weight and without
        weight = hidden_states.new_ones(hidden_states.shape[-1])
    return op(hidden_states, weight, eps, offset=offset, cast=cast)


def install_triton(module: nn.Module, role: Role) -> None:
    """Bind the Triton op."""
    from ftcore_kernels.ops.rms_norm import rms_norm

    _install(module, role, rms_norm)


def install_reference(module: nn.Module, role: Role) -> None:
    """Bind the plain PyTorch op."""
    from ftcore_kernels.reference.rms_norm import rms_norm

    _install(module, role, rms_norm)


def _install(module: nn.Module, role: Role, op: Op) -> None:
    offset = "unit_offset" in role.traits
    cast = "gemma" if offset or "weight_in_float32" in role.traits else "llama"
    eps = getattr(module, "variance_epsilon", None) or module.eps
    bind(module, forward, op=op, eps=eps, offset=1.0 if offset else 0.0, cast=cast)
