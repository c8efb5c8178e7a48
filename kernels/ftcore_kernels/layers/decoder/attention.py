"""Causal attention as two explicit steps, by the fastest library kernel that is exact for the call at hand.

cuDNN's kernels are the fastest on Hopper, and torch would choose FlashAttention before them; masks keep both away (and
cuDNN's backward gives NaN with some of them), so that they are only used where there is none. Everything else goes
through transformers' own attention function, whose backward is autograd's.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F

Tensors = tuple[Any, ...]


class Attention(Protocol):
    """Attention of `q` `[B, Hq, S, D]` to `k` and `v` `[B, Hkv, S, D]`, with any strides."""

    recordable: bool
    """Whether its launches are the same for every batch of a shape, so that a CUDA graph may hold them."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, Tensors]:
        """The output `[B, S, Hq, D]`, contiguous, and what the backward needs besides it."""
        ...

    def backward(
        self, dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, rest: Tensors
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The gradients of `q`, `k` and `v`; `dout` and `out` are `[B, S, Hq, D]`."""
        ...


class Cudnn:
    """cuDNN's fused attention: causal, no mask."""

    recordable = True

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, Tensors]:
        """As the protocol."""
        out, lse, *rest = torch.ops.aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, True, False, scale=self.scale
        )
        return out.transpose(1, 2).contiguous(), (lse, *rest[:6])

    def backward(
        self, dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, rest: Tensors
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As the protocol."""
        lse, first_q, first_k, max_q, max_k, seed, offset = rest
        grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
        grads = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            dout.transpose(1, 2), q, k, v, out.transpose(1, 2), lse, seed, offset, None, first_q, first_k, max_q,
            max_k, 0.0, True, scale=self.scale,
        )  # fmt: skip
        return grads


class Flash:
    """FlashAttention: causal, no mask, with a sliding window or with several documents in a row."""

    def __init__(
        self, scale: float, window: int | None = None, documents: tuple[torch.Tensor, int] | None = None
    ) -> None:
        self.scale = scale
        self.recordable = documents is None
        self.documents = documents
        """Offsets of the documents in the flattened tokens, int32, and the length of the longest."""
        # A window of w tokens is the token itself and w - 1 before it.
        self.window = {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, Tensors]:
        """As the protocol."""
        batch, _, length, _ = q.shape
        q, k, v = self._laid_out(q, k, v)
        out, lse, state, unused, _ = torch.ops.aten._flash_attention_forward(
            q, k, v, *self._documents(length), 0.0, True, False, scale=self.scale, **self.window
        )
        return out.view(batch, length, *out.shape[-2:]), (lse, state, unused)

    def backward(
        self, dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, rest: Tensors
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As the protocol."""
        lse, state, unused = rest
        batch, _, length, _ = q.shape
        q, k, v = self._laid_out(q, k, v)
        grads = torch.ops.aten._flash_attention_backward(
            dout.view(q.shape), q, k, v, out.view(q.shape), lse, *self._documents(length), 0.0, True, state, unused,
            scale=self.scale, **self.window,
        )  # fmt: skip
        dq, dk, dv = (g.view(batch, length, *g.shape[-2:]).transpose(1, 2) for g in grads)
        return dq, dk, dv

    def _laid_out(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """`[B, S, H, D]`, or `[B S, H, D]` with documents."""
        laid = [tensor.transpose(1, 2) for tensor in tensors]
        return laid if self.documents is None else [tensor.flatten(0, 1) for tensor in laid]

    def _documents(self, length: int) -> tuple[torch.Tensor | None, torch.Tensor | None, int, int]:
        if self.documents is None:
            return None, None, length, length
        offsets, longest = self.documents
        return offsets, offsets, longest, longest


class Differentiated:
    """Any function of `q`, `k` and `v`: the backward runs it again and lets autograd differentiate it."""

    recordable = False

    def __init__(self, function: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        self.function = function

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, Tensors]:
        """As the protocol."""
        with torch.no_grad():
            return self.function(q, k, v).contiguous(), ()

    def backward(
        self, dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, rest: Tensors
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As the protocol."""
        inputs = tuple(tensor.detach().requires_grad_() for tensor in (q, k, v))
        with torch.enable_grad():
            again = self.function(*inputs)
        grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = torch.autograd.grad(again, inputs, dout)  # type: ignore[assignment]
        return grads


def choose(
    module: Any,
    hidden: torch.Tensor,
    mask: torch.Tensor | None,
    window: int | None,
    softcap: float | None,
    options: dict[str, Any],
) -> Attention:
    """The attention for a call: `module` is transformers' attention module, `hidden` `[B, S, H]` its input."""
    length = hidden.shape[1]
    if window is not None and window >= length:
        window = None
    implementation = module.config._attn_implementation
    plain = implementation == "sdpa" and mask is None and softcap is None and module.is_causal
    if plain and hidden.device.type == "cuda" and hidden.dtype in (torch.bfloat16, torch.float16):
        capability = _capability(hidden.device)
        if capability >= (8, 0) and module.head_dim % 8 == 0 and module.head_dim <= 256:
            deterministic = torch.are_deterministic_algorithms_enabled()
            if window is None and module.head_dim <= 128 and capability >= (9, 0) and not deterministic:
                return Cudnn(module.scaling)
            return Flash(module.scaling, window)
    if plain and window is None:
        return Differentiated(lambda q, k, v: _causal(q, k, v, module.scaling))
    return Differentiated(_of_transformers(module, mask, softcap, options))


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=gqa).transpose(1, 2)


def _of_transformers(
    module: Any, mask: torch.Tensor | None, softcap: float | None, options: dict[str, Any]
) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    eager = sys.modules[type(module).__module__].eager_attention_forward
    function = ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, eager)
    options = dict(options)
    if softcap is not None:
        options["softcap"] = softcap

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = function(module, q, k, v, mask, dropout=0.0, scaling=module.scaling, **options)[0]
        return out

    return attend
