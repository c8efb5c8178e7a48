"""FP8: frozen weights in float8_e4m3fn, one scale per output channel (Micikevicius et al. 2022, arXiv 2209.05433).

An approximation: the base model's weights are rounded to fp8, and so are the inputs of every product with them, which
is what makes the products fast on GPUs with fp8 tensor cores. Adapters, embeddings, norms and the head keep their
precision. The trained model is defined over the rounded weights, and a merged export holds those.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from ftcore import Plan, Problem, QuantizerConfig, hookimpl

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Backward(Enum):
    """In which precision gradients pass through the frozen weights."""

    fp8 = "fp8"
    bf16 = "bf16"


@dataclass
class Config(QuantizerConfig):
    """FP8's settings."""

    backward: Backward = Backward.fp8
    """`fp8` keeps a transposed copy, 2 bytes a weight; `bf16` unpacks the weights each time: 1 byte, slower, closer."""


def bits_per_weight(config: Config) -> float:
    """With the transposed copy, or without."""
    return 16 if config.backward is Backward.fp8 else 8


@hookimpl
def ftcore_check_plan(plan: Plan) -> list[Problem]:
    """What trains or measures the weights themselves cannot be had over fp8."""
    adapter: Any = plan.run.adapter
    found = []
    if getattr(getattr(adapter, "variant", None), "value", None) == "dora":
        found.append(
            Problem(
                "adapter.variant",
                "`dora` needs the norms of 16-bit weights, and the quantizer is fp8",
                "use adapter.variant=lora or rslora",
            )
        )
    return found


@hookimpl
def ftcore_quantize_model(plan: Plan, model: PreTrainedModel) -> PreTrainedModel:
    """The family's linear layers, one after the other, so that there is one weight in both precisions at a time."""
    from importlib.util import find_spec

    from torch import nn

    from ftcore.report import note
    from ftcore_adapters._heads import TASKS, new_modules
    from ftcore_kernels.layers.fp8_linear import Fp8Linear

    if plan.device.capability < (8, 9) or find_spec("triton") is None:
        needs = "fast products need triton and a GPU of compute capability 8.9"
        note(f"fp8: weights are unpacked for each product, which is smaller but not faster; {needs}")
    transposed = plan.config(Config).backward is Backward.fp8
    # A new head is trained whole, and has no gradient in 8 bits.
    whole = (*plan.family.frozen, *new_modules(model, TASKS.get(plan.family.auto_class, "CAUSAL_LM")))
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and name.rpartition(".")[2] in plan.family.lora_targets
        and not f"{name}.".startswith(tuple(f"{path}." for path in whole))
    ]
    for name in names:
        parent, _, child = name.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, child, Fp8Linear(getattr(owner, child), transposed))
    return model
