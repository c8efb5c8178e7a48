"""The model of a run without its weights: what plans count and claim."""

from __future__ import annotations

from typing import Any

from ftcore import checkpoint, vocabulary
from ftcore import hooks as h
from ftcore.manager import Hooks
from ftcore.specs import PatchReport, Phase, Plan


def on_meta(hooks: Hooks, plan: Plan) -> tuple[Any, PatchReport]:
    """The model without weights, patched and adapted by the same hooks as in the run: exact counts and claims."""
    import torch
    import transformers

    assert plan.run.model is not None
    auto = getattr(transformers, plan.family.auto_class)
    with torch.device("meta"):
        model = auto.from_config(checkpoint.config_of(plan.run.model, plan.family), dtype=torch.bfloat16)
        vocabulary.grown(plan, model)
    base = hooks.first(h.ftcore_patch_model, plan=plan, model=model, phase=Phase.BASE)
    if not (plan.run.adapter and getattr(plan.run.adapter, "path", None)):
        with torch.device("meta"):
            model = hooks.first(h.ftcore_adapt_model, plan=plan, model=model)
    fused = hooks.first(h.ftcore_patch_model, plan=plan, model=model, phase=Phase.ADAPTED)
    return model, PatchReport(claims=base.claims + fused.claims, skipped=base.skipped + fused.skipped)
