"""The linear modules of a layer as they are now: base weight, and the LoRA that is active on it.

A module may be a plain `nn.Linear`, one of bitsandbytes' NF4 layers, or either of them under PEFT's LoRA. They are read
anew for every forward pass, so that merging, disabling or replacing an adapter takes effect at once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from ftcore_kernels.layers.uncovered import Uncovered
from ftcore_kernels.reference.nf4_dequantize import AbsmaxState
from ftcore_kernels.reference.nf4_rows import Packed


class Source(NamedTuple):
    """One linear module, and the LoRA that is active on it."""

    base: nn.Module
    a: nn.Parameter | None = None
    """`[r, K]`."""
    b: nn.Parameter | None = None
    """`[N, r]`."""
    scale: float = 1.0


def read(module: nn.Module) -> Source:
    """The base layer of a module and its active adapter. Raises Uncovered for what the layer does not compute."""
    if "lora_A" not in module._modules:
        return Source(_known(module))
    layer: Any = module
    base = _known(layer.base_layer)
    if layer.disable_adapters and not layer.merged_adapters:
        return Source(base)
    if layer.merged_adapters:
        raise Uncovered("an adapter is merged")
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if not active:
        return Source(base)
    if len(active) > 1:
        raise Uncovered("several adapters are active")
    name = active[0]
    if layer.lora_variant.get(name) is not None:
        raise Uncovered("a LoRA variant is active")
    if layer.training and getattr(layer.lora_dropout[name], "p", 0.0):
        raise Uncovered("LoRA has dropout")
    a, b = layer.lora_A[name], layer.lora_B[name]
    if b.bias is not None:
        raise Uncovered("LoRA has a bias")
    return Source(base, a.weight, b.weight, float(layer.scaling[name]))


def _known(base: nn.Module) -> nn.Module:
    if type(base) is nn.Linear or is_nf4(base) or is_fp8(base):
        return base
    raise Uncovered(f"{type(base).__name__} is no linear layer that it knows")


def is_nf4(base: nn.Module) -> bool:
    """Whether bitsandbytes holds the weight as NF4."""
    state = getattr(base.weight, "quant_state", None)
    return state is not None and getattr(state, "quant_type", None) == "nf4"


def packed(base: nn.Module) -> Packed:
    """The weight of a module that `is_nf4`."""
    weight: Any = base.weight
    state, nested = weight.quant_state, None
    if state.nested:
        inner = state.state2
        nested = AbsmaxState(inner.code, inner.absmax, state.offset, inner.blocksize)
    return Packed(weight.data, state.absmax, state.shape, state.blocksize, nested)


def is_fp8(base: nn.Module) -> bool:
    """Whether the weight is ftcore's float8 with a scale per output channel."""
    return isinstance(base.weight, torch.Tensor) and base.weight.dtype == torch.float8_e4m3fn
