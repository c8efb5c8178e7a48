"""The decoder layers of a model as they are now, prepared to write completions with the weights that are trained.

They compute by the steps of the manual layer, whether a kernel has claimed them or not. LoRA's factors are rounded and
put in their places once for all steps; weights in 4 bits may be unpacked for the time being.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from ftcore import Role
from ftcore_kernels.decoding.cache import Shape
from ftcore_kernels.layers.decoder import ops_of, steps
from ftcore_kernels.layers.decoder.attention import Attention
from ftcore_kernels.layers.decoder.dense import Dense
from ftcore_kernels.layers.decoder.linear import Fused
from ftcore_kernels.layers.decoder.packing import pack
from ftcore_kernels.layers.decoder.sources import Source, is_nf4
from ftcore_kernels.layers.decoder.stack import Stack
from ftcore_kernels.layers.decoder.steps import Layer
from ftcore_kernels.layers.decoder.structure import ACTIVATIONS, Structure
from ftcore_kernels.layers.mlp import activation_name
from ftcore_kernels.layers.uncovered import Uncovered
from ftcore_kernels.reference.decode_attention import Scores

TRITON, PLAIN = "ftcore_kernels.ops", "ftcore_kernels.reference"

Choice = Callable[["Place", torch.Tensor, dict[str, Any]], Attention]
"""The attention of a layer for a call, from its input `[B, S, H]` and its other arguments."""


@dataclass
class Place:
    """One decoder layer."""

    index: int
    module: Any
    structure: Structure
    layer: Layer

    @property
    def shape(self) -> Shape:
        """Of its keys."""
        return Shape(self.layer.heads.kv, self.layer.heads.dim)

    @property
    def window(self) -> int | None:
        """Tokens that a query sees, or None for all."""
        return self.structure.window(self.module.self_attn).get("sliding_window")

    @property
    def scores(self) -> Scores:
        """How its queries score."""
        attention = self.module.self_attn
        return Scores(attention.scaling, self.window, self.structure.softcap(attention))


def read(base: Any, role: Role, device: torch.device) -> list[Place]:
    """The layers of a `...ForCausalLM`. Raises Uncovered for what they do not compute.

    :param role: The family's declared decoder layer.
    """
    if device.type == "cuda" and find_spec("triton") is None:
        raise Uncovered("Triton is not installed")
    modules = [m for m in base.modules() if any(c.__name__ == role.module for c in type(m).__mro__)]
    number = base.config.get_text_config().num_hidden_layers
    if len(modules) != number:
        raise Uncovered(f"{len(modules)} of its {number} layers are {role.module}")
    places = []
    for index, module in enumerate(modules):
        structure = getattr(module, "ftcore_structure", None)
        structure = structure or Structure(role.traits, ops_of(TRITON if device.type == "cuda" else PLAIN))
        if not hasattr(getattr(module, "mlp", None), "down_proj"):
            raise Uncovered(f"{role.module} has no plain gated MLP")
        if activation_name(module.mlp) not in ACTIVATIONS:
            raise Uncovered(f"no kernel for the activation {activation_name(module.mlp)}")
        weight = module.input_layernorm.weight
        like = weight.new_zeros((1, 1, weight.shape[0]))
        places.append(Place(index, module, structure, structure.read(module, like, (like, like), None, {})))
    return places


def prepare(places: list[Place], dtype: torch.dtype, room: int) -> None:
    """Put LoRA's factors in place, and unpack 4-bit weights if that takes no more than `room` bytes.

    Where there is no room, every step unpacks them anew.
    """
    packed = [fused for place in places for fused in place.layer.fused if is_nf4(fused.sources[0].base)]
    if packed and sum((f.width + f.border) * f.inputs for f in packed) * dtype.itemsize <= room:
        for place in places:
            layer = place.layer
            layer.qkv, layer.out, layer.gate_up, layer.down = (
                _unpacked(fused, layer.ops, dtype) if is_nf4(fused.sources[0].base) else fused for fused in layer.fused
            )
    pack([fused for place in places for fused in place.layer.fused], dtype)


def _unpacked(fused: Fused, ops: Any, dtype: torch.dtype) -> Fused:
    """The same product over plain weights, behind each other in memory."""
    whole = Dense(ops).whole(fused, dtype)
    assert whole is not None
    whole[fused.width :] = 0
    sources = []
    for source, rows in zip(fused.sources, fused.columns, strict=True):
        base: Any = nn.Linear(fused.inputs, whole[rows].shape[0], bias=False, device="meta")
        base.weight = nn.Parameter(whole[rows], requires_grad=False)
        base.bias = source.base.bias
        sources.append(Source(base, source.a, source.b, source.scale))
    return Fused(sources, Stack(whole, fused.width))


@contextmanager
def computing(places: list[Place], choose: Choice) -> Iterator[None]:
    """Inside the block the layers compute by their steps, with the attention that `choose` answers."""
    before = [vars(place.module).get("forward") for place in places]
    for place in places:
        vars(place.module)["forward"] = partial(_forward, place, choose)
    try:
        yield
    finally:
        for place, forward in zip(places, before, strict=True):
            if forward is None:
                del vars(place.module)["forward"]
            else:
                vars(place.module)["forward"] = forward


def _forward(place: Place, choose: Choice, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    batch, length, width = hidden_states.shape
    cos, sin = kwargs["position_embeddings"]
    attention = choose(place, hidden_states, kwargs)
    layer = replace(place.layer, batch=batch, length=length, cos=cos, sin=sin, attention=attention)
    return steps.forward(layer, hidden_states.contiguous().view(-1, width))[0].view(hidden_states.shape)


def op(name: str, device: torch.device) -> Callable[..., Any]:
    """Triton's on a GPU, else the plain twin."""
    function: Callable[..., Any] = getattr(import_module(f"{TRITON if device.type == 'cuda' else PLAIN}.{name}"), name)
    return function
