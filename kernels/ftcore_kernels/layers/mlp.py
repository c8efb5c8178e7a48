"""Gated MLP with the activation and the product in one kernel."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ftcore import Plan, Role, bind

if TYPE_CHECKING:
    import torch
    from torch import nn

Op = Callable[..., "torch.Tensor"]

GELU = {"gelu_pytorch_tanh": "tanh", "gelu_new": "tanh", "gelu": "none"}
"""transformers' names of GELU to the form of the op."""
SILU = ("silu", "swish")


def forward(module: nn.Module, hidden_states: torch.Tensor, *, op: Op) -> torch.Tensor:
    """hidden_states [..., H] -> [..., H]; the projections may carry adapters."""
    return module.down_proj(op(module.gate_proj(hidden_states), module.up_proj(hidden_states)))  # type: ignore[operator,no-any-return]


def fits(module: Any, role: Role, plan: Plan) -> str | None:
    """Why no op is this MLP's activation, or None."""
    name = activation_name(module)
    if name in SILU or name in GELU or (not name and "geglu" not in role.traits):
        return None
    return f"has no kernel for the activation {name or 'of this MLP'}"


def activation_name(mlp: Any) -> str:
    """transformers' name of an MLP's activation, or nothing where its config does not say."""
    config = getattr(mlp, "config", None)
    name: str = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None) or ""
    return name


def install_triton(module: nn.Module, role: Role) -> None:
    """Bind the Triton op."""
    from ftcore_kernels.ops import geglu, swiglu

    _install(module, swiglu, geglu)


def install_reference(module: nn.Module, role: Role) -> None:
    """Bind the plain PyTorch op."""
    from ftcore_kernels.reference import geglu, swiglu

    _install(module, swiglu, geglu)


def _install(module: nn.Module, swiglu: ModuleType, geglu: ModuleType) -> None:
    form = GELU.get(activation_name(module))
    bind(module, forward, op=partial(geglu.geglu, approximate=form) if form else swiglu.swiglu)
