"""A mixture's experts: tokens sorted by expert, grouped products, and LoRA in its factors. The router is untouched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ftcore import Plan, Role, bind
from ftcore_kernels.layers.experts.products import grouped
from ftcore_kernels.layers.experts.weights import Factors, read
from ftcore_kernels.layers.uncovered import Uncovered, say

SILU = ("SiLU", "SiLUActivation")
"""PyTorch's class, and transformers' own."""

Activation = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def forward(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor, *, swiglu: Any
) -> torch.Tensor:
    """hidden_states `[T, H]`, and the numbers and weights `[T, k]` of each token's experts -> `[T, H]`."""
    try:
        base, factors = read(module)
        if getattr(base, "_is_expert_parallel", False):
            raise Uncovered("experts are spread over processes")
    except Uncovered as reason:
        if module.training and torch.is_grad_enabled():
            say("experts", str(reason))
        out: torch.Tensor = type(module).forward(module, hidden_states, top_k_index, top_k_weights)
        return out
    silu = type(base.act_fn).__name__ in SILU
    activation: Activation = swiglu if silu else lambda gate, up: base.act_fn(gate) * up
    rows = hidden_states.to(base.gate_up_proj.dtype)
    return mixture(rows, top_k_index, top_k_weights, base, factors, activation).to(hidden_states.dtype)


def mixture(
    x: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    base: Any,
    factors: dict[str, Factors],
    activation: Activation,
) -> torch.Tensor:
    """Each token's sum of `weight * down(activation(gate, up))` over its experts.

    :param x: `[T, H]`.
    :param index: `[T, k]` integers: a token's experts.
    :param weights: `[T, k]`.
    :param base: Has `gate_up_proj` `[E, 2 I, H]` and `down_proj` `[E, H, I]`.
    :param factors: LoRA on either, by name.
    :param activation: Of gate and up, `[S, I]` each.
    :returns: `[T, H]`, in the wider dtype of `x` and `weights`.
    """
    tokens, chosen = index.shape
    experts, order = index.reshape(-1).sort(stable=True)
    number = base.gate_up_proj.shape[0]
    # Counting would wait for the device; searching in what is sorted does not.
    ends = torch.searchsorted(experts, torch.arange(number, device=x.device), right=True).int()
    rows = x[order // chosen]
    gate, up = _projected(rows, base.gate_up_proj, factors.get("gate_up_proj"), ends).chunk(2, dim=-1)
    out = _projected(activation(gate, up), base.down_proj, factors.get("down_proj"), ends)
    out = out * weights.reshape(-1)[order].unsqueeze(-1)  # in 32 bits where the router's weights are, as transformers
    back = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=x.device))
    return out[back].view(tokens, chosen, -1).sum(1)


def _projected(x: torch.Tensor, weight: torch.Tensor, lora: Factors | None, ends: torch.Tensor) -> torch.Tensor:
    """`[S, K]` -> `[S, N]`: each row by its expert's weight `[E, N, K]`."""
    y = grouped(x, weight, ends)
    if lora is None:
        return y
    a, b = lora.of_experts(weight.shape[0], x.dtype)
    return y + grouped(grouped(x, a, ends), b, ends)


def fits(module: Any, role: Role, plan: Plan) -> str | None:
    """Why these experts cannot be computed so in this run, or None. Asked before the adapter is there."""
    if not module.gate_up_proj.is_floating_point() or module.gate_up_proj.element_size() < 2:
        return "does not read quantized experts"
    return None


def install_triton(module: nn.Module, role: Role) -> None:
    """Bind the experts with Triton's activation."""
    from ftcore_kernels.ops.swiglu import swiglu

    bind(module, forward, swiglu=swiglu)


def install_reference(module: nn.Module, role: Role) -> None:
    """Bind the experts with plain PyTorch's activation."""
    from ftcore_kernels.reference.swiglu import swiglu

    bind(module, forward, swiglu=swiglu)
