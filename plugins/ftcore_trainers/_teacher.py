"""The model that another one learns from."""

from __future__ import annotations

import copy
from typing import Any

import torch

from ftcore import Plan, Problem, Refused
from ftcore.errors import Exit
from ftcore_trainers._fused_head import base_of


def teacher_of(plan: Plan, student: Any) -> Any:
    """The checkpoint of `trainer.teacher`, frozen and in the run's dtype; a tiny random model where none is named.

    Raises Refused where it cannot be loaded, or has another vocabulary.
    """
    from transformers import AutoModelForCausalLM

    from ftcore_trainers.gkd import Config, vocabulary_problem

    config, own = plan.config(Config), base_of(student).config
    dtype = getattr(torch, plan.dtype)
    if config.teacher is None:
        with torch.random.fork_rng():
            torch.manual_seed(config.seed + 1)
            teacher = AutoModelForCausalLM.from_config(copy.deepcopy(own), dtype=dtype)
    else:
        try:
            teacher = AutoModelForCausalLM.from_pretrained(
                config.teacher, dtype=dtype, trust_remote_code=False, use_safetensors=True
            )
        except (OSError, ValueError) as error:  # what transformers raises for an id or a folder that is none
            message = f"{config.teacher} cannot be loaded: {' '.join(str(error).split())[:120]}"
            fix = "name a checkpoint folder or hub id of a causal language model"
            raise Refused(Problem("trainer.teacher", message, fix, Exit.MISSING_INPUT)) from error
    sizes = (one.get_text_config().vocab_size for one in (teacher.config, own))
    if wrong := [*vocabulary_problem(*sizes)]:
        raise Refused(*wrong)
    return teacher.to(base_of(student).device).eval().requires_grad_(False)
