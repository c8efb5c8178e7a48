"""What an adapter trains besides A and B: modules as a whole, and rows of new tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ftcore import Plan, Problem
from ftcore_adapters._rounding import say_lost

if TYPE_CHECKING:
    from torch import nn


def whole_in_16_bits(plan: Plan) -> Iterator[Problem]:
    """What is trained whole is in 32 bits over float16, and hidden states are not: a new head alone takes both."""
    adapter: Any = plan.run.adapter
    if adapter.modules_to_save and plan.run.trainer is not None and plan.dtype == "float16":  # the device is asked
        message = f"{', '.join(adapter.modules_to_save)} would be trained in float16, whose gradients cannot be scaled"
        fix = "use model.dtype=float32, or model.dtype=bfloat16 where the GPU has it, or leave it out"
        yield Problem("adapter.modules_to_save", message, fix)


def whole_and_quantized(plan: Plan) -> Iterator[Problem]:
    """Quantized weights have no gradients."""
    adapter: Any = plan.run.adapter
    whole = [m for m in adapter.modules_to_save if m.rpartition(".")[2] in plan.family.lora_targets]
    if plan.run.quantizer and whole:
        message = f"'{whole[0]}' is in {plan.run.quantizer.name} and cannot be trained whole"
        yield Problem("adapter.modules_to_save", message, "leave it out; adapter.targets adapts it")


def prepare(adapted: nn.Module, plan: Plan) -> None:
    """Give what is trained the dtype that it is trained in, and say where that loses steps."""
    _in_float32(adapted, plan)
    _with_bias(adapted)
    say_lost(plan, adapted)


def _in_float32(adapted: nn.Module, plan: Plan) -> None:
    """The rows of new tokens; in a training over float16, whose gradients no scaler takes, whole modules as well."""
    whole = plan.dtype == "float16" and plan.run.trainer is not None
    names = (".trainable_tokens_delta.", *([".modules_to_save."] if whole else []))
    for name, weight in adapted.named_parameters():
        if weight.requires_grad and any(part in name for part in names):
            weight.data = weight.data.float()


def _with_bias(adapted: nn.Module) -> None:
    """TRL asks heads for their bias; PEFT's wrapper of one whose rows are trained does not say that there is none."""
    for module in adapted.modules():
        inner = getattr(module, "original_module", None)
        if inner is not None and not hasattr(module, "bias") and getattr(inner, "bias", 0) is None:
            module.register_parameter("bias", None)
