"""GRPO by TRL: reinforcement learning on groups of completions (Shao et al. 2024, arXiv 2402.03300)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from ftcore import Passes, Plan, Problem, Shape, TrainerConfig, TrainerSpec, hookimpl
from ftcore_trainers._arguments import OWNED
from ftcore_trainers._preference import ReferenceModel, in_range, reference_problems, unknown_loss
from ftcore_trainers._prompts import ftcore_format_dataset as ftcore_format_dataset
from ftcore_trainers._rollout_keys import OWNED_BY_ROLLOUTS, group_problems, in_groups, noisy_dropout, problems

if TYPE_CHECKING:
    from transformers import Trainer

SELECTS = {"data": "prompts"}
SAMPLE_REWARD = "length"
"""Reward for the shipped sample rows, where the user names none."""

SEVERAL_STEPS = ("generation_batch_size", "steps_per_generation", "num_iterations")
"""Arguments by which a rollout is learnt from in several steps, whose probabilities are compared with its own."""
LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")


class ImportanceSampling(Enum):
    """What a ratio of probabilities is taken over."""

    token = "token"
    sequence = "sequence"


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
    share_prompts: bool = False
    """Read a prompt once for all its completions in a micro-batch, where a kernel does so (GPUs from 8.0) and it spares
    enough: 1.1 to 1.2 times the speed where prompts are no shorter than completions. Off unless asked for."""
    beta: float = 0.0
    """Coefficient of the KL divergence from the reference model; 0 needs no reference model."""
    reference: ReferenceModel = ReferenceModel.start
    """`start`: the policy as training finds it, with the adapter of `adapter.path`; `base`: it without an adapter."""
    loss_type: str = "dapo"
    """`grpo`, `bnpo`, `dr_grpo`, `dapo`, or another of TRL's names."""
    importance_sampling_level: ImportanceSampling = ImportanceSampling.token
    """Whether a ratio of probabilities is one of each token, or one of each whole completion: `sequence` is GSPO."""


@hookimpl
def ftcore_trainer_spec(config: Config) -> TrainerSpec:
    """Takes prompts and rewards; the reference model is the policy's own weights."""
    return TrainerSpec(
        accepts=frozenset({Shape.PROMPTS}),
        wants_rewards=True,
        reference_model=config.beta > 0,
        args="trl.trainer.grpo_config:GRPOConfig",
        owned=OWNED | OWNED_BY_ROLLOUTS | {"num_generations", "beta", "loss_type", "importance_sampling_level"},
        measures=("reward",),
        passes=Passes(unlearnt=float(config.beta > 0), written=config.max_completion_length, logprobs=True),
    )


@hookimpl
def ftcore_check_plan(plan: Plan) -> list[Problem]:
    """Groups must fill the batch, and a group of one has no baseline."""
    config = plan.config(Config)
    held = reference_problems(plan, config.reference, False) if config.beta > 0 else ()
    return [
        *group_problems(plan),
        *problems(plan),
        *(noisy_dropout(plan) if any(name in config.args for name in SEVERAL_STEPS) else ()),
        *in_range(config, from_0=("beta",)),
        *unknown_loss(config.loss_type, LOSS_TYPES),
        *held,
    ]


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
    from ftcore_trainers._reference import reference_of

    config = plan.config(Config)
    arguments = {
        "num_generations": config.num_generations,
        "max_completion_length": config.max_completion_length,
        "temperature": config.temperature,
        "top_p": config.top_p,
        "beta": config.beta,
        "loss_type": config.loss_type,
        "importance_sampling_level": config.importance_sampling_level.value,
        **shared(plan, "eval" in dataset),
    }
    with kept_dtypes(model):
        return quiet(
            GeneratorGRPOTrainer(
                generator=generator,
                share_prompts=config.share_prompts,
                reference=reference_of(plan, model, config.reference.value) if config.beta > 0 else None,
                model=model,
                reward_funcs=list(rewards),
                args=GRPOConfig(**in_groups(arguments, config.num_generations)),
                train_dataset=dataset["train"],
                eval_dataset=dataset.get("eval"),
                processing_class=tokenizer,
                callbacks=[*callbacks, *early_stopping(plan)],
                optimizers=(optimizer, None),
            )
        )
