"""The merged model in LLM.int8() by bitsandbytes, for transformers (Dettmers et al. 2022, arXiv 2208.07339)."""

from __future__ import annotations

from dataclasses import dataclass

from ftcore import Artifact, Checkpoint, Plan, Problem, hookimpl
from ftcore.config import ReadBackConfig

REQUIRES = ("bitsandbytes>=0.49",)


@dataclass
class Config(ReadBackConfig):
    """The LLM.int8() export's settings."""

    threshold: float = 6.0
    """Input columns with a value above this are multiplied in 16 bits."""


@hookimpl
def ftcore_check_plan(plan: Plan) -> list[Problem]:
    """An adapter that can be merged, and linear layers."""
    from ftcore_exporters._bitsandbytes import problems

    found = problems(plan, "bnb8")
    if plan.config(Config).threshold < 0:
        message = f"is {plan.config(Config).threshold:g}"
        found.append(Problem("export.bnb8.threshold", message, "give a number of 0 or more; 6 is usual, 0 is off"))
    return found


@hookimpl
def ftcore_export(plan: Plan, checkpoint: Checkpoint) -> list[Artifact]:
    """Packed weights, config, generation config and tokenizer under `export/bnb8`."""
    from transformers import BitsAndBytesConfig

    from ftcore_exporters._bitsandbytes import export

    config = plan.config(Config)
    settings = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=config.threshold)
    return [export(checkpoint, "bnb8", settings, "LLM.int8() by bitsandbytes, for transformers", config.verify)]
