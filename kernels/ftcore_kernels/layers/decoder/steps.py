"""The arithmetic of a decoder layer, forward and backward, on `[M, H]` rows of M = B S tokens.

Shapes: H hidden size, N = (Hq + 2 Hkv) D width of the fused query-key-value product, I intermediate size. Gradients of
the frozen weights are never computed. Buffers that the pass owns are written over: the gate-and-up buffer becomes its
gradient, the activation's gradient becomes the activation; the layer's input and the incoming gradient are not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ftcore_kernels.layers.decoder.attention import Attention
from ftcore_kernels.layers.decoder.dense import Dense
from ftcore_kernels.layers.decoder.gradients import Gradients
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

    @property
    def fused(self) -> tuple[Fused, Fused, Fused, Fused]:
        """The four products."""
        return self.qkv, self.out, self.gate_up, self.down


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
    attended: torch.Tensor | None = None
    """`[B, S, Hq, D]`."""
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

    def reduce(self, keep: Keep, layer: Layer) -> None:
        """Drop what `keep` does not keep."""
        if keep < Keep.ALL:
            self.gate_up = self.projected = self.lowered = None
            if layer.gate_up.border:
                self.gate_up_xa = None
        if keep < Keep.QKV:
            self.raw_qkv = self.qkv = None
            if layer.qkv.border:
                self.qkv_xa = None
        elif layer.head_norm is not None:
            self.qkv = None  # made again from the raw one in a pass over it
        if keep < Keep.MIDDLE:
            self.middle = None
        if keep < Keep.ATTENTION:
            self.attended = self.rest = None


def forward(layer: Layer, x: torch.Tensor) -> tuple[torch.Tensor, Kept]:
    """The layer's output `[M, H]`, and everything that a backward could want."""
    ops, dense, kept = layer.ops, Dense(layer.ops), Kept(x)
    normed, kept.input_rstd = ops.norm(x, layer.input_norm)
    _project_heads(layer, kept, normed, dense)
    del normed
    _attend(layer, kept)
    normed = _to_middle(layer, kept, dense)
    _gate_up(layer, kept, normed, dense)
    del normed
    activation = ops.lora_glu(kept.gate_up, layer.activation, layer.gate_up.update(kept.gate_up_xa, segments=2))
    out = _lower(layer, kept, activation, dense)
    return out, kept


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
    kept.attended, kept.rest = layer.attention.forward(*_heads(layer, kept.qkv))


def _to_middle(layer: Layer, kept: Kept, dense: Dense) -> torch.Tensor:
    """From attention to the residual stream before the MLP; returns that normalised."""
    assert kept.attended is not None
    attended = kept.attended.view(kept.x.shape[0], -1)
    if layer.attention_norm is not None:
        kept.projected, kept.out_xa = _output(layer, layer.out, attended, kept.out_xa, dense)
        y, kept.projected_rstd = layer.ops.norm(kept.projected, layer.attention_norm)
        kept.middle, normed, kept.middle_rstd = layer.ops.add_norm(kept.x, y, layer.middle_norm)
    elif layer.out.rank:
        kept.middle, kept.out_xa = _output(layer, layer.out, attended, kept.out_xa, dense, kept.x)
        normed, kept.middle_rstd = layer.ops.norm(kept.middle, layer.middle_norm)
    else:
        y, _ = layer.out.product(attended, dense)
        kept.middle, normed, kept.middle_rstd = layer.ops.add_norm(kept.x, y, layer.middle_norm)
    return normed


def _gate_up(layer: Layer, kept: Kept, normed: torch.Tensor, dense: Dense) -> None:
    kept.gate_up, kept.gate_up_xa = layer.gate_up.product(normed, dense, kept.gate_up_xa)


def _lower(layer: Layer, kept: Kept, activation: torch.Tensor, dense: Dense) -> torch.Tensor:
    if layer.mlp_norm is None:
        out, kept.down_xa = _output(layer, layer.down, activation, kept.down_xa, dense, kept.middle)
        return out
    kept.lowered, kept.down_xa = _output(layer, layer.down, activation, kept.down_xa, dense)
    normed, kept.lowered_rstd = layer.ops.norm(kept.lowered, layer.mlp_norm)
    return layer.ops.lora_add(kept.middle, normed)


def _output(
    layer: Layer,
    fused: Fused,
    x: torch.Tensor,
    xa: torch.Tensor | None,
    dense: Dense,
    residual: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A projection back to the residual stream `[M, H]`, with LoRA's part and the residual; and its `x A^T`."""
    y, xa = fused.product(x, dense, xa)
    update = fused.update(xa)
    if residual is None and update is None and y.is_contiguous():
        return y, xa
    rows, b = (None, None) if update is None else update[:2]
    out = layer.ops.lora_add(residual, y, rows, b, None if y.is_contiguous() else y.new_empty(y.shape))
    return out, None if xa is None else xa.contiguous()  # not the whole buffer for the sake of a few columns


def complete(layer: Layer, kept: Kept, dense: Dense) -> None:
    """Compute again what was not kept, by the same steps as in the forward."""
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
    if kept.middle is None or (layer.attention_norm is not None and kept.projected is None):
        normed = _to_middle(layer, kept, dense)
    if kept.gate_up is None:
        if normed is None:
            normed, _ = ops.norm(kept.middle, layer.middle_norm)
        _gate_up(layer, kept, normed, dense)
    del normed
    if layer.mlp_norm is not None and kept.lowered is None:
        activation = ops.lora_glu(kept.gate_up, layer.activation, layer.gate_up.update(kept.gate_up_xa, segments=2))
        _lower(layer, kept, activation, dense)


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
    """
    dense = Dense(layer.ops)
    dense.hold = True
    complete(layer, kept, dense)
    dense.hold = False
    dmiddle = _mlp_backward(layer, kept, dout, grads, dense)
    dqkv, dxa = _attention_backward(layer, kept, dmiddle, grads, dense)
    ops, wants_input = layer.ops, layer.qkv.wants_input
    trained = layer.input_norm.weight.requires_grad
    dx = None
    if dx_wanted or trained:
        dnormed = layer.qkv.product_grad(dqkv, dense, dxa)
        dx, dweight = ops.norm_backward(
            dnormed, kept.x, kept.input_rstd, layer.input_norm, dmiddle, into=dmiddle if into is None else into,
            normed=wants_input, weight_grad=trained,
        )  # fmt: skip
        grads[layer.input_norm.weight] = dweight  # type: ignore[index]
    else:
        dnormed = ops.norm(kept.x, layer.input_norm)[0] if wants_input else None
    layer.qkv.gradients(grads, dqkv, dnormed, dxa)
    return dx


def _mlp_backward(layer: Layer, kept: Kept, dout: torch.Tensor, grads: Gradients, dense: Dense) -> torch.Tensor:
    """The gradient of the residual stream before the MLP, `[M, H]`, in memory of its own."""
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
        dnormed, kept.middle, kept.middle_rstd, norm, dout, normed=layer.gate_up.wants_input,
        weight_grad=norm.weight.requires_grad,
    )  # fmt: skip
    grads[norm.weight] = dweight  # type: ignore[index]
    layer.gate_up.gradients(grads, gate_up, dnormed, dxa)
    return dmiddle


def _attention_backward(
    layer: Layer, kept: Kept, dmiddle: torch.Tensor, grads: Gradients, dense: Dense
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The gradients of the fused product's output `[M, N]` and of its `x A^T`."""
    dprojected = dmiddle
    if layer.attention_norm is not None:
        dprojected, dweight = layer.ops.norm_backward(
            dmiddle, kept.projected, kept.projected_rstd, layer.attention_norm,
            weight_grad=layer.attention_norm.weight.requires_grad,
        )  # fmt: skip
        grads[layer.attention_norm.weight] = dweight  # type: ignore[index]
        kept.projected = None
    assert kept.attended is not None and kept.qkv is not None
    dxa = layer.out.shrink_grad(dprojected, kept.out_xa, grads, layer.ops.lora_grads)
    dattended = layer.out.product_grad(dprojected, dense, dxa)
    layer.out.gradients(grads, dprojected, kept.attended.view(dmiddle.shape[0], -1), dxa)
    del dprojected
    dq, dk, dv = layer.attention.backward(
        dattended.view(kept.attended.shape), *_heads(layer, kept.qkv), kept.attended, kept.rest
    )
    del dattended
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
