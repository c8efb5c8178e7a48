"""The merged model in FP8 for vLLM: compressed-tensors, a scale per row, activations per token as they come.

Weights are float8_e4m3fn (Micikevicius et al. 2022, arXiv 2209.05433) and rounded to nearest; activations get their
scales while the model runs, so no calibration is needed. Embeddings, head and routers keep 16 bits.
"""

from __future__ import annotations

from dataclasses import dataclass

from ftcore import Artifact, Checkpoint, Plan, Problem, hookimpl
from ftcore.config import ReadBackConfig

REQUIRES = ("compressed-tensors>=0.20,<0.21",)


@dataclass
class Config(ReadBackConfig):
    """The FP8 export's settings."""


@hookimpl
def ftcore_check_plan(plan: Plan) -> list[Problem]:
    """A text model whose linear layers are published one by one."""
    from ftcore_exporters._linear_layers import problems

    return problems(plan, "fp8")


@hookimpl
def ftcore_export(plan: Plan, checkpoint: Checkpoint) -> list[Artifact]:
    """Weights, config, generation config and tokenizer under `export/fp8`."""
    from ftcore_exporters._compressed import Format
    from ftcore_exporters._compressed_export import export
    from ftcore_exporters._linear_layers import layers_of

    weights = checkpoint.weights()
    layers = layers_of(checkpoint.config(), plan.family.auto_class, weights)
    form = Format("FP8_DYNAMIC", "float-quantized")
    note = "FP8, a scale per row, activations per token"
    return [export(checkpoint, "fp8", form, layers, weights, note, plan.config(Config).verify)]
