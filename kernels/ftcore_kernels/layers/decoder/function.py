"""A decoder layer as one differentiable function with its backward written by hand."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from ftcore_kernels.layers.decoder import steps
from ftcore_kernels.layers.decoder.alone import alone
from ftcore_kernels.layers.decoder.gradients import Gradients
from ftcore_kernels.layers.decoder.host import Host
from ftcore_kernels.layers.decoder.keep import Keep
from ftcore_kernels.layers.decoder.packing import pack
from ftcore_kernels.layers.decoder.parts import Layer
from ftcore_kernels.layers.decoder.segments import ONCE, Here, Member, Place


class Keeping(NamedTuple):
    """What the backward of a layer finds, and where; the rest it computes again."""

    keep: Keep
    host: Host | None = None
    """Where inputs of this forward wait for the backward, if any are not on the GPU."""
    away: bool = False
    """Whether this layer's is one of them."""
    attended: bool = False
    """Whether its attention's output waits there, too."""
    inside: bool = False
    """Whether not even the input is kept, where it is the output of a layer before this one."""


def run(layer: Layer, hidden: torch.Tensor, keeping: Keeping) -> torch.Tensor:
    """The layer's output.

    :param layer: The layer as it is now.
    :param hidden: `[B, S, H]` in the dtype of the products.
    :param keeping: What is kept for the backward.
    :returns: `[B, S, H]`.
    """
    parameters = trained(layer)
    pack(layer.fused, hidden.dtype)
    if not torch.is_grad_enabled() or not (parameters or hidden.requires_grad):
        with torch.autocast(hidden.device.type, enabled=False):
            rows = hidden.contiguous().view(-1, hidden.shape[-1])
            return steps.forward(layer, rows, Keep.INPUT)[0].view(hidden.shape)
    before = _made_by(hidden) if keeping.inside else None
    out: torch.Tensor = _DecoderLayer.apply(hidden, layer, keeping, before, *parameters)
    return out


def _made_by(hidden: torch.Tensor) -> Member | None:
    """The layer whose very output this is, if nothing may follow that yet; torch lets nobody write over an output."""
    member = getattr(hidden.grad_fn, "member", None)
    return member if isinstance(member, Member) and member.follow() else None


def ends(out: torch.Tensor) -> None:
    """Have the layer that made this be the last of its segment."""
    member = getattr(out.grad_fn, "member", None)
    if isinstance(member, Member):
        member.end()


def trained(layer: Layer) -> list[nn.Parameter]:
    """Every parameter of the layer that wants a gradient."""
    found = [parameter for fused in layer.fused for parameter in fused.parameters()]
    norms = [layer.input_norm, layer.middle_norm, layer.attention_norm, layer.mlp_norm]
    weights = [norm.weight for norm in norms if norm is not None]
    if layer.head_norm is not None:
        weights += [layer.head_norm.q_weight, layer.head_norm.k_weight]
    return found + [weight for weight in weights if weight.requires_grad]  # type: ignore[misc]


class _DecoderLayer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, layer: Layer, keeping: Keeping, before: Member | None, *parameters: nn.Parameter
    ) -> torch.Tensor:
        keep, host = keeping.keep, keeping.host
        rows = hidden.contiguous().view(-1, hidden.shape[-1])
        source = before or _place(rows, host, keeping.away)
        if host is not None and before is not None:
            host.layer()
        with torch.autocast(hidden.device.type, enabled=False):
            out, kept = steps.forward(layer, rows, keep)
        kept.reduce(keep, layer)
        if keeping.attended and host is not None and before is None:
            kept.leave(host.beside)
        if host is None and before is None:
            ctx.save_for_backward(hidden)  # so that autograd notices if somebody writes over it
        ctx.member = Member(layer, keep, kept, source)
        ctx.layer, ctx.parameters = layer, parameters
        ctx.versions = [parameter._version for parameter in parameters]
        return out.view(hidden.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        member, ctx.member = ctx.member, None
        if member is None:
            raise RuntimeError(ONCE)
        if ctx.versions != [parameter._version for parameter in ctx.parameters]:
            raise RuntimeError("a trained parameter was changed between this layer's forward and its backward")
        ctx.saved_tensors  # noqa: B018  raises if the input was written over
        grads, mine = Gradients(), alone(dout) or not dout.is_contiguous()
        with torch.autocast(dout.device.type, enabled=False):
            rows = dout.contiguous().view(-1, dout.shape[-1])
            dx = steps.backward(
                ctx.layer, member.taken(), rows, grads, ctx.needs_input_grad[0], into=rows if mine else None
            )
        if dx is not None:
            # Not a view: one holds its base, and the layer below could not write over it.
            dx = torch.ops.aten._unsafe_view(dx, dout.shape) if ctx.needs_input_grad[0] else None
        return dx, None, None, None, *grads.of(ctx.parameters)


def _place(rows: torch.Tensor, host: Host | None, away: bool) -> Place:
    if host is None:
        return Here(rows)
    return host.send(rows) if away else host.keep(rows)
