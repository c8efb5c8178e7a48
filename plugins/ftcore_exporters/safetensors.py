"""The merged model in 16 bits: a plain transformers folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftcore import Artifact, Checkpoint, Plan, Problem, hookimpl
from ftcore.config import ReadBackConfig
from ftcore.merge import write_weights
from ftcore_exporters._serving import generation_settings

DTYPES = ("auto", "float16", "bfloat16", "float32")
BASES = ("dequantized", "original")


@dataclass
class Config(ReadBackConfig):
    """The merged export's settings."""

    dtype: str = "auto"
    """`auto` (the model's own 16-bit type; float16 for a float32 model), `float16`, `bfloat16` or `float32`."""
    onto: str = "dequantized"
    """What the adapter is added to where the base was quantized: the `dequantized` weights, over which it was trained,
    or the `original` ones, as the checkpoint holds them."""
    shard_size: int = 5000
    """Megabytes of one file."""


@hookimpl
def ftcore_check_plan(plan: Plan) -> list[Problem]:
    """A dtype that exists, and an adapter that can be merged, onto weights that it fits."""
    from ftcore_exporters._merging import makes_up_for_rounding

    config, found = plan.config(Config), []
    for key, value, known in (("dtype", config.dtype, DTYPES), ("onto", config.onto, BASES)):
        if value not in known:
            problem = f"'{value}' is not one of {', '.join(known)}"
            found.append(Problem(f"export.safetensors.{key}", problem, f"use export.safetensors.{key}={known[0]}"))
    if config.shard_size < 1:
        fix = "leave it out for files of 5000 MB"
        found.append(Problem("export.safetensors.shard_size", f"{config.shard_size} MB hold nothing", fix))
    if config.onto == "original" and makes_up_for_rounding(plan):
        message = "`original` would add what rounding took a second time: the adapter of adapter.init=loftq holds it"
        fix = "use export.safetensors.onto=dequantized"
        found.append(Problem("export.safetensors.onto", message, fix))
    variant = getattr(plan.run.adapter, "variant", None)
    if plan.run.quantizer and getattr(variant, "value", variant) == "dora":
        message = "DoRA over quantized weights cannot be merged exactly"
        found.append(Problem("export", message, "export the adapter, or train over 16-bit weights"))
    return found


@hookimpl
def ftcore_export(plan: Plan, checkpoint: Checkpoint) -> list[Artifact]:
    """Weights, config, generation config and tokenizer under `export/safetensors`."""
    config, target = plan.config(Config), plan.output_dir / "export" / "safetensors"
    original = config.onto == "original"
    write_weights(
        checkpoint.weights(original=original),
        checkpoint.config(),
        checkpoint.tokenizer,
        target,
        config.dtype,
        shard_size=config.shard_size * 10**6,
        generation=generation_settings(checkpoint) if plan.family.chat else checkpoint.generation(),
    )
    note = "merged model for transformers and vLLM"
    if plan.run.quantizer is not None:
        note += f", added to the {config.onto} weights"
    checks = _read_back(checkpoint, target, original and plan.run.quantizer is not None) if config.verify else {}
    return [Artifact.of("safetensors", target, note=note, checks=checks)]


def _read_back(checkpoint: Checkpoint, folder: Path, other: bool) -> Mapping[str, Any]:
    """By transformers; merged onto `other` weights than those that were trained over, numbers are only reported."""
    from ftcore.agreement import REPORTED
    from ftcore.read_back import read_back_folder

    return read_back_folder(checkpoint, folder, within=REPORTED if other else None)
