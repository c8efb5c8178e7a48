"""Texts that begin alike, the beginning computed once: a tree of depth one, without a dense mask.

Attention of what comes behind a beginning has two parts, that to the beginning and that to itself. Both know the
logarithm of the sum that they divided by, so that their outputs can be put together to what one softmax over all keys
gives, and the backward of each part, told the sum and the output of all, gives its part of the gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, chain
from typing import Any, NamedTuple, Protocol

import torch

from ftcore_kernels.layers.decoder.attention import varlen as twin
from ftcore_kernels.layers.decoder.attention.kernels import Tensors


class Branches(NamedTuple):
    """A row of tokens: all beginnings, and then, in the same order, the branches of each.

    A token sees those before it in its own beginning or branch, and one of a branch all of its beginning as well.
    """

    offsets: torch.Tensor
    """Int32 `[N + 1]`: where each beginning and each branch begins, and the number of all tokens."""
    longest: int
    """Tokens of the longest of them."""
    beginnings: torch.Tensor
    """Int32 `[G + 1]`: where each beginning begins, and where the branches do."""
    longest_beginning: int
    behind: torch.Tensor
    """Int32 `[G + 1]`: where the branches of each beginning begin, counted from the first branch."""
    most_behind: int
    """Tokens of all branches of a beginning together, at most."""
    shared: int
    """Tokens of all beginnings."""
    total: int
    """All tokens."""

    @property
    def bucket(self) -> tuple[int, ...]:
        """What a recorded launch would depend on; these are not recorded."""
        return (*self.offsets.shape, *self.behind.shape, self.longest, self.most_behind, self.shared, self.total)

    @property
    def tables(self) -> tuple[torch.Tensor, ...]:
        """What is another for every batch."""
        return self.offsets, self.beginnings, self.behind

    def on(self, device: torch.device) -> Branches:
        """The same on a layer's device."""
        return self._replace(**{n: getattr(self, n).to(device) for n in ("offsets", "beginnings", "behind")})

    @classmethod
    def of(cls, beginnings: Sequence[int], branches: Sequence[Sequence[int]], device: torch.device | str) -> Branches:
        """From the numbers of tokens of each beginning, and of each of its branches; none is 0."""
        lengths, behind = [*beginnings, *chain(*branches)], [sum(group) for group in branches]
        if not lengths or min(*lengths, *behind, 1) < 1 or len(beginnings) != len(branches):
            raise ValueError(
                f"beginnings {beginnings} and branches {branches} have no tokens, or do not belong together"
            )
        return cls(
            offsets=_offsets(lengths, device),
            longest=max(lengths),
            beginnings=_offsets(beginnings, device),
            longest_beginning=max(beginnings),
            behind=_offsets(behind, device),
            most_behind=max(behind),
            shared=sum(beginnings),
            total=sum(lengths),
        )

    def sees(self, device: torch.device) -> torch.Tensor:
        """Bool `[total, total]`: whether a query (row) sees a key."""
        at = torch.arange(self.total, device=device, dtype=torch.int32)
        own = torch.searchsorted(self.offsets.to(device), at, right=True)
        begun = torch.searchsorted(self.beginnings.to(device), at, right=True)
        tree = torch.where(
            at < self.shared, begun, torch.searchsorted(self.behind.to(device), at - self.shared, right=True)
        )
        behind = (at[:, None] >= self.shared) & (at < self.shared) & (tree[:, None] == tree)
        return ((at[:, None] >= at) & (own[:, None] == own)) | behind


def _offsets(lengths: Sequence[int], device: torch.device | str) -> torch.Tensor:
    made = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    if torch.device(device).type == "cuda":  # from pinned memory nobody waits for the copy
        return made.pin_memory().to(device, non_blocking=True)
    return made.to(device)


class Spans(NamedTuple):
    """Documents of queries, and the documents of keys that they see."""

    q_offsets: torch.Tensor
    k_offsets: torch.Tensor
    longest_q: int
    longest_k: int
    causal: bool


class Varlen(Protocol):
    """Attention of documents to documents: q `[T, Hq, D]`, k and v `[U, Hkv, D]`."""

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: Spans, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor, Tensors]:
        """The output `[T, Hq, D]`, the log-sum-exp `[Hq, T]` in fp32 or wider, and what the backward needs besides."""
        ...

    def backward(
        self, dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor,
        lse: torch.Tensor, rest: Tensors, spans: Spans, scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
        """Gradients of q, k and v."""
        ...


class FlashVarlen:
    """FlashAttention's."""

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: Spans, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor, Tensors]:
        """As the protocol."""
        out, lse, *rest, _ = torch.ops.aten._flash_attention_forward(
            q, k, v, spans.q_offsets, spans.k_offsets, spans.longest_q, spans.longest_k, 0.0, spans.causal, False,
            scale=scale,
        )  # fmt: skip
        return out, lse, tuple(rest)

    def backward(
        self, dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor,
        lse: torch.Tensor, rest: Tensors, spans: Spans, scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
        """As the protocol."""
        grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = torch.ops.aten._flash_attention_backward(
            dout, q, k, v, out, lse, spans.q_offsets, spans.k_offsets, spans.longest_q, spans.longest_k, 0.0,
            spans.causal, *rest, scale=scale,
        )  # fmt: skip
        return grads


class PlainVarlen:
    """FlashAttention's twin in plain PyTorch."""

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: Spans, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor, Tensors]:
        """As the protocol."""
        return *twin.forward(q, k, v, spans.q_offsets, spans.k_offsets, scale, spans.causal), ()

    def backward(
        self, dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor,
        lse: torch.Tensor, rest: Tensors, spans: Spans, scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
        """As the protocol."""
        offsets = spans.q_offsets, spans.k_offsets
        return twin.backward(dout, q, k, v, out, lse, *offsets, scale, spans.causal)


class Branched:
    """Attention of the protocol :class:`kernels.Attention` over :class:`Branches`; `[1, H, S, D]` only."""

    recordable, by_heads = False, True

    def __init__(self, scale: float, branches: Branches, varlen: Varlen | None = None) -> None:
        self.scale, self._varlen, self._shared = scale, varlen or FlashVarlen(), branches.shared
        self.tables = branches.tables
        b = branches
        self._own = Spans(b.offsets, b.offsets, b.longest, b.longest, True)
        self._back = Spans(b.behind, b.beginnings, b.most_behind, b.longest_beginning, False)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, Tensors]:
        """As the protocol."""
        q, k, v = self._rows(q, k, v)
        at = self._shared
        out, lse, rest = self._varlen.forward(q, k, v, self._own, self.scale)
        also, also_lse, more = self._varlen.forward(q[at:], k[:at], v[:at], self._back, self.scale)
        both = torch.logaddexp(lse[:, at:], also_lse)
        parts = [(o * _each((part - both).exp(), o)) for o, part in ((out[at:], lse[:, at:]), (also, also_lse))]
        out[at:] = (parts[0] + parts[1]).to(out.dtype)
        lse = torch.cat([lse[:, :at], both], 1)
        return out[None], (lse, both.contiguous(), *rest, *more)

    def backward(
        self, dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, rest: Tensors
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As the protocol."""
        lse, both, *states = rest
        half = len(states) // 2
        q, k, v = self._rows(q, k, v)
        dout, out, at = dout[0].contiguous(), out[0], self._shared
        dq, dk, dv = self._varlen.backward(dout, q, k, v, out, lse, tuple(states[:half]), self._own, self.scale)
        behind = self._varlen.backward(
            dout[at:], q[at:], k[:at], v[:at], out[at:], both, tuple(states[half:]), self._back, self.scale
        )
        dq[at:] += behind[0]
        dk[:at] += behind[1]
        dv[:at] += behind[2]
        dq, dk, dv = (grad.transpose(0, 1)[None] for grad in (dq, dk, dv))
        return dq, dk, dv

    def _rows(self, *tensors: torch.Tensor) -> list[Any]:
        """`[S, H, D]` of `[1, H, S, D]`."""
        if tensors[0].shape[0] != 1:
            raise ValueError(f"branches stand in one row, and there are {tensors[0].shape[0]}")
        return [tensor[0].transpose(0, 1) for tensor in tensors]


def _each(weights: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`[H, T]` for `[T, H, D]`."""
    return weights.T[..., None].to(torch.promote_types(weights.dtype, like.dtype))
