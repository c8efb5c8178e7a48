"""LLM.int8() by bitsandbytes: 8-bit weights, outlier columns in 16 bits (Dettmers et al. 2022, arXiv 2208.07339)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ftcore import QuantizerConfig, hookimpl

REQUIRES = ("bitsandbytes>=0.46",)


@dataclass
class Config(QuantizerConfig):
    """LLM.int8()'s settings."""

    threshold: float = 6.0
    """Input columns with a value above this are multiplied in 16 bits."""


def bits_per_weight(config: Config) -> float:
    """A scale for a whole row is next to nothing."""
    return 8


@hookimpl
def ftcore_quantization_config(plan: Any) -> Any:
    """Weights in int8, one scale per row."""
    from transformers import BitsAndBytesConfig

    from ftcore_quantizers._new_heads import kept

    threshold = plan.config(Config).threshold
    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=threshold, llm_int8_skip_modules=kept(plan))
