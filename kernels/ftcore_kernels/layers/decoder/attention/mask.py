"""The mask function of ftcore's attention: says in O(S) what transformers' would say in a dense mask.

transformers calls it once for each kind of layer and forward pass; all layers of the kind are given the answer.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import torch

from ftcore_kernels.layers.decoder.attention.branches import Branches
from ftcore_kernels.layers.decoder.attention.documents import Documents

Dense = Callable[..., "torch.Tensor | None"]


class Reading(NamedTuple):
    """What a mask hides besides the future and what is beyond the window."""

    complete: bool
    """Whether `documents` say it all; if not, only the dense mask does."""
    documents: Documents | Branches | None
    """None if each row is one document, perhaps with pads on its right: no token that counts sees them."""


class Mask:
    """A causal mask of `[B, S]` tokens that was not made yet.

    Pads on the right are not hidden from one another: what they see means nothing, here as in transformers. Pads on the
    left see nothing, and what an attention makes of that is its own: the last of them answers for the first token.
    """

    def __init__(self, dense: Dense, sdpa: bool, arguments: dict[str, Any]) -> None:
        self._dense, self._sdpa, self._arguments = dense, sdpa, arguments
        window, length = arguments.get("local_size"), arguments["kv_length"]
        self.window: int | None = window if window is not None and window < length else None
        """Tokens that a query sees, itself among them, if that is fewer than there are."""

    @cached_property
    def dense(self) -> torch.Tensor | None:
        """As transformers makes it, with the same arguments: `[B, 1, S, S]`, or None where plain causality will do."""
        return self._dense(**self._arguments)

    def dense_on(self, device: torch.device) -> torch.Tensor | None:
        """The same on a layer's device."""
        return None if self.dense is None else self.dense.to(device)

    @cached_property
    def reading(self) -> Reading:
        """Asks the device once, for one or two values a token."""
        padding, plain = (
            self._arguments.get("attention_mask"),
            self._arguments["allow_is_causal_skip"] and self._slides(),
        )
        if padding is not None:
            return _padded(padding, self._sdpa) if plain else Reading(False, None)
        return Reading(True, None) if plain else self._packed()

    def _slides(self) -> bool:
        """Whether the window goes along with the query; in chunks of that many tokens one of two would see less."""
        if self.window is None:
            return True
        sees, zero = self._arguments["mask_function"], torch.tensor(0)
        return all(bool(sees(zero, zero, zero + first + self.window - 1, zero + first)) for first in (0, 1))

    def _packed(self) -> Reading:
        """Whether a token sees the one before it, asked of transformers' own function of two positions.

        The mask is causal and made of documents, unless it lets a token see the next one (as images do), or what it
        sees does not reach to the beginning of its document or of its window.
        """
        rows, length, device = (self._arguments[name] for name in ("batch_size", "q_length", "device"))
        row = torch.arange(rows, device=device)[:, None]
        at = torch.arange(length, device=device)[None].expand(rows, length)

        def sees(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self._arguments["mask_function"](row, torch.zeros_like(queries), queries, keys)
            return found.expand(rows, length)

        before = (at - 1).clamp(min=0)
        joined = sees(at, before) & (at > 0)
        begin = torch.where(joined, 0, at).cummax(1).values
        farthest = begin if self.window is None else begin.maximum(at - self.window + 1)
        ahead = sees(before, at) & (at > 0)
        beyond = sees(at, (farthest - 1).clamp(min=0)) & (farthest > 0)
        first, *odd = torch.stack([~joined, ahead, beyond, ~sees(at, farthest)]).cpu()
        if any(strange.any() for strange in odd):
            return Reading(False, None)
        return Reading(True, Documents.beginning(first, device))


def reading(mask: Mask | torch.Tensor | None) -> Reading:
    """Of what a model gave its layer: a dense mask is not read, none at all leaves nothing to say."""
    return mask.reading if isinstance(mask, Mask) else Reading(mask is None, None)


def _padded(padding: torch.Tensor, left: bool) -> Reading:
    """Pads on the left, if they may be described, are a document of their own; pads between tokens are none."""
    real = padding.bool().cpu()
    begins = torch.zeros_like(real)
    begins[:, 1:] = real[:, 1:] & ~real[:, :-1]
    if not begins.any():
        return Reading(True, None)
    if not left or (begins & (real.cumsum(1) > 1)).any():
        return Reading(False, None)
    seeing = padding.cumsum(1) > 0
    return Reading(True, Documents.beginning(begins, padding.device, seeing))


def describe(dense: Dense, sdpa: bool, **arguments: Any) -> Mask | torch.Tensor | None:
    """A mask function of transformers: a :class:`Mask` for whole rows without a cache, else what `dense` returns.

    :param dense: transformers' mask function, which is given the same arguments.
    :param sdpa: Whether the attention is SDPA: causal without a mask, and zero for a query that sees nothing.
    :param arguments: As transformers' `create_causal_mask` and its sisters pass them.
    """
    from transformers.utils.import_utils import is_tracing

    padding = arguments.get("attention_mask")
    arguments.setdefault("allow_is_causal_skip", True)
    offsets = arguments.get("q_offset", 0), arguments.get("kv_offset", 0)
    whole = arguments["q_length"] == arguments["kv_length"] > 1 and all(type(x) is int and x == 0 for x in offsets)
    # Somebody's own mask function, and attention to both sides, are transformers' business.
    foreign = arguments.get("use_vmap") or arguments.get("allow_is_bidirectional_skip")
    if (
        not whole
        or foreign
        or is_tracing(padding)
        or (padding is not None and padding.shape[1] != arguments["q_length"])
    ):
        return dense(**arguments)
    mask = Mask(dense, sdpa, arguments)
    plain = padding is None and arguments["allow_is_causal_skip"] and mask.window is None
    return None if plain and sdpa else mask
