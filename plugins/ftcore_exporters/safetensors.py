"""The merged model in 16 bits: a plain transformers folder."""

from __future__ import annotations

from dataclasses import dataclass

from ftcore import Artifact, Checkpoint, ExportConfig, Plan, Problem, hookimpl
from ftcore.merge import write_merged

DTYPES = ("auto", "float16", "bfloat16", "float32")


@dataclass
class Config(ExportConfig):
    """The merged export's settings."""

    dtype: str = "auto"
    """`auto` (the model's own 16-bit type; float16 for a float32 model), `float16`, `bfloat16` or `float32`."""


@hookimpl
def ftcore_check_plan(plan: Plan) -> list[Problem]:
    """A dtype that exists, and an adapter that can be merged."""
    dtype, found = plan.config(Config).dtype, []
    if dtype not in DTYPES:
        fix = f"use one of {', '.join(DTYPES)}"
        found.append(Problem("export.safetensors.dtype", f"'{dtype}' is no dtype", fix))
    variant = getattr(plan.run.adapter, "variant", None)
    if plan.run.quantizer and getattr(variant, "value", variant) == "dora":
        message = "DoRA over quantized weights cannot be merged exactly"
        found.append(Problem("export", message, "export the adapter, or train over 16-bit weights"))
    return found


@hookimpl
def ftcore_export(plan: Plan, checkpoint: Checkpoint) -> list[Artifact]:
    """Weights, config, generation config and tokenizer under `export/safetensors`."""
    target = plan.output_dir / "export" / "safetensors"
    write_merged(checkpoint.model, checkpoint.tokenizer, target, plan.config(Config).dtype)
    return [Artifact.of("safetensors", target, note="merged model for transformers and vLLM")]
