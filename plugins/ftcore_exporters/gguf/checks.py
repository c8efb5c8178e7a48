"""What is refused before any weight is read: families and configs that llama.cpp cannot compute."""

from __future__ import annotations

import copy
from typing import Any

from ftcore import Plan, Problem, Refused
from ftcore import checkpoint as sources
from ftcore.merge import ties
from ftcore_exporters.gguf.hyperparameters import why_not

OTHER = "use +export=[safetensors]"


def config_problems(plan: Plan, key: str = "export.gguf") -> list[Problem]:
    """Why the run's model cannot be written as GGUF."""
    model, facts = plan.run.model, plan.family.gguf
    assert model is not None
    if facts is None:
        return [Problem(key, f"{model.name} cannot be written as GGUF yet", OTHER)]
    if plan.trainer is not None and plan.trainer.auto_class is not None:
        return [Problem(key, "a model with a head of its own cannot be written as GGUF", OTHER)]
    try:
        config = sources.config_of(model, plan.family)
    except (OSError, ValueError, Refused):  # loading will say it better
        return []
    if _untied_by_training(plan, config):
        config = copy.deepcopy(config)
        ties(config).tie_word_embeddings = False
    reason = why_not(config.get_text_config(), facts)
    return [Problem(key, reason, OTHER)] if reason else []


def _untied_by_training(plan: Plan, config: Any) -> bool:
    """Whether head and embedding are one in the checkpoint, and the run trains one of the two whole."""
    modules = getattr(plan.run.adapter, "modules_to_save", None) or ()
    whole = {name.rpartition(".")[2] for name in modules} & {"lm_head", "embed_tokens"}
    return len(whole) == 1 and bool(ties(config).tie_word_embeddings)
