"""The MLP of a decoder layer, forward and backward, on `[M, H]` rows of the residual stream.

I is the intermediate size. The gate-and-up buffer becomes its gradient, the activation's gradient becomes the
activation; what comes in is not written to.
"""

from __future__ import annotations

import torch

from ftcore_kernels.layers.decoder.dense import Dense
from ftcore_kernels.layers.decoder.gradients import Gradients
from ftcore_kernels.layers.decoder.linear import Fused
from ftcore_kernels.layers.decoder.parts import Kept, Layer


def gate_up(layer: Layer, kept: Kept, normed: torch.Tensor, dense: Dense) -> None:
    """The product `[M, 2 I]` of the normalised rows."""
    kept.gate_up, kept.gate_up_xa = layer.gate_up.product(normed, dense, kept.gate_up_xa)


def activation(layer: Layer, kept: Kept) -> torch.Tensor:
    """`[M, I]`, from the product with LoRA's part."""
    update = layer.gate_up.update(kept.gate_up_xa, segments=2)
    return layer.ops.lora_glu(kept.gate_up, layer.activation, update)


def lower(
    layer: Layer, kept: Kept, activation: torch.Tensor, dense: Dense, into: torch.Tensor | None = None
) -> torch.Tensor:
    """The layer's output `[M, H]`, in memory of its own or `into`."""
    if layer.mlp_norm is None:
        out, kept.down_xa = output(layer, layer.down, activation, kept.down_xa, dense, kept.middle, into)
        return out
    kept.lowered, kept.down_xa = output(layer, layer.down, activation, kept.down_xa, dense)
    normed, kept.lowered_rstd = layer.ops.norm(kept.lowered, layer.mlp_norm)
    return layer.ops.lora_add(kept.middle, normed, out=into)


def output(
    layer: Layer,
    fused: Fused,
    x: torch.Tensor,
    xa: torch.Tensor | None,
    dense: Dense,
    residual: torch.Tensor | None = None,
    into: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A projection back to the residual stream `[M, H]`, with LoRA's part and the residual; and its `x A^T`."""
    y, xa = fused.product(x, dense, xa)
    update = fused.update(xa)
    if residual is None and update is None and into is None and y.is_contiguous():
        return y, xa
    rows, b = (None, None) if update is None else update[:2]
    if into is None and not y.is_contiguous():
        into = y.new_empty(y.shape)
    out = layer.ops.lora_add(residual, y, rows, b, into)
    return out, None if xa is None else xa.contiguous()  # not the whole buffer for the sake of a few columns


def complete(layer: Layer, kept: Kept, dense: Dense, normed: torch.Tensor | None = None) -> None:
    """Compute again what was not kept, from the residual stream or from that normalised, if it is at hand."""
    if kept.gate_up is None:
        if normed is None:
            normed, _ = layer.ops.norm(kept.middle, layer.middle_norm)
        gate_up(layer, kept, normed, dense)
    del normed
    if layer.mlp_norm is not None and kept.lowered is None:
        lower(layer, kept, activation(layer, kept), dense)
    if kept.down_xa is None and layer.down.a is not None:
        kept.down_xa = torch.mm(activation(layer, kept), layer.down.a.T)


def backward(
    layer: Layer, kept: Kept, dout: torch.Tensor, grads: Gradients, dense: Dense, into: torch.Tensor | None = None
) -> torch.Tensor:
    """The gradient of the residual stream before the MLP, `[M, H]`, in memory of its own or `into`."""
    ops, dlowered = layer.ops, dout
    if layer.mlp_norm is not None:
        dlowered, dweight = ops.norm_backward(
            dout, kept.lowered, kept.lowered_rstd, layer.mlp_norm, weight_grad=layer.mlp_norm.weight.requires_grad
        )
        grads[layer.mlp_norm.weight] = dweight  # type: ignore[index]
        kept.lowered = None
    dxa = layer.down.shrink_grad(dlowered, kept.down_xa, grads, ops.lora_grads)
    in_kernel = dxa is not None and layer.down.in_kernel
    activation = layer.down.product_grad(dlowered, dense, None if in_kernel else dxa)
    gate_up, kept.gate_up = kept.gate_up, None
    assert gate_up is not None
    ops.lora_glu_backward(
        activation, gate_up, layer.activation, layer.gate_up.update(kept.gate_up_xa, segments=2),
        *((dxa, layer.down.a) if in_kernel else (None, None)),
    )  # fmt: skip
    layer.down.gradients(grads, dlowered, activation, dxa)
    del activation, dlowered
    dxa = layer.gate_up.shrink_grad(gate_up, kept.gate_up_xa, grads, ops.lora_grads)
    dnormed = layer.gate_up.product_grad(gate_up, dense, dxa)
    norm = layer.middle_norm
    dmiddle, dweight = ops.norm_backward(
        dnormed, kept.middle, kept.middle_rstd, norm, dout, into=into, normed=layer.gate_up.wants_input,
        weight_grad=norm.weight.requires_grad,
    )  # fmt: skip
    grads[norm.weight] = dweight  # type: ignore[index]
    layer.gate_up.gradients(grads, gate_up, dnormed, dxa)
    return dmiddle
