"""The merged model in 4-bit integers for vLLM: compressed-tensors W4A16, 128 weights to a scale, rounded to nearest.

Nothing is calibrated: a scale comes from the largest weight of its group alone. Embeddings, head and routers keep 16
bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ftcore import Artifact, Checkpoint, Plan, Problem, Refused, hookimpl
from ftcore.config import ReadBackConfig

REQUIRES = ("compressed-tensors>=0.20,<0.21",)
SIZES = (128, 64, 32)
"""Weights that may share a scale, as vLLM's kernels take them."""


@dataclass
class Config(ReadBackConfig):
    """The 4-bit export's settings."""

    group_size: int | None = None
    """Weights of a row that share a scale: 128, 64 or 32; null takes the largest that divides all rows."""
    symmetric: bool = True
    """Scales around 0. `false` adds a zero point to each group: closer, but transformers then loads it with
    `CompressedTensorsConfig(dequantize=True)` only, and no experts."""


@hookimpl
def ftcore_check_plan(plan: Plan) -> list[Problem]:
    """A text model whose linear layers are published one by one, and groups that fit its rows."""
    from ftcore_exporters._linear_layers import problems

    return problems(plan, "int4") or [*_groups(plan)]


def _groups(plan: Plan) -> Iterator[Problem]:
    from ftcore_exporters._linear_layers import planned

    config = plan.config(Config)
    if config.group_size is not None and config.group_size not in SIZES:
        fix = f"use one of {', '.join(map(str, SIZES))}, or null"
        yield Problem("export.int4.group_size", f"is {config.group_size}", fix)
    elif layers := planned(plan):
        if layers.experts and not config.symmetric:
            message = "neither transformers nor vLLM reads experts with zero points"
            yield Problem("export.int4.symmetric", message, "leave it on")
        try:
            _size(config, layers.inputs)
        except Refused as refused:
            yield from refused.problems


def _size(config: Config, inputs: frozenset[int]) -> int:
    """The group size for rows of these lengths. Raises Refused where none divides them all."""
    sizes = SIZES if config.group_size is None else (config.group_size,)
    for size in sizes:
        if all(columns % size == 0 for columns in inputs):
            return size
    worst = next(columns for columns in sorted(inputs) if columns % sizes[-1])
    fix = "use '+export=[fp8]'" if config.group_size is None else "leave it out"
    message = f"rows of {worst} weights do not divide into groups of {sizes[-1]}"
    raise Refused(Problem("export.int4.group_size", message, fix))


@hookimpl
def ftcore_export(plan: Plan, checkpoint: Checkpoint) -> list[Artifact]:
    """Weights, config, generation config and tokenizer under `export/int4`."""
    from ftcore_exporters._compressed import Format
    from ftcore_exporters._compressed_export import export
    from ftcore_exporters._linear_layers import layers_of

    config, weights = plan.config(Config), checkpoint.weights()
    layers = layers_of(checkpoint.config(), plan.family.auto_class, weights)
    size = _size(config, layers.inputs)
    form = Format("W4A16" if config.symmetric else "W4A16_ASYM", "pack-quantized", size)
    note = f"4-bit integers, {size} weights to a scale, rounded to nearest"
    return [export(checkpoint, "int4", form, layers, weights, note, config.verify)]
