"""The arithmetic of a decoder layer, forward and backward, on `[M, H]` rows of M = B S tokens.

Shapes: H hidden size, N = (Hq + 2 Hkv) D width of the fused query-key-value product, I intermediate size. Gradients of
the frozen weights are never computed. Buffers that the pass owns are written over: the gate-and-up buffer becomes its
gradient, the activation's gradient becomes the activation; the layer's input and the incoming gradient are not.
"""

from __future__ import annotations

from typing import Any

import torch

from ftcore_kernels.layers.decoder import heads, middle, mlp, tiles
from ftcore_kernels.layers.decoder.dense import Dense
from ftcore_kernels.layers.decoder.gradients import Gradients
from ftcore_kernels.layers.decoder.keep import Keep
from ftcore_kernels.layers.decoder.parts import Kept, Layer, Ops

__all__ = ["Kept", "Layer", "Ops", "backward", "forward"]


def forward(layer: Layer, x: torch.Tensor, keep: Keep = Keep.ALL) -> tuple[torch.Tensor, Kept]:
    """The layer's output `[M, H]`, and everything that a backward could want.

    In tiles, no more of the MLP than `keep` keeps: the rest was never there as a whole.
    """
    ops, dense, kept = layer.ops, Dense(layer.ops), Kept(x)
    normed, kept.input_rstd = ops.norm(x, layer.input_norm)
    if layer.group:
        heads.attend(layer, kept, normed, dense, keep)
        del normed
        if keep < Keep.MIDDLE:
            return tiles.forward(layer, kept, None, dense, keep), kept
        kept.attended = kept.joined(slice(None))
        normed = middle.forward(layer, kept, dense)
        kept.attended = None
    else:
        _project_heads(layer, kept, normed, dense)
        del normed
        _attend(layer, kept)
        normed = middle.forward(layer, kept, dense)
    if layer.tile:
        return tiles.forward(layer, kept, normed, dense, keep), kept
    mlp.gate_up(layer, kept, normed, dense)
    del normed
    return mlp.lower(layer, kept, mlp.activation(layer, kept), dense), kept


def _project_heads(layer: Layer, kept: Kept, normed: torch.Tensor, dense: Dense) -> None:
    kept.raw_qkv, kept.qkv_xa = layer.qkv.product(normed, dense, kept.qkv_xa)
    _turn(layer, kept)


def _turn(layer: Layer, kept: Kept) -> None:
    kept.qkv = layer.ops.lora_rope(
        kept.raw_qkv, layer.cos, layer.sin, layer.heads, _heads_update(layer, kept), layer.head_norm
    )
    if layer.head_norm is None:
        kept.raw_qkv = None  # written over


def _heads_update(layer: Layer, kept: Kept) -> Any:
    return layer.qkv.update(kept.qkv_xa, segments=3)


def _heads(layer: Layer, qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Views `[B, heads, S, D]` of queries, keys and values."""
    whole = qkv.view(layer.batch, layer.length, -1, layer.heads.dim).transpose(1, 2)
    return whole.split((layer.heads.q, layer.heads.kv, layer.heads.kv), dim=1)


def _attend(layer: Layer, kept: Kept) -> None:
    assert kept.qkv is not None
    out, kept.rest = layer.attention.forward(*_heads(layer, kept.qkv))
    kept.attended = out.reshape(kept.qkv.shape[0], -1)


def complete(layer: Layer, kept: Kept, dense: Dense) -> None:
    """Compute again what was not kept, by the same steps as in the forward; in tiles, the MLP's part comes later."""
    ops = layer.ops
    if kept.qkv is None and kept.raw_qkv is not None:
        _turn(layer, kept)
    if kept.qkv is None:
        normed, _ = ops.norm(kept.x, layer.input_norm)
        _project_heads(layer, kept, normed, dense)
        del normed
    if kept.attended is None:
        _attend(layer, kept)
    normed = None
    if middle.missing(layer, kept):
        normed = middle.forward(layer, kept, dense)
    if not layer.tile:
        mlp.complete(layer, kept, dense, normed)


def backward(
    layer: Layer,
    kept: Kept,
    dout: torch.Tensor,
    grads: Gradients,
    dx_wanted: bool,
    into: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """The gradient of the layer's input `[M, H]`, if wanted, in memory of its own or `into`.

    Those of what is trained go to `grads`.

    :param into: Memory that is written to in any case; that of `dout`, if nobody else reads it, spares the most.
    """
    if layer.group:
        return heads.backward(layer, kept, dout, grads, dx_wanted, into)
    dense = Dense(layer.ops)
    dense.hold = True
    complete(layer, kept, dense)
    dense.hold = False
    of_mlp = tiles.backward if layer.tile else mlp.backward
    dmiddle = of_mlp(layer, kept, dout, grads, dense, into)
    kept.middle = None
    dqkv, dxa = _attention_backward(layer, kept, dmiddle, grads, dense)
    ops, wants_input = layer.ops, layer.qkv.wants_input
    trained = layer.input_norm.weight.requires_grad
    dx = None
    if dx_wanted or trained:
        dnormed = layer.qkv.product_grad(dqkv, dense, dxa)
        dx, dweight = ops.norm_backward(
            dnormed, kept.x, kept.input_rstd, layer.input_norm, dmiddle, into=dmiddle,
            normed=wants_input, weight_grad=trained,
        )  # fmt: skip
        grads[layer.input_norm.weight] = dweight  # type: ignore[index]
    else:
        dnormed = ops.norm(kept.x, layer.input_norm)[0] if wants_input else None
    layer.qkv.gradients(grads, dqkv, dnormed, dxa)
    return dx


def _attention_backward(
    layer: Layer, kept: Kept, dmiddle: torch.Tensor, grads: Gradients, dense: Dense
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The gradients of the fused product's output `[M, N]` and of its `x A^T`."""
    assert kept.attended is not None and kept.qkv is not None
    dprojected, dxa = middle.backward(layer, kept, dmiddle, grads)
    dattended = layer.out.product_grad(dprojected, dense, dxa)
    del dprojected
    shape = layer.batch, layer.length, layer.heads.q, layer.heads.dim
    dq, dk, dv = layer.attention.backward(
        dattended.view(shape), *_heads(layer, kept.qkv), kept.attended.view(shape), kept.rest
    )
    del dattended
    kept.attended = kept.rest = kept.qkv = None
    norm = layer.head_norm
    trained = norm is not None and (norm.q_weight.requires_grad or norm.k_weight.requires_grad)
    dqkv, dq_weight, dk_weight = layer.ops.lora_rope_backward(
        dq, dk, dv, layer.cos, layer.sin, layer.heads, kept.raw_qkv,
        None if norm is None else _heads_update(layer, kept), norm, trained,
        layer.qkv.rows(dmiddle.shape[0], dq),
    )  # fmt: skip
    if norm is not None:
        grads[norm.q_weight], grads[norm.k_weight] = dq_weight, dk_weight  # type: ignore[index]
    return dqkv, layer.qkv.shrink_grad(dqkv, kept.qkv_xa, grads, layer.ops.lora_grads)
