"""The merged model in NF4 by bitsandbytes, for transformers and vLLM (Dettmers et al. 2023, arXiv 2305.14314)."""

from __future__ import annotations

from dataclasses import dataclass

from ftcore import Artifact, Checkpoint, Plan, Problem, hookimpl
from ftcore.config import ReadBackConfig

REQUIRES = ("bitsandbytes>=0.49",)


@dataclass
class Config(ReadBackConfig):
    """The NF4 export's settings."""

    double_quant: bool = True
    """Quantize the block scales as well: 0.37 bits a weight less."""


@hookimpl
def ftcore_check_plan(plan: Plan) -> list[Problem]:
    """An adapter that can be merged, and linear layers."""
    from ftcore_exporters._bitsandbytes import problems

    return problems(plan, "bnb4")


@hookimpl
def ftcore_export(plan: Plan, checkpoint: Checkpoint) -> list[Artifact]:
    """Packed weights, config, generation config and tokenizer under `export/bnb4`."""
    import torch
    from transformers import BitsAndBytesConfig

    from ftcore_exporters._bitsandbytes import export
    from ftcore_exporters._serving import stored_dtype

    config = plan.config(Config)
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=config.double_quant,
        bnb_4bit_compute_dtype=getattr(torch, stored_dtype(checkpoint.merged())),
    )
    return [export(checkpoint, "bnb4", settings, "NF4 by bitsandbytes, for transformers and vLLM", config.verify)]
