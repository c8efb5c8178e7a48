"""In which way a family's completions are computed, as its roles say; a model's weights and adapter may change it."""

from __future__ import annotations

from ftcore import ModelFamily
from ftcore_kernels.decoding.halves import MIXTURE, TRAITS
from ftcore_kernels.decoding.modules import COVERED
from ftcore_kernels.sets._ops import DECODER_TRAITS

STEPS = "layers by ftcore's steps"
HALVES = "attention by ftcore's steps, the mixture of experts by itself"
MODULES = "its own layers around ftcore's attention"


def way(family: ModelFamily) -> str | None:
    """The way in words, or None where transformers completes."""
    ours = [role for role in family.roles if role.name in ("attention", "decoder_layer")]
    layer = next((role for role in ours if role.name == "decoder_layer"), None)
    if layer is not None and layer.traits <= DECODER_TRAITS:
        return STEPS
    if layer is not None and MIXTURE in layer.traits and layer.traits <= TRAITS:
        return HALVES
    covered = bool(ours) and all(role.traits <= COVERED for role in ours)
    return MODULES if covered else None


def images(family: ModelFamily) -> bool:
    """Whether prompts with images are completed so too: not where layers attend to the images themselves."""
    return family.vision is not None and not any(role.name == "cross_attention" for role in family.roles)
