"""PPO: a policy and a value learn from scored completions (Schulman et al. 2017, arXiv 1707.06347; ftcore's own)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ftcore import Passes, Plan, Problem, Shape, TrainerConfig, TrainerSpec, hookimpl
from ftcore_trainers._arguments import OWNED
from ftcore_trainers._preference import ReferenceModel, in_range, reference_problems
from ftcore_trainers._prompts import ftcore_format_dataset as ftcore_format_dataset
from ftcore_trainers._rollout_keys import problems

if TYPE_CHECKING:
    from transformers import Trainer

SELECTS = {"data": "prompts"}
SAMPLE_REWARD = "length"
"""Reward for the shipped sample rows, where the user names none."""


@dataclass
class Config(TrainerConfig):
    """PPO's settings."""

    learning_rate: float = 1e-5
    """Peak learning rate of the policy."""
    value_learning_rate: float = 1e-3
    """Peak learning rate of the value head, a single linear layer that begins with 0."""
    global_batch: int = 8
    """Completions per optimizer step of one process."""
    num_mini_batches: int = 1
    """Optimizer steps per pass over a rollout: it has `global_batch` times as many completions."""
    num_ppo_epochs: int = 4
    """Passes over a rollout before the next one."""
    max_completion_length: int = 64
    """Longest completion in tokens."""
    temperature: float = 1.0
    """Sampling temperature."""
    top_p: float = 1.0
    """Nucleus size."""
    cliprange: float = 0.2
    """A ratio of probabilities is worth no more than 1 plus this, or no less than 1 minus it."""
    cliprange_value: float = 0.2
    """A value moves by no more than this from that of its rollout."""
    vf_coef: float = 0.1
    """Factor of the value's loss."""
    gamma: float = 1.0
    """Discount of later rewards."""
    lam: float = 0.95
    """Lambda of the generalised advantage estimation: 0 trusts the value, 1 the rewards alone."""
    whiten_advantages: bool = True
    """Bring the advantages of a rollout to mean 0 and variance 1."""
    whiten_rewards: bool = False
    """Bring the rewards of a rollout's tokens to variance 1."""
    missing_eos_penalty: float = 0.0
    """Taken off the score of a completion that was cut off."""
    kl_coef: float = 0.05
    """Cost of a token's log-ratio to the reference model, in rewards; 0 needs no reference."""
    kl_target: float | None = None
    """KL divergence of a completion, in nats, that `kl_coef` is changed to keep to; null leaves it as it is."""
    kl_horizon: float = 10000.0
    """How slowly it is changed, in completions."""
    reference: ReferenceModel = ReferenceModel.start
    """`start`: the policy as training finds it, with the adapter of `adapter.path`; `base`: it without an adapter."""


@hookimpl
def ftcore_trainer_spec(config: Config) -> TrainerSpec:
    """Takes prompts and rewards; policy, reference and value share one set of weights."""
    return TrainerSpec(
        accepts=frozenset({Shape.PROMPTS}),
        wants_rewards=True,
        reference_model=config.kl_coef > 0,
        args="transformers.training_args:TrainingArguments",
        owned=OWNED | {"remove_unused_columns", "label_names"},
        measures=("reward",),
        passes=Passes(
            unlearnt=1 + float(config.kl_coef > 0),
            written=config.max_completion_length,
            times=config.num_ppo_epochs,
            logprobs=True,
        ),
    )


@hookimpl
def ftcore_check_plan(plan: Plan) -> list[Problem]:
    """Numbers in their ranges, and rows that can be drawn more than once."""
    config = plan.config(Config)
    above = ("value_learning_rate", "num_mini_batches", "num_ppo_epochs", "cliprange", "cliprange_value", "kl_horizon")
    held = reference_problems(plan, config.reference, False) if config.kl_coef > 0 else ()
    return [
        *problems(plan),
        *in_range(config, above_0=above, from_0=("vf_coef", "kl_coef", "missing_eos_penalty")),
        *held,
        *_own(plan, config),
    ]


def _own(plan: Plan, config: Config) -> Iterator[Problem]:
    for key in ("gamma", "lam"):
        if not 0 <= getattr(config, key) <= 1:
            yield Problem(f"trainer.{key}", f"is {getattr(config, key)}", "give a number from 0 to 1")
    if config.kl_target is not None and config.kl_target <= 0:
        yield Problem("trainer.kl_target", f"is {config.kl_target}", "give nats above 0, such as 6, or null")
    elif config.kl_target is not None and not config.kl_coef:
        yield Problem(
            "trainer.kl_target", "changes trainer.kl_coef, which is 0", "give trainer.kl_coef a value above 0"
        )
    if getattr(plan.run.adapter, "dropout", 0.0):
        message = "ppo compares log-probabilities of the same tokens, which dropout would make noisy"
        yield Problem("adapter.dropout", message, "leave it out")
    if plan.run.data is not None and plan.run.data.streaming:
        yield Problem("data.streaming", "ppo draws its prompts from all rows", "leave data.streaming out")


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
    """ftcore's own PPOTrainer."""
    from transformers import TrainingArguments

    from ftcore_trainers._arguments import early_stopping, quiet, shared
    from ftcore_trainers._ppo_trainer import PPOTrainer
    from ftcore_trainers._reference import reference_of

    config = plan.config(Config)
    arguments = {"remove_unused_columns": False, **shared(plan, "eval" in dataset)}
    return quiet(
        PPOTrainer(
            settings=config,
            generator=generator,
            reference=reference_of(plan, model, config.reference.value) if config.kl_coef > 0 else None,
            rewards=rewards,
            model=model,
            args=TrainingArguments(**arguments),
            train_dataset=dataset["train"],
            eval_dataset=dataset.get("eval"),
            processing_class=tokenizer,
            callbacks=[*callbacks, *early_stopping(plan)],
            optimizers=(optimizer, None),
        )
    )
