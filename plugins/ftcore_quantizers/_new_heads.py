"""Modules that are trained whole beside the adapter, and so keep their own dtype: 4-bit weights have no gradient."""

from __future__ import annotations

from ftcore import Plan, checkpoint


def kept(plan: Plan) -> list[str] | None:
    """Names for `llm_int8_skip_modules`; None, which leaves transformers to choose, where the head is not new."""
    import torch
    import transformers

    from ftcore_adapters._heads import TASKS, new_modules

    task = TASKS.get(plan.family.auto_class)
    if task != "SEQ_CLS" or plan.run.model is None:
        return None
    place, revision = checkpoint.locate(plan.run.model, plan.family), plan.run.model.revision
    config = transformers.AutoConfig.from_pretrained(
        place, revision=revision, trust_remote_code=False, **plan.family.settings
    )
    with torch.device("meta"):
        model = getattr(transformers, plan.family.auto_class).from_config(config)
    return ["lm_head", *new_modules(model, task)]
