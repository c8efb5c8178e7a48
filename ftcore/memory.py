"""The one owner of recomputation: what `memory=` means for a model."""

from __future__ import annotations

from typing import Any

from ftcore.config import Memory
from ftcore.specs import Plan

RESERVE = 0.8
"""Part of the free memory that activations may fill; the rest is for workspaces and fragmentation."""


def apply(plan: Plan, model: Any) -> bool:
    """Switch recomputation of whole layers on if `memory` asks for it; returns whether it is on."""
    recompute = wants_recompute(plan, model)
    if recompute:
        # Non-reentrant: works with frozen inputs, and recomputes only what the backward pass asks for.
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return recompute


def wants_recompute(plan: Plan, model: Any) -> bool:
    """`least` always, `off` never, `auto` when the activations of a micro-batch would not fit the free GPU memory."""
    if plan.run.memory is not Memory.auto:
        return plan.run.memory is Memory.least
    if plan.device.kind != "cuda" or plan.run.trainer is None:
        return False
    return activation_bytes(plan, model.config) > RESERVE * plan.device.memory


def activation_bytes(plan: Plan, config: Any) -> int:
    """Bytes that one micro-batch of the longest rows keeps for its backward pass: an upper estimate.

    Without recomputation. Counted per token and layer from what transformers' decoder layers save: about 14 tensors of
    the hidden size and 5 of the intermediate size, and the logits with their float32 copy and gradient once.
    """
    text = config.get_text_config()
    width = 4 if plan.dtype == "float32" else 2
    layer = width * (14 * text.hidden_size + 5 * getattr(text, "intermediate_size", 4 * text.hidden_size))
    head = text.vocab_size * (width + 8)
    assert plan.run.trainer is not None
    tokens = micro_batch(plan) * plan.run.trainer.max_length
    return int(tokens * (layer * text.num_hidden_layers + head))


def micro_batch(plan: Plan) -> int:
    """Rows per forward pass."""
    assert plan.run.trainer is not None
    trainer = plan.run.trainer
    if trainer.micro_batch:
        return trainer.micro_batch
    return next(n for n in range(min(8, trainer.global_batch), 0, -1) if trainer.global_batch % n == 0)
