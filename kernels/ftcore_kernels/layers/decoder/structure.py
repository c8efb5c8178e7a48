"""From a transformers decoder layer to the parts that the manual layer computes with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import nn

from ftcore_kernels.layers.decoder.attention import Mask, choose
from ftcore_kernels.layers.decoder.fp8 import arrange_fp8
from ftcore_kernels.layers.decoder.linear import Fused, border_for
from ftcore_kernels.layers.decoder.parts import Layer, Ops
from ftcore_kernels.layers.decoder.sources import is_fp8, is_nf4, read
from ftcore_kernels.layers.decoder.stack import Stack, stack
from ftcore_kernels.layers.mlp import activation_name
from ftcore_kernels.layers.uncovered import Uncovered
from ftcore_kernels.reference.lora_glu import Activation
from ftcore_kernels.reference.lora_rope import HeadNorm, Heads
from ftcore_kernels.reference.norm_steps import Norm

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu": "gelu",
}
"""transformers' names of the activations that there are kernels for."""


@dataclass
class Structure:
    """How a family's layer is built, from its role's traits."""

    traits: frozenset[str]
    ops: Ops
    stacks: list[Stack | None] = field(default_factory=lambda: [None] * 4)
    """Of the four products, where the weights are one matrix."""

    def read(
        self,
        module: Any,
        hidden: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        mask: Mask | torch.Tensor | None,
        options: dict[str, Any],
    ) -> Layer:
        """The layer as it is now. Raises Uncovered for what the manual layer does not compute."""
        attention, mlp = module.self_attn, module.mlp
        if module.training and attention.attention_dropout:
            raise Uncovered("attention has dropout")
        qkv, out, gate_up, down = (
            Fused([read(linear) for linear in group], whole)
            for group, whole in zip(self.groups(module), self.stacks, strict=True)
        )
        dtype = hidden.dtype
        for fused in (qkv, out, gate_up, down):
            base = fused.sources[0].base
            if not (is_nf4(base) or is_fp8(base)) and base.weight.dtype != dtype:
                raise Uncovered(f"weights are {base.weight.dtype}, the hidden states {dtype}")
        sandwich = "sandwich_norm" in self.traits
        if sandwich:
            middle, after = module.pre_feedforward_layernorm, module.post_attention_layernorm
        else:
            middle, after = module.post_attention_layernorm, None
        head_norm = None
        if "qk_norm" in self.traits:
            q_norm, k_norm = self.norm(attention.q_norm), self.norm(attention.k_norm)
            head_norm = HeadNorm(q_norm.weight, k_norm.weight, q_norm.eps, q_norm.offset, q_norm.gemma)
        dim = attention.head_dim
        kv = (qkv.width - out.inputs) // 2
        options = {**options, **self.window(attention)}
        return Layer(
            ops=self.ops,
            batch=hidden.shape[0],
            length=hidden.shape[1],
            heads=Heads(out.inputs // dim, kv // dim, dim),
            activation=ACTIVATIONS[activation_name(mlp)],
            cos=position_embeddings[0],
            sin=position_embeddings[1],
            attention=choose(attention, hidden, mask, options.get("sliding_window"), self.softcap(attention), options),
            qkv=qkv,
            out=out,
            gate_up=gate_up,
            down=down,
            input_norm=self.norm(module.input_layernorm),
            middle_norm=self.norm(middle),
            head_norm=head_norm,
            attention_norm=self.norm(after) if after is not None else None,
            mlp_norm=self.norm(module.post_feedforward_layernorm) if sandwich else None,
        )

    def state(self, module: Any) -> tuple[Any, ...]:
        """What can change about a layer: which adapters are on, which weights there are and where, and what is trained.

        Asked in every step of recorded layers: it looks into modules' own tables, which takes a few microseconds.
        """
        linears = [vars(linear) for group in self.groups(module) for linear in group]
        adapters = [
            (
                layer["_disable_adapters"],
                tuple(layer["merged_adapters"]),
                tuple(layer["_active_adapter"]),
                tuple(layer["scaling"].items()),
                tuple(map(id, layer["_modules"]["lora_A"]._modules.values())),
            )
            for layer in linears
            if "merged_adapters" in layer
        ]
        bases = [layer["_modules"].get("base_layer") for layer in linears]
        tables = [
            layer["_parameters"] if base is None else base._parameters
            for layer, base in zip(linears, bases, strict=True)
        ]
        tables += [norm._parameters for norm in self.norms(module)]
        weights = [table["weight"] for table in tables]
        known = tuple((weight.data_ptr(), weight.requires_grad) for weight in weights)
        return (len(linears), *adapters, known, torch.are_deterministic_algorithms_enabled())

    def groups(self, module: Any) -> list[list[nn.Module]]:
        """The linear modules of the four products."""
        attention, mlp = module.self_attn, module.mlp
        if "fused_projections" in self.traits:
            return [[attention.qkv_proj], [attention.o_proj], [mlp.gate_up_proj], [mlp.down_proj]]
        return [
            [attention.q_proj, attention.k_proj, attention.v_proj],
            [attention.o_proj],
            [mlp.gate_proj, mlp.up_proj],
            [mlp.down_proj],
        ]

    def inner(self, module: Any) -> Iterator[nn.Module]:
        """The modules whose work is done without calling them."""
        yield from (module.self_attn, module.mlp, *self.norms(module))
        for linear in chain(*self.groups(module)):
            yield linear
            if "base_layer" in linear._modules:
                yield linear._modules["base_layer"]  # type: ignore[misc]

    def norms(self, module: Any) -> list[nn.Module]:
        """All of the layer's, those of heads among them."""
        found = [module.input_layernorm, module.post_attention_layernorm]
        if "sandwich_norm" in self.traits:
            found += [module.pre_feedforward_layernorm, module.post_feedforward_layernorm]
        if "qk_norm" in self.traits:
            found += [module.self_attn.q_norm, module.self_attn.k_norm]
        return found

    def norm(self, module: Any) -> Norm:
        """A norm and the family's conventions."""
        gemma = "unit_offset" in self.traits
        eps = getattr(module, "variance_epsilon", None) or module.eps
        return Norm(module.weight, eps, 1.0 if gemma else 0.0, gemma)

    def window(self, attention: Any) -> dict[str, int | None]:
        """The sliding window that transformers would hand to its attention function."""
        if "sliding_window" not in self.traits:
            return {}
        if hasattr(attention, "sliding_window"):
            return {"sliding_window": attention.sliding_window}
        return {"sliding_window": getattr(attention.config, "sliding_window", None)}

    def softcap(self, attention: Any) -> float | None:
        """The cap on the attention scores, if the family applies it: Gemma 3 has the attribute and does not."""
        cap: float | None = attention.attn_logit_softcapping if "attention_softcap" in self.traits else None
        return cap

    def arrange(self, module: nn.Module) -> None:
        """Put weights that share an input behind each other in memory, so that one product serves them."""
        for index, group in enumerate(self.groups(module)):
            bases = [getattr(linear, "base_layer", linear) for linear in group]
            if all(type(base) is nn.Linear for base in bases):
                self.stacks[index] = stack([base.weight for base in bases], border_for(group))
            elif all(is_fp8(base) for base in bases):
                arrange_fp8(bases)
