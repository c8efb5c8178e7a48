"""Layers whose attention computes by the manual layer's steps and whose MLP by itself: a mixture of experts.

The router, the experts and whatever is trained on them are the module's own, with ftcore's kernel for experts where
that was put there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ftcore_kernels.layers.decoder.attention import Attention
from ftcore_kernels.layers.decoder.dense import Dense
from ftcore_kernels.layers.decoder.linear import Fused
from ftcore_kernels.layers.decoder.parts import Ops
from ftcore_kernels.layers.decoder.sources import is_fp8, is_nf4, read
from ftcore_kernels.layers.decoder.structure import Structure
from ftcore_kernels.layers.uncovered import Uncovered
from ftcore_kernels.reference.lora_rope import HeadNorm, Heads
from ftcore_kernels.reference.norm_steps import Norm
from ftcore_kernels.sets._ops import DECODER_TRAITS

MIXTURE = "experts"
TRAITS = DECODER_TRAITS - {"sandwich_norm"} | {MIXTURE}
"""Of layers that are halved."""


@dataclass(slots=True)
class Half:
    """The half of a layer up to the norm before its MLP, as it is now."""

    ops: Ops
    heads: Heads
    qkv: Fused
    out: Fused
    input_norm: Norm
    middle_norm: Norm
    head_norm: HeadNorm | None

    @classmethod
    def of(cls, structure: Structure, module: Any, dtype: torch.dtype) -> Half:
        """Raises Uncovered for what the steps do not compute."""
        attention = module.self_attn
        if "fused_projections" in structure.traits:
            projections = [attention.qkv_proj]
        else:
            projections = [attention.q_proj, attention.k_proj, attention.v_proj]
        qkv, out = Fused([read(linear) for linear in projections]), Fused([read(attention.o_proj)])
        for fused in (qkv, out):
            base: Any = fused.sources[0].base
            if not (is_nf4(base) or is_fp8(base)) and base.weight.dtype != dtype:
                raise Uncovered(f"weights are {base.weight.dtype}, the hidden states {dtype}")
        norm, head_norm = structure.norm, None
        if "qk_norm" in structure.traits:
            q, k = norm(attention.q_norm), norm(attention.k_norm)
            head_norm = HeadNorm(q.weight, k.weight, q.eps, q.offset, q.gemma)
        dim = attention.head_dim
        return cls(
            ops=structure.ops,
            heads=Heads(out.inputs // dim, (qkv.width - out.inputs) // (2 * dim), dim),
            qkv=qkv,
            out=out,
            input_norm=norm(module.input_layernorm),
            middle_norm=norm(module.post_attention_layernorm),
            head_norm=head_norm,
        )

    @property
    def fused(self) -> tuple[Fused, Fused]:
        """The two products."""
        return self.qkv, self.out

    def forward(
        self, hidden: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor], attention: Attention, module: Any
    ) -> torch.Tensor:
        """The whole layer: `[B, S, H]` -> the same.

        :param angles: Cosines and sines `[B, S, D]` of the positions.
        :param module: The layer's MLP, which takes and returns `[B, S, H]`.
        """
        batch, length, width = hidden.shape
        x, dense, heads = hidden.contiguous().view(-1, width), Dense(self.ops), self.heads
        normed, _ = self.ops.norm(x, self.input_norm)
        raw, xa = self.qkv.product(normed, dense)
        qkv = self.ops.lora_rope(raw, *angles, heads, self.qkv.update(xa, segments=3), self.head_norm)
        whole = qkv.view(batch, length, -1, heads.dim).transpose(1, 2)
        attended, _ = attention.forward(*torch.split(whole, [heads.q, heads.kv, heads.kv], dim=1))
        y, xa = self.out.product(attended.reshape(x.shape[0], -1), dense)
        update = self.out.update(xa)
        room = None if y.is_contiguous() else torch.empty_like(x)  # the norm reads rows one behind the other
        middle = self.ops.lora_add(x, y, *((None, None) if update is None else update[:2]), room)
        normed, _ = self.ops.norm(middle, self.middle_norm)
        out: torch.Tensor = middle.view(hidden.shape) + module(normed.view(hidden.shape))
        return out
