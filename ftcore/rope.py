"""How RoPE is scaled for rows that are longer than a checkpoint was made for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ftcore import checkpoint
from ftcore.config import ModelConfig
from ftcore.specs import ModelFamily


def scaling(model: ModelConfig, family: ModelFamily) -> dict[str, Any]:
    """`model.rope_scaling`, or YaRN (Peng et al. 2023, arXiv 2309.00071) where `model.max_length` asks for more.

    Empty where nothing needs scaling, and where the checkpoint scales its RoPE already: that is the user's to decide.

    Raises Refused when the checkpoint's config cannot be read.
    """
    if model.rope_scaling:
        return dict(model.rope_scaling)
    own = checkpoint.context_length(model, family)
    if not (own and model.max_length and model.max_length > own and plain(checkpoint.settings(model, family))):
        return {}
    return {"rope_type": "yarn", "factor": model.max_length / own}


def plain(settings: Mapping[str, Any]) -> bool:
    """Whether the checkpoint has one RoPE for all its layers, and has not scaled it."""
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    if any(isinstance(value, Mapping) for value in rope.values()):
        return False
    kind = rope.get("rope_type", rope.get("type", "default"))
    return bool(kind == "default")
