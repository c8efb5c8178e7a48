"""RLOO by TRL: REINFORCE with the other completions of a group as the baseline (Ahmadian et al., arXiv 2402.14740)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ftcore import Passes, Plan, Problem, Shape, TrainerConfig, TrainerSpec, hookimpl
from ftcore_trainers._arguments import OWNED
from ftcore_trainers._preference import ReferenceModel, in_range, reference_problems
from ftcore_trainers._prompts import ftcore_format_dataset as ftcore_format_dataset
from ftcore_trainers._rollout_keys import OWNED_BY_ROLLOUTS, group_problems, in_groups, noisy_dropout, problems

if TYPE_CHECKING:
    from transformers import Trainer

SELECTS = {"data": "prompts"}
SAMPLE_REWARD = "length"
"""Reward for the shipped sample rows, where the user names none."""


@dataclass
class Config(TrainerConfig):
    """RLOO's settings."""

    learning_rate: float = 1e-5
    """Peak learning rate."""
    global_batch: int = 8
    """Completions per optimizer step of one process; a multiple of `num_generations`."""
    num_generations: int = 4
    """Completions per prompt: the mean reward of the others is the baseline of each."""
    max_completion_length: int = 64
    """Longest completion in tokens."""
    temperature: float = 1.0
    """Sampling temperature."""
    top_p: float = 1.0
    """Nucleus size."""
    share_prompts: bool = False
    """Read a prompt once for all its completions in a micro-batch, where a kernel does so (GPUs from 8.0) and it spares
    enough: 1.1 to 1.2 times the speed where prompts are no shorter than completions. Off unless asked for."""
    beta: float = 0.05
    """Coefficient of the KL divergence from the reference model, taken off the reward; 0 needs no reference model."""
    reference: ReferenceModel = ReferenceModel.start
    """`start`: the policy as training finds it, with the adapter of `adapter.path`; `base`: it without an adapter."""


@hookimpl
def ftcore_trainer_spec(config: Config) -> TrainerSpec:
    """Takes prompts and rewards; the reference model is the policy's own weights."""
    return TrainerSpec(
        accepts=frozenset({Shape.PROMPTS}),
        wants_rewards=True,
        reference_model=config.beta > 0,
        args="trl.trainer.rloo_config:RLOOConfig",
        owned=OWNED | OWNED_BY_ROLLOUTS | {"num_generations", "beta"},
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
        *noisy_dropout(plan),
        *in_range(config, from_0=("beta",)),
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
    """TRL's RLOOTrainer, with completions from ftcore's generator."""
    from trl import RLOOConfig

    from ftcore_trainers._arguments import early_stopping, quiet, shared
    from ftcore_trainers._dtypes import kept_dtypes
    from ftcore_trainers._reference import reference_of
    from ftcore_trainers._rloo_trainer import GeneratorRLOOTrainer

    config = plan.config(Config)
    arguments = {
        "num_generations": config.num_generations,
        "max_completion_length": config.max_completion_length,
        "temperature": config.temperature,
        "top_p": config.top_p,
        "beta": config.beta,
        **shared(plan, "eval" in dataset),
    }
    with kept_dtypes(model):
        return quiet(
            GeneratorRLOOTrainer(
                generator=generator,
                share_prompts=config.share_prompts,
                reference=reference_of(plan, model, config.reference.value) if config.beta > 0 else None,
                model=model,
                reward_funcs=list(rewards),
                args=RLOOConfig(**in_groups(arguments, config.num_generations)),
                train_dataset=dataset["train"],
                eval_dataset=dataset.get("eval"),
                processing_class=tokenizer,
                callbacks=[*callbacks, *early_stopping(plan)],
                optimizers=(optimizer, None),
            )
        )
