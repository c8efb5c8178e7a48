"""How RoPE is scaled for rows that are longer than a checkpoint was made for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ftcore import checkpoint
from ftcore.config import ModelConfig
from ftcore.errors import Problem, Refused
from ftcore.specs import ModelFamily

FULL = "full_attention"
"""Layers that see the whole row, where a model has another RoPE for each kind: a sliding window needs no scaling."""
ORIGINAL = "original_max_position_embeddings"
FROM_ORIGINAL = frozenset({"yarn", "longrope", "llama3"})
"""RoPE scalings that are told how long the context was that is stretched."""
BY_FACTOR = frozenset({"yarn", "linear", "llama3"})
"""RoPE scalings that a larger factor stretches further."""
FOR_ALL = frozenset({"rope_theta", "partial_rotary_factor", "mrope_section", "mrope_interleaved", ORIGINAL})
"""Parameters that are the same whatever the scaling."""


def scaling(model: ModelConfig, family: ModelFamily) -> dict[str, Any]:
    """`model.rope_scaling`, or YaRN (Peng et al. 2023, arXiv 2309.00071) where `model.max_length` asks for more.

    Empty where nothing needs scaling, and where the checkpoint scales its RoPE already: that is the user's to decide.

    Raises Refused when the checkpoint's config cannot be read.
    """
    if model.rope_scaling:
        return dict(model.rope_scaling)
    own = checkpoint.context_length(model, family)
    if not (own and model.max_length and model.max_length > own):
        return {}
    # The family's defaults are known to transformers alone.
    if not plain(checkpoint.config_of(model, family).get_text_config()):
        return {}
    return {"rope_type": "yarn", "factor": model.max_length / own}


def plain(text: Any) -> bool:
    """Whether a decoder's config has one RoPE for all its layers, and has not scaled it."""
    rope = getattr(text, "rope_parameters", None) or {}
    return not _of_kinds(rope) and rope.get("rope_type", "default") == "default"


def stretched(text: Any, model: ModelConfig) -> dict[str, Any] | None:
    """The `rope_parameters` that a decoder's config gets for the run; None where they stay as they are.

    Raises Refused where the scaling that was asked for cannot be done, or none was and it takes one.
    """
    asked, own, rope = _asked(model), int(text.max_position_embeddings), _whole(text)
    if not asked:
        if not (model.max_length and model.max_length > own):
            return None
        if not plain(text):
            message = f"is past the checkpoint's own context of {own} tokens, and its RoPE is no plain one to scale"
            raise Refused(Problem("model.max_length", message, _advice(rope, own, model.max_length)))
        asked = {"rope_type": "yarn", "factor": model.max_length / own}
    if rope is None:
        fix = f"leave it out, and keep to rows of {own} tokens"
        raise Refused(Problem("model.rope_scaling", "there is no RoPE in this model that it could scale", fix))
    kind = asked.get("rope_type", rope.get("rope_type", "default"))
    if kind == "default" and asked.keys() - {"rope_type"} - FOR_ALL:
        fix = "name it, such as 'model.rope_scaling={rope_type: yarn, factor: 4}'"
        raise Refused(Problem("model.rope_scaling", "names no rope_type that scales", fix))
    if kind == "dynamic" and model.max_length and model.max_length > own:
        # transformers counts a row's growth from the context in the config, which is that of `model.max_length` now.
        message = f"a dynamic one does not stretch the context to model.max_length={model.max_length}"
        other = {} if rope.get("rope_type") == "dynamic" else rope
        raise Refused(Problem("model.rope_scaling", message, _advice(other, own, model.max_length)))
    before = rope if rope.get("rope_type") == kind else {key: rope[key] for key in rope if key in FOR_ALL}
    # What the scaling stretches is what the checkpoint was first trained on, not the longer context of the run.
    known = {ORIGINAL: rope.get(ORIGINAL) or own} if kind in FROM_ORIGINAL else {}
    merged = {**before, **known, **asked}
    return {**text.rope_parameters, FULL: merged} if _of_kinds(text.rope_parameters) else merged


def _asked(model: ModelConfig) -> dict[str, Any]:
    """`model.rope_scaling`, with its type by the name that transformers has for it now."""
    asked = dict(model.rope_scaling)
    if "type" in asked:
        asked.setdefault("rope_type", asked.pop("type"))
    return asked


def _of_kinds(rope: Mapping[str, Any]) -> bool:
    """Whether each kind of layer has its own."""
    return any(isinstance(value, Mapping) for value in rope.values())


def _whole(text: Any) -> dict[str, Any] | None:
    """The RoPE of the layers that see the whole row; None where there is none."""
    rope = getattr(text, "rope_parameters", None) or {}
    return (rope.get(FULL) if _of_kinds(rope) else rope) or None


def _advice(rope: Mapping[str, Any] | None, own: int, length: int) -> str:
    """The scaling that takes a checkpoint's own as far as is asked for, if that is a matter of its factor."""
    kind = "none" if rope is None else rope.get("rope_type", "default")
    factor = 1 if rope is None or kind == "default" else rope.get("factor")
    if kind not in BY_FACTOR | {"default"} or not factor:
        return f"stay within it: model.max_length={own}"
    more = math.ceil(100 * factor * length / own) / 100
    return f"use 'model.rope_scaling={{rope_type: {'yarn' if kind == 'default' else kind}, factor: {more:g}}}'"
