"""A model's own decoder layers, whatever they compute, with ftcore's attention in their midst.

Their attention asks transformers' registry for its function; while completions are written that is one of ours, which
keeps keys and values as they come, and so the layers need no cache of transformers' and no mask. Mixtures of experts,
adapters of any kind, and kernels that were put into the layers compute as they do in training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F

from ftcore import Role
from ftcore_kernels.decoding.attention import Choice
from ftcore_kernels.decoding.cache import Shape
from ftcore_kernels.decoding.convolution import Mix, Tail, gated
from ftcore_kernels.layers.decoder.attention import Attention
from ftcore_kernels.layers.uncovered import Uncovered
from ftcore_kernels.reference.decode_attention import Scores

NAME, WITH_MASK = "ftcore_decoding", "ftcore_decoding_with_mask"
"""Names in transformers' registry of attention functions; only the second has masks made for it."""
SLOT = "ftcore_decoding"
"""Attribute of an attention module with what computes its calls."""
COVERED = frozenset({
    "activation_sparsity", "alternating_updates", "attention_sinks", "attention_softcap", "chunked_attention",
    "experts", "fused_projections", "half_width_rope", "interleaved_rope", "latent_attention", "norm_after_rope",
    "norm_without_weight", "other_dropout_name", "own_projection_names", "qk_norm", "sandwich_norm",
    "shared_keys_and_values", "short_convolution", "sliding_window", "unit_offset", "value_norm", "weight_in_float32",
})  # fmt: skip
"""Traits of layers in which tokens meet in attention that there is a kernel for, or in a short convolution."""
CONVOLUTION = "short_convolution"
UNKNOWN_OPTIONS = ("position_bias", "cache")
"""What an attention function may be given and this one does not compute with."""


@dataclass
class Own:
    """The attention modules of the layers, in their order, and what their keys are."""

    modules: list[Any]
    shapes: list[Shape]
    longest: int | None = None
    """Tokens of a row, beyond which a layer would ask where they stand; None for any number."""
    convolutions: list[Any] = field(default_factory=list)
    """Modules in place of attention."""
    tails: list[Tail] = field(default_factory=list)

    @contextmanager
    def computing(self, choose: Choice, mix: Mix, with_mask: bool = False) -> Iterator[None]:
        """Inside the block attention is what `choose` answers, and a convolution what `mix` computes.

        :param with_mask: Whether the model shall make masks, and hand them to attention.
        """
        _register()
        configs = list({id(module.config): module.config for module in self.modules}.values())
        before = [config._attn_implementation for config in configs]
        bound = [vars(module).get("forward") for module in self.convolutions]
        for index, module in enumerate(self.modules):
            vars(module)[SLOT] = partial(_attended, choose, index)
        for index, module in enumerate(self.convolutions):
            vars(module)["forward"] = partial(gated, mix, index, module)
        try:
            for config in configs:
                config._attn_implementation = WITH_MASK if with_mask else NAME
            yield
        finally:
            for config, name in zip(configs, before, strict=True):
                config._attn_implementation = name
            for module in self.modules:
                vars(module).pop(SLOT, None)
            for module, forward in zip(self.convolutions, bound, strict=True):
                if forward is None:
                    vars(module).pop("forward", None)
                else:
                    vars(module)["forward"] = forward


def read(base: Any, roles: Sequence[Role], device: torch.device, call: Callable[[], object]) -> Own:
    """The layers of a `...ForCausalLM`. Raises Uncovered for what is no attention over keys that stay as they are.

    :param roles: The family's.
    :param call: Sends one token through the model, to see what its attention is given.
    """
    if device.type == "cuda" and find_spec("triton") is None:
        raise Uncovered("Triton is not installed")
    ours = [role for role in roles if role.name in ("attention", "decoder_layer")]
    if strange := sorted(frozenset().union(*(role.traits for role in ours)) - COVERED):
        raise Uncovered(f"layers with {', '.join(strange)} are not completed by ftcore")
    names = {role.module for role in ours if role.name == "attention"}
    modules = [m for m in base.modules() if any(c.__name__ in names for c in type(m).__mro__)]
    if not modules:
        raise Uncovered("the family declares no attention that is in this model")
    reaches = [int(m.floor_scale) - 1 for m in modules if getattr(m, "attn_temperature_tuning", False)]
    convolutions = _convolutions(base, ours)
    found: dict[int, Shape] = {}
    tails: dict[int, Tail] = {}

    def mix(index: int, x: torch.Tensor, filters: torch.Tensor) -> torch.Tensor:
        tails[index] = Tail(filters.shape[1] - 1, filters.shape[0])
        return x * filters[:, -1]

    own = Own(modules, [], min(reaches, default=None), convolutions)
    with own.computing(partial(_Seen, found), mix):
        call()
    if len(found) < len(modules):
        raise Uncovered(f"{len(modules) - len(found)} attention modules do not ask transformers for their function")
    own.shapes = [found[index] for index in range(len(modules))]
    own.tails = [tails[index] for index in range(len(convolutions))]
    return own


def _convolutions(base: Any, roles: Sequence[Role]) -> list[Any]:
    """The modules in place of attention, where the family says that there are such."""
    names = {role.module for role in roles if CONVOLUTION in role.traits}
    found = [m for m in base.modules() if any(c.__name__ in names for c in type(m).__mro__)]
    return [layer.conv for layer in found if hasattr(layer, "conv")]


class _Seen(Attention):
    """Of a token to itself: notes what the keys are like."""

    recordable = by_heads = False
    tables = ()

    def __init__(self, found: dict[int, Shape], index: int, scores: Scores, mask: Any) -> None:
        self._found, self._index = found, index

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, tuple[()]]:
        """As the protocol, without a backward."""
        if k.shape[2] != 1 or q.shape[1] % k.shape[1]:
            raise Uncovered(f"attention of {list(q.shape)} to {list(k.shape)}")
        self._found[self._index] = Shape(k.shape[1], k.shape[3])
        return v.repeat_interleave(q.shape[1] // v.shape[1], 1).transpose(1, 2), ()

    def backward(self, *_: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """There is none."""
        raise NotImplementedError("nothing is trained while completions are written")


def _register() -> None:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if NAME not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS.register(NAME, _attend)
        ALL_ATTENTION_FUNCTIONS.register(WITH_MASK, _attend)
        ALL_MASK_ATTENTION_FUNCTIONS.register(WITH_MASK, sdpa_mask)


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function of transformers: q `[B, Hq, S, D]`, k and v `[B, Hkv, S, D]` -> `[B, S, Hq, D]`."""
    if SLOT not in vars(module):
        raise Uncovered(f"{type(module).__name__} attends to something else than the tokens so far")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return vars(module)[SLOT](module, query, key, value, attention_mask, scale, options), None


def _attended(
    choose: Choice,
    index: int,
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: Any,
    scale: float,
    options: dict[str, Any],
) -> torch.Tensor:
    width, wide = value.shape[-1], max(value.shape[-1], key.shape[-1])
    attention = choose(index, _scores(module, scale, options), mask)
    out = attention.forward(*(_filled(tensor, wide) for tensor in (query, key, value)))[0]
    return out[..., :width]


def _filled(tensor: torch.Tensor, width: int) -> torch.Tensor:
    """Keys and values of one width: what is added to either changes no score and no output that is kept."""
    if tensor.shape[-1] < width:
        return F.pad(tensor, (0, width - tensor.shape[-1]))
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _scores(module: Any, scale: float, options: dict[str, Any]) -> Scores:
    both_ways = False in (options.get("is_causal"), getattr(module, "is_causal", True))
    if any(options.get(name) is not None for name in UNKNOWN_OPTIONS) or both_ways:
        raise Uncovered(f"{type(module).__name__} is no causal attention, or has a bias")
    window, chunk, kind = options.get("sliding_window"), None, _kind(module)
    if kind == "chunked_attention":
        chunk, window = module.config.attention_chunk_size, None
    elif kind == "full_attention":
        window = None
    elif kind == "sliding_attention" and window is None:
        window = module.config.sliding_window
    elif kind not in (None, "sliding_attention"):
        raise Uncovered(f"layers of the kind {kind} are not completed by ftcore")
    return Scores(scale, window, options.get("softcap"), chunk, options.get("s_aux"))


def _kind(module: Any) -> str | None:
    """What transformers makes the layer's mask by, if the model's layers differ."""
    kinds, index = getattr(module.config, "layer_types", None), getattr(module, "layer_idx", None)
    return kinds[index] if kinds and index is not None else None
