"""Attention of Llama's plan with RoPE on queries and keys in one launch.

With QK-norm, a sliding window and a soft cap where the family has them. Follows the forward of `LlamaAttention`,
`Qwen3Attention`, `MistralAttention` and `Gemma2Attention` of transformers 5 step by step; only the rotation differs.
The attention itself stays transformers' attention interface, so every implementation and mask of the model works as
before; only SDPA's masks are described, and made dense where no kernel takes the description.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ftcore import Role, bind
from ftcore_kernels.layers.kv_cache import NAMES, cache_in

if TYPE_CHECKING:
    import torch
    from torch import nn

Op = Callable[..., "tuple[torch.Tensor, torch.Tensor]"]


def forward(
    module: Any,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    attention_mask: torch.Tensor | None = None,
    *,
    op: Op,
    traits: frozenset[str],
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """hidden_states [B, S, H] -> ([B, S, H], attention weights or None)."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    shape = hidden_states.shape[:-1]
    heads = (*shape, -1, module.head_dim)
    query, key = module.q_proj(hidden_states).view(heads), module.k_proj(hidden_states).view(heads)
    if "qk_norm" in traits:
        query, key = module.q_norm(query), module.k_norm(key)
    value = module.v_proj(hidden_states).view(heads).transpose(1, 2)
    query, key = op(query.transpose(1, 2), key.transpose(1, 2), *position_embeddings)
    if (cache := cache_in(kwargs)) is not None:
        key, value = cache.update(key, value, module.layer_idx)
    kwargs = {name: given for name, given in kwargs.items() if name not in NAMES}

    if hasattr(module, "sliding_window"):
        kwargs["sliding_window"] = module.sliding_window
    elif "sliding_window" in traits:
        kwargs["sliding_window"] = getattr(module.config, "sliding_window", None)
    if "attention_softcap" in traits:
        kwargs["softcap"] = module.attn_logit_softcapping
    eager = sys.modules[type(module).__module__].eager_attention_forward
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, eager)
    out, weights = attend(
        module,
        query,
        key,
        value,
        attention_mask,
        dropout=module.attention_dropout if module.training else 0.0,
        scaling=module.scaling,
        **kwargs,
    )
    return module.o_proj(out.reshape(*shape, -1).contiguous()), weights


def install_triton(module: nn.Module, role: Role) -> None:
    """Bind the Triton op."""
    from ftcore_kernels.ops.rope import rope

    _install(module, role, rope)


def install_reference(module: nn.Module, role: Role) -> None:
    """Bind the plain PyTorch op."""
    from ftcore_kernels.reference.rope import rope

    _install(module, role, rope)


def _install(module: Any, role: Role, op: Op) -> None:
    from ftcore_kernels.layers.decoder.attention import use

    use(module, module.attn_logit_softcapping if "attention_softcap" in role.traits else None)
    bind(module, forward, op=op, traits=role.traits)
