"""From a transformers decoder layer to the parts that the manual layer computes with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
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

ATTENTION, FUSED_ATTENTION = (("q_proj", "k_proj", "v_proj"), ("o_proj",)), (("qkv_proj",), ("o_proj",))
MLP, FUSED_MLP = (("gate_proj", "up_proj"), ("down_proj",)), (("gate_up_proj",), ("down_proj",))
"""Names of the linear modules, those of one product together."""


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
        found: list[Any] = [torch.are_deterministic_algorithms_enabled()]
        for one in self._linears(module):
            linear = one.__dict__
            inside = linear["_modules"]
            if "merged_adapters" in linear:
                found += (linear["_disable_adapters"], *linear["merged_adapters"], *linear["_active_adapter"])
                found += linear["scaling"].values()
                # A record keeps the parameters of its own adapters, so that no others come to have their ids.
                for factors in (inside["lora_A"], inside["lora_B"]):
                    for factor in factors.__dict__["_modules"].values():
                        for weight in factor.__dict__["_parameters"].values():
                            found += (id(weight), weight is not None and weight.requires_grad)
            base = inside.get("base_layer")
            for weight in (one if base is None else base)._parameters.values():
                found += (0, False) if weight is None else (weight.data_ptr(), weight.requires_grad)
            if "original_module" in inside:  # PEFT's, of a module that is trained whole
                found += _about(one)
        for norm in self.norms(module):
            weight = norm._parameters.get("weight")
            found += _about(norm) if weight is None else (weight.data_ptr(), weight.requires_grad)
        return tuple(found)

    def groups(self, module: Any) -> list[list[nn.Module]]:
        """The linear modules of the four products."""
        attention, mlp = module.self_attn, module.mlp
        fused = "fused_projections" in self.traits
        of_attention, of_mlp = (FUSED_ATTENTION, FUSED_MLP) if fused else (ATTENTION, MLP)
        found = [[getattr(attention, name) for name in names] for names in of_attention]
        return found + [[getattr(mlp, name) for name in names] for names in of_mlp]

    def inner(self, module: Any) -> Iterator[nn.Module]:
        """The modules whose work is done without calling them."""
        parts = module._modules
        yield from (parts["self_attn"], parts["mlp"], *self.norms(module))
        for linear in self._linears(module):
            yield linear
            if (base := linear._modules.get("base_layer")) is not None:
                yield base

    def _linears(self, module: Any) -> Iterator[nn.Module]:
        """As `groups`, one by one, from the tables of modules: it is asked in every step, and attributes are slow."""
        fused, parts = "fused_projections" in self.traits, module._modules
        for side, groups in zip(
            ("self_attn", "mlp"), (FUSED_ATTENTION, FUSED_MLP) if fused else (ATTENTION, MLP), strict=True
        ):
            inside = parts[side]._modules
            for names in groups:
                for name in names:
                    yield inside[name]

    def norms(self, module: Any) -> list[nn.Module]:
        """All of the layer's, those of heads among them."""
        parts = module._modules
        found = [parts["input_layernorm"], parts["post_attention_layernorm"]]
        if "sandwich_norm" in self.traits:
            found += [parts["pre_feedforward_layernorm"], parts["post_feedforward_layernorm"]]
        if "qk_norm" in self.traits:
            heads = parts["self_attn"]._modules
            found += [heads["q_norm"], heads["k_norm"]]
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


def _about(wrapper: Any) -> tuple[int, bool]:
    """Where the weight is that a wrapper answers for, and whether it is trained."""
    return wrapper.weight.data_ptr(), wrapper.weight.requires_grad
