"""From attention to the residual stream before the MLP, forward and backward, on `[M, H]` rows."""

from __future__ import annotations

import torch

from ftcore_kernels.layers.decoder import mlp
from ftcore_kernels.layers.decoder.dense import Dense
from ftcore_kernels.layers.decoder.gradients import Gradients
from ftcore_kernels.layers.decoder.parts import Kept, Layer


def forward(layer: Layer, kept: Kept, dense: Dense) -> torch.Tensor:
    """The residual stream `[M, H]` is left in `kept`; returns it normalised."""
    assert kept.attended is not None
    if layer.attention_norm is not None:
        kept.projected, kept.out_xa = mlp.output(layer, layer.out, kept.attended, kept.out_xa, dense)
        y, kept.projected_rstd = layer.ops.norm(kept.projected, layer.attention_norm)
        kept.middle, normed, kept.middle_rstd = layer.ops.add_norm(kept.x, y, layer.middle_norm)
    elif layer.out.rank:
        kept.middle, kept.out_xa = mlp.output(layer, layer.out, kept.attended, kept.out_xa, dense, kept.x)
        normed, kept.middle_rstd = layer.ops.norm(kept.middle, layer.middle_norm)
    else:
        y, _ = layer.out.product(kept.attended, dense)
        kept.middle, normed, kept.middle_rstd = layer.ops.add_norm(kept.x, y, layer.middle_norm)
    return normed


def missing(layer: Layer, kept: Kept) -> bool:
    """Whether the forward has to be done again."""
    return kept.middle is None or (layer.attention_norm is not None and kept.projected is None)


def backward(
    layer: Layer, kept: Kept, dmiddle: torch.Tensor, grads: Gradients, into: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The gradients of the output projection `[M, H]`, and of its `x A^T`; what is trained there goes to `grads`.

    :param into: Memory for the former, where a norm comes in between; without one it is `dmiddle` itself.
    """
    dprojected = dmiddle
    if layer.attention_norm is not None:
        dprojected, dweight = layer.ops.norm_backward(
            dmiddle, kept.projected, kept.projected_rstd, layer.attention_norm, into=into,
            weight_grad=layer.attention_norm.weight.requires_grad,
        )  # fmt: skip
        grads[layer.attention_norm.weight] = dweight  # type: ignore[index]
        kept.projected = None
    dxa = layer.out.shrink_grad(dprojected, kept.out_xa, grads, layer.ops.lora_grads)
    layer.out.gradients(grads, dprojected, kept.attended, dxa)
    return dprojected, dxa
