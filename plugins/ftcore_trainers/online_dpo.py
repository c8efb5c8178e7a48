"""Online DPO by TRL: DPO on pairs of the policy's own completions that rewards rank (Guo et al., arXiv 2402.04792)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ftcore import Passes, Plan, Problem, Shape, TrainerConfig, TrainerSpec, hookimpl
from ftcore_trainers._arguments import OWNED
from ftcore_trainers._preference import ReferenceModel, in_range, reference_problems, unknown_loss
from ftcore_trainers._prompts import ftcore_format_dataset as ftcore_format_dataset
from ftcore_trainers._rollout_keys import OWNED_BY_ROLLOUTS, problems, without_dropout

if TYPE_CHECKING:
    from transformers import Trainer

SELECTS = {"data": "prompts"}
SAMPLE_REWARD = "length"
"""Reward for the shipped sample rows, where the user names none."""

LOSS_TYPES = ("sigmoid", "ipo")


@dataclass
class Config(TrainerConfig):
    """Online DPO's settings."""

    learning_rate: float = 5e-5
    """Peak learning rate."""
    global_batch: int = 8
    """Prompts per optimizer step of one process; each is completed twice."""
    max_completion_length: int = 64
    """Longest completion in tokens."""
    temperature: float = 0.9
    """Sampling temperature."""
    top_p: float = 1.0
    """Nucleus size."""
    beta: float = 0.1
    """How strongly the policy is held to the reference model; tau of `ipo`."""
    loss_type: str = "sigmoid"
    """`sigmoid` (DPO) or `ipo`."""
    reference: ReferenceModel = ReferenceModel.start
    """`start`: the policy as training finds it, with the adapter of `adapter.path`; `base`: it without an adapter."""


@hookimpl
def ftcore_trainer_spec(config: Config) -> TrainerSpec:
    """Takes prompts and rewards; the reference model is the policy's own weights."""
    own = {"beta", "loss_type", "max_new_tokens", "reward_model_path", "remove_unused_columns"}
    return TrainerSpec(
        accepts=frozenset({Shape.PROMPTS}),
        wants_rewards=True,
        reference_model=True,
        args="trl.experimental.online_dpo.online_dpo_config:OnlineDPOConfig",
        owned=OWNED | OWNED_BY_ROLLOUTS | own,
        passes=Passes(sequences=2, unlearnt=2, written=config.max_completion_length, logprobs=True),
    )


@hookimpl
def ftcore_check_plan(plan: Plan) -> list[Problem]:
    """A completion leaves room for its prompt; nothing is held out, which TRL's trainer does not measure."""
    config = plan.config(Config)
    return [
        *problems(plan),
        *without_dropout(plan),
        *in_range(config, above_0=("beta",)),
        *unknown_loss(config.loss_type, LOSS_TYPES),
        *reference_problems(plan, config.reference, False),
        *_own(plan, config),
    ]


def _own(plan: Plan, config: Config) -> Iterator[Problem]:
    if 0 < config.max_length <= config.max_completion_length:
        message = f"{config.max_length} leaves no prompt before trainer.max_completion_length="
        fix = f"use trainer.max_length={2 * config.max_completion_length}"
        yield Problem("trainer.max_length", f"{message}{config.max_completion_length}", fix)
    data = plan.run.data
    for key in ("eval_path", "eval_size"):
        if data is not None and getattr(data, key):
            message = "online_dpo measures nothing on held-out prompts; its metrics are those of each step"
            yield Problem(f"data.{key}", message, "leave it out, or use +trainer=grpo, which does")


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
    """TRL's OnlineDPOTrainer, with completions from ftcore's generator."""
    from ftcore_trainers._arguments import quiet, shared
    from ftcore_trainers._dtypes import kept_dtypes
    from ftcore_trainers._experimental import experimental
    from ftcore_trainers._online_dpo_trainer import GeneratorOnlineDPOTrainer
    from ftcore_trainers._reference import reference_of

    with experimental():
        from trl.experimental.online_dpo import OnlineDPOConfig

    config = plan.config(Config)
    arguments = {
        "max_length": config.max_length,
        "max_new_tokens": config.max_completion_length,
        "temperature": config.temperature,
        "top_p": config.top_p,
        "beta": config.beta,
        "loss_type": config.loss_type,
        **shared(plan, False),
    }
    # Prompts are text: accelerate, which hands the batches of a stream out from the first process, knows tensors only.
    arguments["accelerator_config"] |= {"dispatch_batches": False}
    with kept_dtypes(model):
        return quiet(
            GeneratorOnlineDPOTrainer(
                generator=generator,
                reference=reference_of(plan, model, config.reference.value),
                model=model,
                reward_funcs=list(rewards),
                args=OnlineDPOConfig(**arguments),
                train_dataset=dataset["train"],
                processing_class=tokenizer,
                callbacks=list(callbacks),
                optimizers=(optimizer, None),
            )
        )
