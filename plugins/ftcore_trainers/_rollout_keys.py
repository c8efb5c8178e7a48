"""Keys and checks that trainers share that learn from completions of their own. Nothing here imports torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from ftcore import Plan, Problem
from ftcore.specs.training import COLDEST

OWNED_BY_ROLLOUTS = frozenset(
    {
        "max_completion_length",
        "temperature",
        "top_p",
        "use_vllm",
        "generation_kwargs",
        "use_transformers_continuous_batching",
        "reward_weights",
        "model_init_kwargs",
        "sync_ref_model",
        "ref_model_mixup_alpha",
        "ref_model_sync_steps",
    }
)
"""Arguments of TRL's that are ftcore's own keys, or are about generation and models that are ftcore's business."""


def problems(plan: Plan, nucleus: bool = True) -> Iterator[Problem]:
    """What no trainer does that learns from its own completions."""
    config: Any = plan.run.trainer
    if config.max_completion_length < 1:
        yield Problem("trainer.max_completion_length", f"is {config.max_completion_length}", "give a number above 0")
    if not COLDEST <= config.temperature < math.inf:
        fix = f"sampling needs a temperature of {COLDEST:g} or above"
        yield Problem("trainer.temperature", f"is {config.temperature}", fix)
    min_p = config.args.get("min_p")
    if isinstance(min_p, int | float) and not 0 <= min_p <= 1:
        yield Problem("trainer.args.min_p", f"is {min_p}", "give a part of the likeliest token's chance, from 0 to 1")
    penalty = config.args.get("repetition_penalty")
    if isinstance(penalty, int | float) and not 0 < penalty < math.inf:
        yield Problem("trainer.args.repetition_penalty", f"is {penalty}", "give a number above 0; 1 leaves it out")
    for name in (name for name in config.args if name.startswith("vllm_")):
        message = "is of TRL's own way to vLLM, which is not taken"
        yield Problem(f"trainer.args.{name}", message, "leave it out; generator=vllm has settings of its own")
    if nucleus and not 0 < config.top_p <= 1:
        yield Problem("trainer.top_p", f"is {config.top_p}", "give a number above 0 and up to 1")
    if config.packing:
        name = {"grpo": "GRPO", "ppo": "PPO", "rloo": "RLOO"}.get(config.name, config.name)
        yield Problem("trainer.packing", f"{name}'s completions cannot be packed", "leave trainer.packing out")


def without_dropout(plan: Plan) -> Iterator[Problem]:
    """TRL switches dropout off in these trainers, unless it is told not to."""
    assert plan.run.trainer is not None
    if getattr(plan.run.adapter, "dropout", 0.0) and plan.run.trainer.args.get("disable_dropout", True):
        fix = "leave it out, or add +trainer.args.disable_dropout=false"
        yield Problem("adapter.dropout", f"{plan.run.trainer.name} switches it off", fix)


def noisy_dropout(plan: Plan) -> Iterator[Problem]:
    """Dropout would be another one in each pass whose log-probabilities are compared."""
    assert plan.run.trainer is not None
    if getattr(plan.run.adapter, "dropout", 0.0) and not plan.run.trainer.args.get("disable_dropout"):
        name = plan.run.trainer.name
        message = f"{name} compares log-probabilities of the same tokens, which dropout would make noisy"
        yield Problem("adapter.dropout", message, "leave it out")


def group_problems(plan: Plan) -> Iterator[Problem]:
    """Groups must fill the batch, and a group of one has no baseline."""
    config: Any = plan.run.trainer
    if config.num_generations < 2:
        yield Problem("trainer.num_generations", f"is {config.num_generations}", "a group needs at least 2 completions")
    elif config.global_batch % config.num_generations:
        message = f"{config.global_batch} is no multiple of trainer.num_generations={config.num_generations}"
        yield Problem("trainer.global_batch", message, f"use trainer.global_batch={config.num_generations * 2}")


def in_groups(arguments: dict[str, Any], num_generations: int) -> dict[str, Any]:
    """The arguments with whole groups in each batch of held-out prompts."""
    rows = arguments["per_device_eval_batch_size"]
    return arguments | {"per_device_eval_batch_size": -(-rows // num_generations) * num_generations}
