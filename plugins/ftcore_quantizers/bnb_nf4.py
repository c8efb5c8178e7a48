"""NF4 by bitsandbytes: 4-bit normal float weights for QLoRA (Dettmers et al. 2023, arXiv 2305.14314)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ftcore import Plan, QuantizerConfig, hookimpl

REQUIRES = ("bitsandbytes>=0.46",)
FOUR_BIT = True
"""The layers are bitsandbytes' `Linear4bit`, which is what `adapter.init=loftq` asks for."""


@dataclass
class Config(QuantizerConfig):
    """NF4's settings."""

    double_quant: bool = True
    """Quantize the block scales as well: 0.37 bits a weight less."""


def bits_per_weight(config: Config) -> float:
    """Four, and a scale for 64 weights: 32 bits, or 8 and a scale of 32 for 256 of those."""
    return 4 + (8 + 32 / 256 if config.double_quant else 32) / 64


@hookimpl
def ftcore_quantization_config(plan: Plan) -> Any:
    """Weights in NF4, products in the plan's dtype."""
    import torch
    from transformers import BitsAndBytesConfig

    from ftcore_quantizers._new_heads import kept

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=plan.config(Config).double_quant,
        bnb_4bit_compute_dtype=getattr(torch, plan.dtype),
        llm_int8_skip_modules=kept(plan),
    )
