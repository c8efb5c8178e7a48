"""Checkpoints that are published in a quantized form that cannot be trained on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ftcore import Plan
from ftcore.checkpoint import read_config
from ftcore.defaults.model import ftcore_load_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load(plan: Plan, quantization: Any | None, method: str, config_class: str) -> PreTrainedModel:
    """Load as core does; weights quantized by `method` become the plan's dtype.

    :param quantization: A quantizer's own config; the plan allows none for a checkpoint that is quantized already.
    :param config_class: transformers' config of that method, which takes `dequantize`.
    """
    import transformers

    assert plan.run.model is not None
    random = plan.run.model.path is None and (plan.run.model.tiny or plan.run.model.shape)
    found = {} if random else (read_config(plan.run.model, plan.family) or {}).get("quantization_config") or {}
    if found.get("quant_method") == method:
        quantization = getattr(transformers, config_class)(dequantize=True)
    model: PreTrainedModel = ftcore_load_model(plan=plan, quantization=quantization)
    return model
