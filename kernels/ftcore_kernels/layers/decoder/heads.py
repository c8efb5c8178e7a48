"""Attention by groups of heads, where a batch is so long that whole queries, keys and values would not fit.

Heads do not know of each other. A group is some key-value heads and their queries: its columns are multiplied, turned
and attended to, and of them only the output outlives the group. The backward makes them again, one group after the
other; each adds its part to the gradient of the layer's normalised input. In the forward that input is whole, which
less memory is needed for than in the backward; there it is made again in tiles of rows, and so is all that comes behind
attention.

So the backward holds at its peak, of rows as wide as the hidden states, the layer's input, the incoming gradient, which
may become that of the residual stream in place, the gradient of the normalised input, and attention's output; and what
one group needs. Groups also keep what attention kernels are given below 2^31 elements: some count in 32 bits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ftcore_kernels.layers.decoder import middle, mlp, tiles
from ftcore_kernels.layers.decoder.dense import Dense
from ftcore_kernels.layers.decoder.gradients import Gradients, Sums
from ftcore_kernels.layers.decoder.keep import Keep
from ftcore_kernels.layers.decoder.linear import Fused, wide_mm
from ftcore_kernels.layers.decoder.parts import Kept, Layer, Part
from ftcore_kernels.layers.decoder.slices import Outputs, Placed, inputs
from ftcore_kernels.layers.decoder.sources import is_fp8
from ftcore_kernels.reference.lora_rope import Heads

BYTES = 2**27
"""Of a tile of normalised rows: large enough for products that are as fast as one over all rows."""

MOST = 2**31
"""Elements from which on an attention kernel may count wrong."""

ROUNDED = 128
"""FlashAttention's backward takes so many rows more for every document, and rounds the width of a head up to halves of
it."""


class Group(NamedTuple):
    """Some key-value heads with their queries."""

    heads: Heads
    columns: tuple[slice, slice, slice]
    """Of queries, keys and values in the fused product. The first are its columns of attention's output as well."""


def groups(layer: Layer) -> list[Group]:
    """All of a layer's."""
    heads, found = layer.heads, []
    each = heads.q // heads.kv
    for first in range(0, heads.kv, layer.group):
        last = min(first + layer.group, heads.kv)
        q, kv = slice(first * each * heads.dim, last * each * heads.dim), (first * heads.dim, last * heads.dim)
        keys, values = heads.q * heads.dim, (heads.q + heads.kv) * heads.dim
        columns = q, slice(keys + kv[0], keys + kv[1]), slice(values + kv[0], values + kv[1])
        found.append(Group(Heads((last - first) * each, last - first, heads.dim), columns))
    return found


def size(layer: Layer, wanted: int) -> int:
    """Key-value heads of a group, or 0 for all in one: as wanted, or fewer where kernels could not count them.

    Raises ValueError where they could not count one.
    """
    if not layer.attention.by_heads:
        return 0
    heads, tables = layer.heads, layer.attention.tables
    each = heads.q // heads.kv
    tokens = layer.batch * layer.length
    documents = tables[0].shape[0] - 1 if tables else layer.batch
    padded = (tokens + ROUNDED * documents) * each * (-(-heads.dim // (ROUNDED // 2)) * (ROUNDED // 2))
    most = (MOST - 1) // max(tokens * (each + 2) * heads.dim, padded)
    if not most:
        raise ValueError(
            f"a batch of {tokens} tokens is too long for attention kernels: they count the elements of a key-value "
            f"head's {each} queries of {heads.dim} channels in 32 bits; give it fewer rows or a shorter length"
        )
    found = min(wanted or heads.kv, most)
    return 0 if found >= heads.kv else found


# Forward ------------------------------------------------------------------------------------------------------------


def attend(layer: Layer, kept: Kept, normed: torch.Tensor, dense: Dense, keep: Keep) -> None:
    """Attention of all groups; queries, keys and values of a group are let go of unless `keep` keeps them."""
    if layer.qkv.a is not None and kept.qkv_xa is None:
        kept.qkv_xa = torch.mm(normed, layer.qkv.a.T)
    kept.parts = []
    with dense.held(layer.qkv):
        for group in groups(layer):
            part, outputs = Part(), Outputs(layer.qkv, group.columns, dense, normed.dtype)
            _project(layer, kept, part, group, outputs.product, dense, normed)
            out, part.rest = layer.attention.forward(*_heads(layer, group, part.qkv))
            part.attended = out.view(normed.shape[0], -1)
            if keep < Keep.QKV:
                part.raw_qkv = part.qkv = None
            elif layer.head_norm is not None:
                part.qkv = None  # made again from the raw one
            if keep < Keep.ATTENTION:
                part.rest = None
            kept.parts.append(part)


def _project(
    layer: Layer, kept: Kept, part: Part, group: Group, product: Fused, dense: Dense, normed: torch.Tensor | None
) -> None:
    """Queries, keys and values of a group, from all normalised rows or from tiles of them."""
    if part.raw_qkv is None:
        if normed is not None:
            part.raw_qkv, _ = product.product(normed, dense, kept.qkv_xa)
        else:
            part.raw_qkv = kept.x.new_empty((kept.x.shape[0], product.width))
            for rows in tiles.of(_rows(layer), kept.x.shape[0]):
                entry, _ = layer.ops.norm(kept.x[rows], layer.input_norm)
                xa = None if kept.qkv_xa is None else kept.qkv_xa[rows]
                part.raw_qkv[rows] = product.product(entry, dense, xa)[0]
                del entry
    part.qkv = layer.ops.lora_rope(
        part.raw_qkv, layer.cos, layer.sin, group.heads, product.update(kept.qkv_xa, segments=3), layer.head_norm
    )
    if layer.head_norm is None:
        part.raw_qkv = None  # written over


def _heads(layer: Layer, group: Group, qkv: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """Views `[B, heads, S, D]` of queries, keys and values."""
    assert qkv is not None
    heads = group.heads
    whole = qkv.view(layer.batch, layer.length, -1, heads.dim).transpose(1, 2)
    return whole.split((heads.q, heads.kv, heads.kv), dim=1)


def _rows(layer: Layer) -> int:
    return max(BYTES // (2 * layer.qkv.inputs) // tiles.MULTIPLE, 1) * tiles.MULTIPLE


# Backward -----------------------------------------------------------------------------------------------------------


def backward(
    layer: Layer, kept: Kept, dout: torch.Tensor, grads: Gradients, dx_wanted: bool, into: torch.Tensor | None = None
) -> torch.Tensor | None:
    """As :func:`steps.backward`; in place if `into` is the memory of `dout`."""
    ops, dense = layer.ops, Dense(layer.ops)
    if kept.parts is None:
        normed, _ = ops.norm(kept.x, layer.input_norm)
        attend(layer, kept, normed, dense, Keep.ATTENTION)
        del normed
    elif layer.qkv.a is not None and kept.qkv_xa is None:
        kept.qkv_xa = torch.mm(ops.norm(kept.x, layer.input_norm)[0], layer.qkv.a.T)
    dmiddle, dprojected, dxa = _behind(layer, kept, dout, grads, dense, into)
    kept.middle = kept.gate_up = kept.lowered = kept.projected = kept.out_xa = kept.down_xa = None
    trained = layer.input_norm.weight.requires_grad
    dnormed, dxa = _through_attention(layer, kept, dprojected, dxa, grads, dense, dx_wanted or trained)
    del dprojected
    wants_input, dx, normed = layer.qkv.rank > 0, None, dnormed
    if dnormed is not None:
        if dxa is not None:
            dnormed.addmm_(dxa, layer.qkv.a)
        dx, dweight = ops.norm_backward(
            dnormed, kept.x, kept.input_rstd, layer.input_norm, dmiddle, into=dmiddle, normed=wants_input,
            weight_grad=trained,
        )  # fmt: skip
        grads[layer.input_norm.weight] = dweight  # type: ignore[index]
    elif wants_input:
        normed, _ = ops.norm(kept.x, layer.input_norm)
    if dxa is not None and normed is not None:
        da = wide_mm(dxa.T, normed)
        for index, source in enumerate(layer.qkv.sources):
            if source.a is not None and source.a.requires_grad:
                first = index * layer.qkv.rank
                grads[source.a] = da[first : first + source.a.shape[0]]
    return dx


def _behind(
    layer: Layer, kept: Kept, dout: torch.Tensor, grads: Gradients, dense: Dense, into: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Back through MLP and output projection in tiles: the gradients of the residual stream, of the projection's
    output, which are the same without a norm between them, and of the projection's `x A^T`."""
    dmiddle, sums = torch.empty_like(dout) if into is None else into, Sums()
    dprojected = dmiddle if layer.attention_norm is None else torch.empty_like(dout)
    dxa: torch.Tensor | None = None
    with dense.held(layer.out, layer.gate_up, layer.down):
        for rows in tiles.of(layer.tile, dout.shape[0]):
            part = kept.rows(rows)
            normed = middle.forward(layer, part, dense) if middle.missing(layer, part) else None
            mlp.complete(layer, part, dense, normed)
            del normed
            mlp.backward(layer, part, dout[rows], sums, dense, into=dmiddle[rows])
            _, part_dxa = middle.backward(layer, part, dmiddle[rows], sums, into=dprojected[rows])
            dxa = tiles.put(dxa, part_dxa, rows, dout)
    sums.hand_over(grads)
    return dmiddle, dprojected, dxa


def _through_attention(
    layer: Layer, kept: Kept, dprojected: torch.Tensor, dxa: torch.Tensor | None, grads: Gradients, dense: Dense,
    dx_wanted: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:  # fmt: skip
    """Back through attention, group by group: the gradients of the normalised input, but for LoRA's part, and of its
    `x A^T`."""
    placed, sums, norm = Placed(), Sums(), layer.head_norm
    dnormed: torch.Tensor | None = None
    total: torch.Tensor | None = None
    with dense.held(layer.qkv, layer.out):
        for group, part in zip(groups(layer), kept.parts or (), strict=True):
            assert part.attended is not None
            dattended = inputs(layer.out, group.columns[0], dense, dprojected.dtype).product_grad(
                dprojected, dense, dxa
            )
            outputs = Outputs(layer.qkv, group.columns, dense, dprojected.dtype)
            if part.qkv is None:
                _project(layer, kept, part, group, outputs.product, dense, None)
            shape = (layer.batch, layer.length, group.heads.q, group.heads.dim)
            dq, dk, dv = layer.attention.backward(
                dattended.view(shape), *_heads(layer, group, part.qkv), part.attended.view(shape), part.rest
            )
            del dattended
            part.attended = part.rest = part.qkv = None
            dqkv, *dweights = layer.ops.lora_rope_backward(
                dq, dk, dv, layer.cos, layer.sin, group.heads, part.raw_qkv,
                None if norm is None else outputs.product.update(kept.qkv_xa, segments=3), norm,
                norm is not None and (norm.q_weight.requires_grad or norm.k_weight.requires_grad),
            )  # fmt: skip
            del dq, dk, dv
            part.raw_qkv = None
            if norm is not None:
                sums[norm.q_weight], sums[norm.k_weight] = dweights  # type: ignore[index]
            own = outputs.placed(placed)
            found = outputs.product.shrink_grad(dqkv, kept.qkv_xa, own, layer.ops.lora_grads)
            if found is not None:
                total = (
                    found.to(torch.promote_types(found.dtype, torch.float32)) if total is None else total.add_(found)
                )
            if outputs.product.trained or any(s.base.bias is not None for s in layer.qkv.sources):
                _of_base(layer, kept, outputs.product, dqkv, own)
            if dx_wanted:
                dnormed = _added(layer, dnormed, dqkv, outputs.product, dense)
            del dqkv, outputs
    placed.hand_over(grads)
    sums.hand_over(grads)
    return dnormed, None if total is None else total.to(dprojected.dtype)


def _of_base(layer: Layer, kept: Kept, product: Fused, dqkv: torch.Tensor, grads: Gradients) -> None:
    """The gradients of a group's rows of base weights and biases."""
    sums = Sums()
    for rows in tiles.of(_rows(layer), dqkv.shape[0]):
        normed = layer.ops.norm(kept.x[rows], layer.input_norm)[0] if product.trained else None
        product.gradients(sums, dqkv[rows], normed, None)
    sums.hand_over(grads)


def _added(layer: Layer, total: torch.Tensor | None, dqkv: torch.Tensor, product: Fused, dense: Dense) -> torch.Tensor:
    """A group's part of the gradient of the normalised input added to that of the groups before it."""
    if total is None:
        return product.product_grad(dqkv, dense, None)
    if is_fp8(product.sources[0].base):
        for rows in tiles.of(_rows(layer), dqkv.shape[0]):
            total[rows] += product.product_grad(dqkv[rows], dense, None)
        return total
    weight = dense.whole(product, dqkv.dtype)
    assert weight is not None
    return total.addmm_(dqkv, weight)
