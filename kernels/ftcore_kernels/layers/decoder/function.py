"""A decoder layer as one differentiable function with its backward written by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from ftcore_kernels.layers.decoder import steps
from ftcore_kernels.layers.decoder.gradients import Gradients
from ftcore_kernels.layers.decoder.host import Host
from ftcore_kernels.layers.decoder.keep import Keep
from ftcore_kernels.layers.decoder.packing import pack
from ftcore_kernels.layers.decoder.parts import Layer


def run(layer: Layer, hidden: torch.Tensor, keep: Keep, host: Host | None = None) -> torch.Tensor:
    """The layer's output.

    :param layer: The layer as it is now.
    :param hidden: `[B, S, H]` in the dtype of the products.
    :param keep: What the backward finds; the rest it computes again.
    :param host: Where `hidden` waits for the backward, if not on the GPU.
    :returns: `[B, S, H]`.
    """
    parameters = trained(layer)
    pack(layer.fused, hidden.dtype)
    if not torch.is_grad_enabled() or not (parameters or hidden.requires_grad):
        with torch.autocast(hidden.device.type, enabled=False):
            rows = hidden.contiguous().view(-1, hidden.shape[-1])
            return steps.forward(layer, rows, Keep.INPUT)[0].view(hidden.shape)
    out: torch.Tensor = _DecoderLayer.apply(hidden, layer, keep, host, *parameters)
    return out


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
        ctx: Any, hidden: torch.Tensor, layer: Layer, keep: Keep, host: Host | None, *parameters: nn.Parameter
    ) -> torch.Tensor:
        rows = hidden.contiguous().view(-1, hidden.shape[-1])
        with torch.autocast(hidden.device.type, enabled=False):
            out, kept = steps.forward(layer, rows, keep)
        kept.reduce(keep, layer)
        ctx.away = None
        if host is None:
            ctx.save_for_backward(hidden)  # so that autograd notices if somebody writes over it
        else:
            ctx.away, kept.x = host.send(rows), None
        ctx.layer, ctx.kept, ctx.parameters = layer, kept, parameters
        ctx.versions = [parameter._version for parameter in parameters]
        return out.view(hidden.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        kept, ctx.kept = ctx.kept, None
        if kept is None:
            raise RuntimeError("this layer's backward writes over what it kept: it can run once per forward")
        if ctx.versions != [parameter._version for parameter in ctx.parameters]:
            raise RuntimeError("a trained parameter was changed between this layer's forward and its backward")
        ctx.saved_tensors  # noqa: B018  raises if the input was written over
        if ctx.away is not None:
            kept.x = ctx.away.take()
        grads = Gradients()
        with torch.autocast(dout.device.type, enabled=False):
            dx = steps.backward(
                ctx.layer, kept, dout.contiguous().view(-1, dout.shape[-1]), grads, ctx.needs_input_grad[0]
            )
        if dx is not None:
            dx = dx.view(dout.shape) if ctx.needs_input_grad[0] else None
        return dx, None, None, None, *grads.of(ctx.parameters)
