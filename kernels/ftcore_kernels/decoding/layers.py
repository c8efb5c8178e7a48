"""The decoder layers of a model as they are now, prepared to write completions with the weights that are trained.

They compute by the steps of the manual layer, whether a kernel has claimed them or not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from ftcore import Role
from ftcore_kernels.decoding.attention import Choice
from ftcore_kernels.decoding.cache import Shape
from ftcore_kernels.decoding.convolution import Mix, Tail
from ftcore_kernels.decoding.halves import MIXTURE, TRAITS, Half
from ftcore_kernels.layers.decoder import ops_of, steps
from ftcore_kernels.layers.decoder.steps import Layer
from ftcore_kernels.layers.decoder.structure import ACTIVATIONS, Structure
from ftcore_kernels.layers.mlp import activation_name
from ftcore_kernels.layers.uncovered import Uncovered
from ftcore_kernels.reference.decode_attention import Scores
from ftcore_kernels.sets._ops import DECODER_TRAITS

TRITON, PLAIN = "ftcore_kernels.ops", "ftcore_kernels.reference"


@dataclass
class Place:
    """One decoder layer."""

    index: int
    module: Any
    structure: Structure
    layer: Layer | Half

    @property
    def products(self) -> tuple[str, ...]:
        """Names of the layer's products."""
        return ("qkv", "out") if isinstance(self.layer, Half) else ("qkv", "out", "gate_up", "down")

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
    halved = MIXTURE in role.traits
    if strange := sorted(role.traits - (TRAITS if halved else DECODER_TRAITS)):
        raise Uncovered(f"there are no steps for layers with {', '.join(strange)}")
    modules = [m for m in base.modules() if any(c.__name__ == role.module for c in type(m).__mro__)]
    number = base.config.get_text_config().num_hidden_layers
    if len(modules) != number:
        raise Uncovered(f"{len(modules)} of its {number} layers are {role.module}")
    places = []
    for index, module in enumerate(modules):
        structure = getattr(module, "ftcore_structure", None)
        structure = structure or Structure(role.traits, ops_of(TRITON if device.type == "cuda" else PLAIN))
        weight = module.input_layernorm.weight
        if halved:
            places.append(Place(index, module, structure, Half.of(structure, module, weight.dtype)))
            continue
        if not hasattr(getattr(module, "mlp", None), "down_proj"):
            raise Uncovered(f"{role.module} has no plain gated MLP")
        if activation_name(module.mlp) not in ACTIVATIONS:
            raise Uncovered(f"no kernel for the activation {activation_name(module.mlp)}")
        like = weight.new_zeros((1, 1, weight.shape[0]))
        places.append(Place(index, module, structure, structure.read(module, like, (like, like), None, {})))
    return places


@dataclass
class Layers:
    """All of them."""

    places: list[Place]
    longest = None
    """Rows may be of any length."""
    tails: Sequence[Tail] = ()
    """There are no convolutions."""

    @property
    def shapes(self) -> list[Shape]:
        """Of each layer's keys."""
        return [place.shape for place in self.places]

    @contextmanager
    def computing(self, choose: Choice, mix: Mix, with_mask: bool = False) -> Iterator[None]:
        """Inside the block the layers compute by their steps, with the attention that `choose` answers.

        :param mix: For layers that have a convolution; none of these has.
        :param with_mask: Whether masks matter; the model makes them by its own attention's name in any case.
        """
        before = [vars(place.module).get("forward") for place in self.places]
        for place in self.places:
            vars(place.module)["forward"] = partial(_forward, place, choose)
        try:
            yield
        finally:
            for place, forward in zip(self.places, before, strict=True):
                if forward is None:
                    del vars(place.module)["forward"]
                else:
                    vars(place.module)["forward"] = forward


def _forward(place: Place, choose: Choice, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    batch, length, width = hidden_states.shape
    cos, sin = kwargs["position_embeddings"]
    attention = choose(place.index, place.scores, kwargs.get("attention_mask"))
    if isinstance(place.layer, Half):
        return place.layer.forward(hidden_states, (cos, sin), attention, place.module.mlp)
    layer = replace(place.layer, batch=batch, length=length, cos=cos, sin=sin, attention=attention)
    return steps.forward(layer, hidden_states.contiguous().view(-1, width))[0].view(hidden_states.shape)


def op(name: str, device: torch.device) -> Callable[..., Any]:
    """Triton's on a GPU, else the plain twin."""
    function: Callable[..., Any] = getattr(import_module(f"{TRITON if device.type == 'cuda' else PLAIN}.{name}"), name)
    return function
