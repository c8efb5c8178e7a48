"""Full fine-tuning: every weight is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ftcore import AdapterConfig, Plan, Problem, hookimpl
from ftcore.checkpoint import read_config
from ftcore.parameter_groups import PLAIN, no_lora
from ftcore_adapters._rounding import say_lost

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


@dataclass
class Config(AdapterConfig):
    """Full fine-tuning has no settings of its own."""


@hookimpl
def ftcore_check_plan(plan: Plan) -> list[Problem]:
    """Quantized weights have no gradients, and there are no matrices of LoRA's."""
    assert plan.run.model is not None
    if plan.run.trainer and plan.run.trainer.loraplus_ratio != PLAIN:
        return [no_lora()]
    if plan.run.quantizer:
        return [
            Problem(
                "adapter",
                f"full fine-tuning cannot train {plan.run.quantizer.name} weights",
                "use adapter=lora, or leave the quantizer out",
            )
        ]
    if not plan.run.model.tiny and (read_config(plan.run.model, plan.family) or {}).get("quantization_config"):
        return [Problem("adapter", "the checkpoint is quantized and cannot be trained in full", "use adapter=lora")]
    return []


@hookimpl
def ftcore_adapt_model(plan: Plan, model: PreTrainedModel) -> nn.Module:
    """All parameters but the family's frozen ones require gradients; float16 becomes float32 for loss scaling."""
    if plan.dtype == "float16":
        model.float()
    model.requires_grad_(True)
    for path in plan.family.frozen:
        model.get_submodule(path).requires_grad_(False)
    say_lost(plan, model)
    return model
