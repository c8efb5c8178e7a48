"""A causal mask that is known before the forward pass, handed past transformers, which would ask the device for it.

Without a mask transformers looks at the positions for packed documents, and waits for the device in every step to do
so. A mask of four dimensions it hands on as it is.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch

from ftcore_kernels.layers import kv_cache
from ftcore_kernels.layers.decoder.attention.branches import Branches
from ftcore_kernels.layers.decoder.attention.choice import BASES, SDPA
from ftcore_kernels.layers.decoder.attention.documents import Documents
from ftcore_kernels.layers.decoder.attention.mask import Mask, Reading

OTHERS = ("attention_mask", *kv_cache.NAMES, "pixel_values", "token_type_ids", "mm_token_type_ids", "cache_position")
"""Inputs of a model that decide on the mask, or may."""
WITH_BRANCHES = frozenset({"cuda"})
"""Where branches have a kernel; elsewhere a dense mask would cost more than the tokens that are spared."""
LOWEST = torch.finfo(torch.float32).min


class Known(Mask):
    """The mask of `[B, S]` tokens whose documents or branches are known, without a window."""

    def __init__(
        self, documents: Documents | Branches | None, rows: int, length: int, device: torch.device, sdpa: bool
    ) -> None:
        self.window = None
        self.reading = Reading(True, documents)
        self._shape, self._device, self._sdpa = (rows, length), device, sdpa

    @cached_property
    def dense(self) -> torch.Tensor | None:
        """`[B, 1, S, S]`: True where a key is seen, for eager attention 0 there; None where plain causality will do."""
        rows, length = self._shape
        documents = self.reading.documents
        if documents is None and self._sdpa:
            return None
        at = torch.arange(length, device=self._device)
        sees = (at[:, None] >= at).expand(rows, 1, length, length)
        if isinstance(documents, Branches):
            sees = documents.sees(self._device)[None, None]
        elif documents is not None:
            flat = torch.arange(rows * length, device=self._device, dtype=torch.int32)
            document = torch.searchsorted(documents.offsets, flat, right=True).view(rows, 1, length)
            sees = sees & (document[..., None] == document[:, :, None])
        return sees if self._sdpa else torch.zeros(sees.shape, device=self._device).masked_fill(~sees, LOWEST)


class Handed(torch.Tensor):
    """A mask without memory, `[B, 1, S, S]`, of which only :func:`taken` makes anything."""

    mask: Known

    @staticmethod
    def __new__(cls, mask: Known, rows: int, length: int, device: torch.device) -> Handed:
        """Carry the mask."""
        made: Handed = torch.Tensor._make_wrapper_subclass(
            cls, (rows, 1, length, length), dtype=torch.bool, device=device
        )
        made.mask = mask
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Go along to another device; refuse the rest: nothing but ftcore's attention is handed one."""
        options = kwargs or {}
        if function is torch.ops.aten._to_copy.default and options.get("dtype", torch.bool) is torch.bool:
            rows, _, length, _ = args[0].shape
            return cls(args[0].mask, rows, length, options.get("device", args[0].device))
        raise NotImplementedError(f"{function} does not take a mask that was only described")


def taken(mask: Any) -> Any:
    """What a model gave its layer or its attention: the mask that was handed on, or as it is."""
    return mask.mask if isinstance(mask, Handed) else mask


def handed(model: Any, inputs: dict[str, Any], begins: Any = None) -> dict[str, Any]:
    """The inputs of a transformers model, with a mask if what it would be is known.

    :param model: The model without its head.
    :param inputs: What it is called with: `input_ids` `[B, S]` or `inputs_embeds` `[B, S, H]`, and more.
    :param begins: NumPy bool `[B, S]`, on the host: whether a token is the first of its document. Or :class:`Branches`.
        None where nobody knows; then the rows are documents if no positions are given.

    Raises ValueError for branches that this model's attention is not made for; see :func:`takes_branches`.
    """
    tokens = inputs.get("input_ids") if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"]
    if isinstance(begins, Branches) and not (tokens is not None and takes_branches(model, tokens.shape[1])):
        raise ValueError("this model does not take branches")
    if tokens is None or any(inputs.get(name) is not None for name in OTHERS):
        return inputs
    rows, length = tokens.shape[:2]
    if not _causal(model.config, length) or (inputs.get("position_ids") is not None and begins is None):
        return inputs
    documents: Documents | Branches | None = None
    if isinstance(begins, Branches):
        documents = begins
    elif begins is not None and begins[:, 1:].any():
        documents = Documents.beginning(torch.from_numpy(begins), tokens.device)
    mask = Known(documents, rows, length, tokens.device, model.config._attn_implementation == SDPA)
    return inputs | {"attention_mask": Handed(mask, rows, length, tokens.device)}


def takes_branches(model: Any, length: int) -> bool:
    """Whether rows of that length may be :class:`Branches`: a kernel takes them, and no layer wants them otherwise.

    :param model: The model without its head.
    """
    config = model.config.get_text_config()
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    return model.device.type in WITH_BRANCHES and not capped and _causal(model.config, length)


def _causal(config: Any, length: int) -> bool:
    """Whether every layer is causal attention of ours over rows of that length, and nothing else."""
    if config._attn_implementation not in BASES or config.is_encoder_decoder or config.get_text_config() is not config:
        return False
    if getattr(config, "is_causal", True) is False or getattr(config, "use_bidirectional_attention", None):
        return False
    kinds = set(getattr(config, "layer_types", None) or ())
    if kinds - {"full_attention", "sliding_attention"}:
        return False
    window = None if kinds == {"full_attention"} else getattr(config, "sliding_window", None)
    chunk = getattr(config, "attention_chunk_size", None)
    return all(size is None or size >= length for size in (window, chunk))
