"""GRPO by TRL: reinforcement learning on groups of completions (Shao et al. 2024, arXiv 2402.03300)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ftcore import Plan, Problem, Shape, TrainerConfig, TrainerSpec, hookimpl
from ftcore.catalog import nearest
from ftcore_trainers._arguments import OWNED

if TYPE_CHECKING:
    from transformers import Trainer

SELECTS = {"data": "prompts"}
SAMPLE_REWARD = "length"
"""Reward for the shipped sample rows, where the user names none."""

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")


@dataclass
class Config(TrainerConfig):
    """GRPO's settings."""

    learning_rate: float = 1e-5
    """Peak learning rate."""
    global_batch: int = 8
    """Completions per optimizer step of one process; a multiple of `num_generations`."""
    num_generations: int = 4
    """Completions per prompt: the group whose mean reward is the baseline."""
    max_completion_length: int = 64
    """Longest completion in tokens."""
    temperature: float = 1.0
    """Sampling temperature."""
    top_p: float = 1.0
    """Nucleus size."""
    beta: float = 0.0
    """Coefficient of the KL divergence from the reference model; 0 needs no reference model."""
    loss_type: str = "dapo"
    """`grpo`, `bnpo`, `dr_grpo`, `dapo`, or another of TRL's names."""


@hookimpl
def ftcore_trainer_spec(config: Config) -> TrainerSpec:
    """Takes prompts and rewards; the reference model is the base with the adapter off."""
    own = {
        "num_generations",
        "max_completion_length",
        "temperature",
        "top_p",
        "beta",
        "loss_type",
        "use_vllm",
        "generation_kwargs",
    }
    return TrainerSpec(
        accepts=frozenset({Shape.PROMPTS}),
        wants_rewards=True,
        reference_model=config.beta > 0,
        args="trl.trainer.grpo_config:GRPOConfig",
        owned=OWNED | own | {"use_transformers_continuous_batching"},
    )


@hookimpl
def ftcore_check_plan(plan: Plan) -> list[Problem]:
    """Groups must fill the batch, and a group of one has no baseline."""
    config = plan.config(Config)
    found = []
    if config.num_generations < 2:
        found.append(
            Problem("trainer.num_generations", f"is {config.num_generations}", "a group needs at least 2 completions")
        )
    elif config.global_batch % config.num_generations:
        message = f"{config.global_batch} is no multiple of trainer.num_generations={config.num_generations}"
        found.append(Problem("trainer.global_batch", message, f"use trainer.global_batch={config.num_generations * 2}"))
    if config.max_completion_length < 1:
        found.append(
            Problem("trainer.max_completion_length", f"is {config.max_completion_length}", "give a number above 0")
        )
    if config.loss_type not in LOSS_TYPES:
        near = nearest(config.loss_type, LOSS_TYPES)
        fix = f"did you mean trainer.loss_type={near}?" if near else f"use one of {', '.join(LOSS_TYPES)}"
        found.append(Problem("trainer.loss_type", f"'{config.loss_type}' is no loss type", fix))
    if config.temperature <= 0:
        found.append(Problem("trainer.temperature", f"is {config.temperature}", "sampling needs a temperature above 0"))
    if config.packing:
        found.append(Problem("trainer.packing", "GRPO's completions cannot be packed", "leave trainer.packing out"))
    return found


@hookimpl
def ftcore_make_trainer(
    plan: Plan,
    model: Any,
    tokenizer: Any,
    dataset: Any,
    rewards: Any,
    callbacks: Any,
    generator: Any,
    optimizer: Any,
) -> Trainer:
    """TRL's GRPOTrainer, with completions from ftcore's generator."""
    from trl import GRPOConfig

    from ftcore_trainers._arguments import early_stopping, quiet, shared
    from ftcore_trainers._dtypes import kept_dtypes
    from ftcore_trainers._grpo_trainer import GeneratorGRPOTrainer

    config = plan.config(Config)
    arguments = {
        "num_generations": config.num_generations,
        "max_completion_length": config.max_completion_length,
        "temperature": config.temperature,
        "top_p": config.top_p,
        "beta": config.beta,
        "loss_type": config.loss_type,
        **shared(plan, "eval" in dataset),
    }
    # Groups are evaluated whole.
    rows, group = arguments["per_device_eval_batch_size"], config.num_generations
    arguments["per_device_eval_batch_size"] = -(-rows // group) * group
    with kept_dtypes(model):
        return quiet(
            GeneratorGRPOTrainer(
                generator=generator,
                model=model,
                reward_funcs=list(rewards),
                args=GRPOConfig(**arguments),
                train_dataset=dataset["train"],
                eval_dataset=dataset.get("eval"),
                processing_class=tokenizer,
                callbacks=[*callbacks, *early_stopping(plan)],
                optimizers=(optimizer, None),
            )
        )
