"""Which attention computes a call.

cuDNN's kernels are the fastest on Hopper, and torch would choose FlashAttention before them; masks keep both away (and
cuDNN's backward gives NaN with some of them), so that they are only used where there is none. FlashAttention takes a
window and documents, and scores with a soft cap have a function of their own. Everything else goes through
transformers' own attention function, whose backward is autograd's.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from ftcore_kernels.layers.decoder.attention.branches import Branched, Branches
from ftcore_kernels.layers.decoder.attention.capped import Capped
from ftcore_kernels.layers.decoder.attention.documents import Documents
from ftcore_kernels.layers.decoder.attention.kernels import Attention, Cudnn, Differentiated, Flash
from ftcore_kernels.layers.decoder.attention.mask import Mask, reading

SDPA = "ftcore_sdpa"
"""Name in transformers' registries: SDPA, whose masks are made only where they are needed."""
EAGER = "ftcore_eager"
"""Likewise, of the family's eager attention."""
BASES = {SDPA: "sdpa", EAGER: "eager"}
BY_HEADS = frozenset({*BASES, *BASES.values(), "flash_attention_2", "flash_attention_3"})
"""Attentions of transformers that treat all heads alike."""


def choose(
    module: Any,
    hidden: torch.Tensor,
    mask: Mask | torch.Tensor | None,
    window: int | None,
    softcap: float | None,
    options: dict[str, Any],
) -> Attention:
    """The attention for a call: `module` is transformers' attention module, `hidden` `[B, S, H]` its input."""
    if window is not None and window >= hidden.shape[1]:
        window = None
    name = module.config._attn_implementation
    causal = module.is_causal if options.get("is_causal") is None else options["is_causal"]  # of the config, if there
    # No mask at all means plain causality to SDPA, and to eager attention that nothing is hidden.
    if name in ("sdpa", *BASES) and causal and not (mask is None and name == EAGER):
        said, documents = reading(mask)
        if said and (mask is None or mask.window == window):
            if softcap is not None:  # no branches then: see `takes_branches`
                there = documents if documents is None else documents.on(hidden.device)
                return Capped(module.scaling, softcap, window, there)
            kernel = fused(hidden, module.head_dim, module.scaling, window, documents)
            if kernel is not None:
                return kernel
            if window is None and documents is None:
                return Differentiated(lambda q, k, v: _causal(q, k, v, module.scaling))
    # Somebody else's attention may know its heads by number, and a mask may be another for each.
    alike = name in BY_HEADS and (not isinstance(mask, torch.Tensor) or mask.dim() < 2 or mask.shape[1] == 1)
    return Differentiated(_of_transformers(module, mask, softcap, options), alike)


def fused(
    like: torch.Tensor, head_dim: int, scale: float, window: int | None, documents: Documents | Branches | None
) -> Attention | None:
    """The fastest kernel that takes a causal mask as it is described, on the device and in the dtype of `like`."""
    if like.device.type != "cuda" or like.dtype not in (torch.bfloat16, torch.float16):
        return None
    capability = _capability(like.device)
    if capability < (8, 0) or head_dim % 8 or head_dim > 256:
        return None
    if isinstance(documents, Branches):
        return Branched(scale, documents.on(like.device)) if window is None else None
    if documents is not None:
        documents = documents.on(like.device)
        window = None if window is None or window >= documents.longest else window
    deterministic = torch.are_deterministic_algorithms_enabled()
    plain = window is None and documents is None and like.shape[-2] > 1  # PyTorch asks cuDNN for no row of one token
    if plain and head_dim <= 128 and capability >= (9, 0) and not deterministic:
        return Cudnn(scale)
    return Flash(scale, window, documents)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=gqa).transpose(1, 2)


def eager(module: Any) -> Callable[..., Any]:
    """The eager attention function of a module's family."""
    function: Callable[..., Any] = sys.modules[type(module).__module__].eager_attention_forward
    return function


def _of_transformers(
    module: Any, mask: Mask | torch.Tensor | None, softcap: float | None, options: dict[str, Any]
) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = module.config._attn_implementation
    function = ALL_ATTENTION_FUNCTIONS.get_interface(BASES.get(name, name), eager(module))
    options = dict(options)
    if softcap is not None:
        options["softcap"] = softcap

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        dense = mask.dense_on(q.device) if isinstance(mask, Mask) else mask
        out: torch.Tensor = function(module, q, k, v, dense, dropout=0.0, scaling=module.scaling, **options)[0]
        return out

    return attend
