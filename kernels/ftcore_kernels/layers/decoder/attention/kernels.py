"""Attention kernels of PyTorch's libraries, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from ftcore_kernels.layers.decoder.attention.documents import Documents

Tensors = tuple[Any, ...]


class Attention(Protocol):
    """Attention of `q` `[B, Hq, S, D]` to `k` and `v` `[B, Hkv, S, D]`, with any strides."""

    recordable: bool
    """Whether its launches are the same for every batch of a shape, so that a CUDA graph may hold them."""
    tables: tuple[torch.Tensor, ...]
    """What it reads besides and what is another for every batch: a graph gives it a place of its own."""
    by_heads: bool
    """Whether it may be given some key-value heads and their queries at a time."""

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

    recordable = by_heads = True
    tables: tuple[torch.Tensor, ...] = ()

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
    """FlashAttention: causal, no mask, with a sliding window, with several documents in a row, or with both."""

    recordable = by_heads = True

    def __init__(self, scale: float, window: int | None = None, documents: Documents | None = None) -> None:
        self.scale = scale
        self.tables: tuple[torch.Tensor, ...] = () if documents is None else documents.tables
        self._longest = 0 if documents is None else documents.longest
        # A window of w tokens is the token itself and w - 1 before it.
        self.window = {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, Tensors]:
        """As the protocol."""
        batch, _, length, _ = q.shape
        q, k, v = self._laid_out(q, k, v)
        out, lse, state, unused, _ = torch.ops.aten._flash_attention_forward(
            q, k, v, *self._documents(length), 0.0, True, False, scale=self.scale, **self.window
        )
        return self._seeing(out.view(batch, length, *out.shape[-2:])), (lse, state, unused)

    def backward(
        self, dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, rest: Tensors
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As the protocol."""
        lse, state, unused = rest
        batch, _, length, _ = q.shape
        q, k, v = self._laid_out(q, k, v)
        dout = self._seeing(dout).view(q.shape)
        grads = torch.ops.aten._flash_attention_backward(
            dout, q, k, v, out.view(q.shape), lse, *self._documents(length), 0.0, True, state, unused,
            scale=self.scale, **self.window,
        )  # fmt: skip
        dq, dk, dv = (g.view(batch, length, *g.shape[-2:]).transpose(1, 2) for g in grads)
        return dq, dk, dv

    def _laid_out(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """`[B, S, H, D]`, or `[B S, H, D]` with documents."""
        laid = [tensor.transpose(1, 2) for tensor in tensors]
        return laid if not self.tables else [tensor.flatten(0, 1) for tensor in laid]

    def _seeing(self, out: torch.Tensor) -> torch.Tensor:
        """`[B, S, Hq, D]`, zero where a query sees nothing."""
        return out * self.tables[1][:, :, None, None] if len(self.tables) > 1 else out

    def _documents(self, length: int) -> tuple[torch.Tensor | None, torch.Tensor | None, int, int]:
        if not self.tables:
            return None, None, length, length
        return self.tables[0], self.tables[0], self._longest, self._longest


class Differentiated:
    """Any function of `q`, `k` and `v`: the backward runs it again and lets autograd differentiate it."""

    recordable = False
    tables: tuple[torch.Tensor, ...] = ()

    def __init__(
        self, function: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor], by_heads: bool = True
    ) -> None:
        self.function, self.by_heads = function, by_heads

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
