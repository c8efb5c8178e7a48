"""What the families with experts share: traits, names of parameters for LoRA, and what follows from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ftcore import Limit, Plan, Refused
from ftcore.checkpoint import settings

ATTENTION_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
"""Expert weights of transformers 5, 3-D parameters `[experts, ...]`; the router is left alone."""
DENSE = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")
"""The linear layers of shared experts and dense MLPs, for families whose names PEFT 0.21 would take for experts.

In `target_modules` it turns `gate_proj` into `experts.gate_up_proj` for model types that once had a module per expert,
and leaves the layer that is really called so without an adapter. As parameters they are taken by their name.
"""


def quantized_dense(targets: Sequence[str], has_dense: Callable[[Mapping[str, Any]], bool]) -> Limit:
    """A quantizer refused where LoRA would adapt such layers.

    :param targets: What can be adapted nevertheless.
    :param has_dense: Whether a config's model has them.
    """

    def applies(plan: Plan) -> bool:
        run, adapter = plan.run, plan.run.adapter
        assert run.model is not None
        if run.quantizer is None or adapter is None or adapter.name != "lora":
            return False
        chosen = getattr(adapter, "targets", [])
        if chosen and not any(name in DENSE for name in chosen):
            return False
        try:
            return has_dense(settings(run.model, plan.family))
        except (Refused, KeyError):  # a problem of the checkpoint's own, named by another check
            return False

    return Limit(
        key="quantizer",
        reason="LoRA adapts the dense MLPs of this family as parameters, which quantized weights cannot be",
        fix=f"leave them out: 'adapter.targets=[{','.join((*targets, *EXPERTS))}]'",
        applies=applies,
    )
