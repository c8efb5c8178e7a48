"""What the steps of a decoder layer work on: the layer's parts, the operations, and what the forward leaves behind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ftcore_kernels.layers.decoder.attention import Attention
from ftcore_kernels.layers.decoder.keep import Keep
from ftcore_kernels.layers.decoder.linear import Fused
from ftcore_kernels.reference.lora_glu import Activation
from ftcore_kernels.reference.lora_rope import HeadNorm, Heads
from ftcore_kernels.reference.norm_steps import Norm


@dataclass(frozen=True, slots=True)
class Ops:
    """One implementation of the steps, Triton's or plain PyTorch's."""

    norm: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    add_norm: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    norm_backward: Callable[..., tuple[torch.Tensor, torch.Tensor | None]]
    lora_rope: Callable[..., torch.Tensor]
    lora_rope_backward: Callable[..., tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]]
    lora_glu: Callable[..., torch.Tensor]
    lora_glu_backward: Callable[..., None]
    lora_add: Callable[..., torch.Tensor]
    lora_grads: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    nf4_dequantize: Callable[..., torch.Tensor]
    fp8_mm: Callable[..., torch.Tensor]
    fp8_mm_t: Callable[..., torch.Tensor]


@dataclass(slots=True)
class Layer:
    """A layer as it is for one forward pass and its backward."""

    ops: Ops
    batch: int
    length: int
    heads: Heads
    activation: Activation
    cos: torch.Tensor
    sin: torch.Tensor
    attention: Attention
    qkv: Fused
    out: Fused
    gate_up: Fused
    down: Fused
    input_norm: Norm
    middle_norm: Norm
    """Before the MLP."""
    head_norm: HeadNorm | None = None
    attention_norm: Norm | None = None
    """After the output projection, where the family has sandwich norms."""
    mlp_norm: Norm | None = None
    """After the down projection, likewise."""
    tile: int = 0
    """Rows of a tile that the MLP is computed in; 0 computes it whole."""
    group: int = 0
    """Key-value heads, with their queries, of a group that attention is computed in; 0 computes it whole."""

    @property
    def fused(self) -> tuple[Fused, Fused, Fused, Fused]:
        """The four products."""
        return self.qkv, self.out, self.gate_up, self.down


@dataclass(slots=True)
class Part:
    """What one group of heads leaves: n columns of queries, keys and values, m of queries."""

    qkv: torch.Tensor | None = None
    """`[M, n]` as attention takes it."""
    raw_qkv: torch.Tensor | None = None
    """`[M, n]` before the norm of the heads, where there is one."""
    attended: Any = None
    """`[M, m]` contiguous, or where it waits."""
    rest: Any = None
    """What else the attention's backward needs."""


@dataclass(slots=True)
class Kept:
    """What the forward leaves for the backward; None is computed again.

    The rows of `x A^T` are always kept, except where they are columns of a buffer that is not: they come again with it.
    """

    x: Any
    """`[M, H]`; None while it is in host memory."""
    input_rstd: torch.Tensor | None = None
    qkv_xa: torch.Tensor | None = None
    raw_qkv: torch.Tensor | None = None
    """`[M, N]` before the norm of the heads, where there is one: its backward needs it."""
    qkv: torch.Tensor | None = None
    """`[M, N]` as attention takes it."""
    attended: Any = None
    """`[M, Hq D]`, or where it waits."""
    rest: Any = None
    """What else the attention's backward needs."""
    out_xa: torch.Tensor | None = None
    projected: torch.Tensor | None = None
    """`[M, H]` before the norm after attention, where there is one."""
    projected_rstd: torch.Tensor | None = None
    middle: torch.Tensor | None = None
    """`[M, H]`, the residual stream before the MLP."""
    middle_rstd: torch.Tensor | None = None
    gate_up_xa: torch.Tensor | None = None
    gate_up: torch.Tensor | None = None
    """`[M, 2 I]` as the product left it."""
    down_xa: torch.Tensor | None = None
    lowered: torch.Tensor | None = None
    """`[M, H]` before the norm after the MLP, where there is one."""
    lowered_rstd: torch.Tensor | None = None
    parts: list[Part] | None = None
    """Of each group of heads, in place of `raw_qkv`, `qkv`, `attended` and `rest`."""

    def leave(self, send: Callable[[torch.Tensor], Any]) -> None:
        """Have attention's output wait where `send` takes it; it answers `take`."""
        for one in (self, *(self.parts or ())):
            if one.attended is not None:
                one.attended = send(one.attended)
        if self.parts is not None:
            self.qkv_xa = None  # less to compute again than to keep

    def arrive(self) -> None:
        """Have it back."""
        for one in (self, *(self.parts or ())):
            if one.attended is not None and not isinstance(one.attended, torch.Tensor):
                one.attended = one.attended.take()

    def reduce(self, keep: Keep, layer: Layer) -> None:
        """Drop what `keep` does not keep."""
        if keep < Keep.ALL:
            self.gate_up = self.projected = self.lowered = None
            if layer.gate_up.border:
                self.gate_up_xa = None
        if keep < Keep.QKV:
            self.raw_qkv = self.qkv = None
            if layer.qkv.border and not layer.group:
                self.qkv_xa = None
        elif layer.head_norm is not None:
            self.qkv = None  # made again from the raw one in a pass over it
        if keep < Keep.MIDDLE:
            self.middle = None
        if keep < Keep.ATTENTION:
            self.attended = self.rest = None
        if layer.group and keep < Keep.MIDDLE:
            # Where memory is so short, `x A^T` is computed again with what it comes from.
            self.out_xa = self.down_xa = self.gate_up_xa = None
            if keep < Keep.ATTENTION:
                self.parts = self.qkv_xa = None

    def rows(self, rows: slice) -> Kept:
        """What comes behind attention has of these rows: views, but for the output of groups of heads."""

        def of(whole: torch.Tensor | None) -> torch.Tensor | None:
            return None if whole is None else whole[rows]

        return Kept(
            of(self.x), attended=self.joined(rows), out_xa=of(self.out_xa), projected=of(self.projected),
            projected_rstd=of(self.projected_rstd), middle=of(self.middle), middle_rstd=of(self.middle_rstd),
            gate_up_xa=of(self.gate_up_xa), gate_up=of(self.gate_up), down_xa=of(self.down_xa),
            lowered=of(self.lowered), lowered_rstd=of(self.lowered_rstd),
        )  # fmt: skip

    def joined(self, rows: slice) -> torch.Tensor | None:
        """Attention's output of some rows, `[m, Hq D]`."""
        if self.attended is not None:
            return self.attended[rows]
        found = [part.attended[rows] for part in self.parts or () if part.attended is not None]
        return torch.cat(found, dim=1) if found else None
