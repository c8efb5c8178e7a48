"""ftcore's attention under a name of its own in transformers' registries; a model uses it once its config says so."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ftcore.patching import UNDO
from ftcore_kernels.layers.decoder.attention.choice import EAGER, SDPA, eager, fused
from ftcore_kernels.layers.decoder.attention.kernels import Attention
from ftcore_kernels.layers.decoder.attention.mask import Mask, describe
from ftcore_kernels.layers.decoder.attention.said import taken

ON = frozenset({"cuda"})
"""Where there are kernels that take a described mask."""
BESIDES = ("position_bias", "cache", "softcap")
"""Options of SDPA's function that a kernel does not know."""


def use(module: Any, softcap: float | None = None) -> None:
    """Let the model of an attention module have its masks described, where transformers would make them dense.

    Its config names the attention, and the model, its layers and a layer that goes its own way all look there. Any
    other attention that somebody chose stays; eager attention is the only one of transformers' with a soft cap, so
    that it is nobody's choice there.
    """
    config, name = module.config, module.config._attn_implementation
    ours = {"sdpa": SDPA, "eager": EAGER if softcap is not None and not config.output_attentions else None}.get(name)
    if ours is not None:
        _register()
        config._attn_implementation = ours
        vars(module)[UNDO] = partial(setattr, config, "_attn_implementation", name)


def _register() -> None:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if SDPA not in ALL_ATTENTION_FUNCTIONS:
        ALL_MASK_ATTENTION_FUNCTIONS.register(SDPA, partial(describe, sdpa_mask, True))
        ALL_ATTENTION_FUNCTIONS.register(SDPA, attend)
        ALL_MASK_ATTENTION_FUNCTIONS.register(EAGER, partial(describe, eager_mask, False))
        ALL_ATTENTION_FUNCTIONS.register(EAGER, attend_eagerly)


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Mask | torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function of transformers: q `[B, Hq, S, D]`, k and v `[B, Hkv, T, D]` -> `[B, S, Hq, D]`."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    attention_mask = taken(attention_mask)
    if isinstance(attention_mask, Mask):
        same = query.shape[2:] == key.shape[2:] == value.shape[2:]
        more = any(options.get(name) is not None for name in BESIDES)
        kernel = None
        if same and not more and not dropout and query.device.type in ON and attention_mask.reading.complete:
            query, key, value = _as_sdpa_casts(query, key, value)
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            documents = attention_mask.reading.documents
            kernel = fused(query, query.shape[-1], scale, attention_mask.window, documents)
        if kernel is not None:
            return _Attend.apply(query, key, value, kernel), None
        attention_mask = attention_mask.dense_on(query.device)
    out: tuple[torch.Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
    )
    return out


def attend_eagerly(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Mask | torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The family's own eager attention, which also returns the weights: with its dense mask."""
    attention_mask = taken(attention_mask)
    if isinstance(attention_mask, Mask):
        attention_mask = attention_mask.dense_on(query.device)
    out: tuple[torch.Tensor, torch.Tensor] = eager(module)(module, query, key, value, attention_mask, **options)
    return out


def _as_sdpa_casts(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """In autocast's dtype, where it is on: tables of angles in fp32 leave queries and keys wider than values."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return list(tensors)
    return [tensor.to(torch.get_autocast_dtype(kind)) for tensor in tensors]


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kernel: Attention) -> torch.Tensor:
        out, rest = kernel.forward(q, k, v)
        tensors = [part for part in rest if isinstance(part, torch.Tensor)]
        ctx.save_for_backward(q, k, v, out, *tensors)
        ctx.kernel, ctx.others = kernel, [None if isinstance(part, torch.Tensor) else (part,) for part in rest]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, *tensors = ctx.saved_tensors
        found = iter(tensors)
        rest = tuple(next(found) if other is None else other[0] for other in ctx.others)
        return *ctx.kernel.backward(dout.contiguous(), q, k, v, out, rest), None
