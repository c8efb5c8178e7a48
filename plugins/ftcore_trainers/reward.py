"""Reward models by TRL: a score for an answer, learnt from pairs (Bradley and Terry 1952; Ouyang et al. 2022)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ftcore import Plan, Problem, Shape, TrainerConfig, TrainerSpec, hookimpl
from ftcore_trainers._arguments import OWNED
from ftcore_trainers._preference import OWNED_BY_PREFERENCES, in_range, problems
from ftcore_trainers._rendered import ftcore_format_dataset as ftcore_format_dataset

if TYPE_CHECKING:
    from transformers import Trainer

SELECTS = {"data": "preference"}


@dataclass
class Config(TrainerConfig):
    """A reward model's settings."""

    learning_rate: float = 1e-4
    """Peak learning rate; LoRA takes about ten times what full fine-tuning takes."""
    max_length: int = 1024
    """Longest prompt and answer in tokens; a pair with a longer one is left out, because its end is what is judged."""
    center_rewards: float = 0.0
    """Weight of the squared sum of a pair's rewards, which keeps their mean at 0 (arXiv 2312.09244); 0.01 is usual."""


@hookimpl
def ftcore_trainer_spec() -> TrainerSpec:
    """Takes pairs of answers; the head is one number at the last token."""
    return TrainerSpec(
        accepts=frozenset({Shape.PREFERENCE}),
        args="trl.trainer.reward_config:RewardConfig",
        owned=OWNED | OWNED_BY_PREFERENCES | {"center_rewards_coefficient", "chat_template_path", "eos_token"},
        auto_class="AutoModelForSequenceClassification",
        settings={"num_labels": 1},
        measures=("accuracy",),
    )


@hookimpl
def ftcore_check_plan(plan: Plan) -> list[Problem]:
    """The family has the head, and the checkpoint no other."""
    from ftcore_trainers._heads import check_head

    head = [*check_head(plan, "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES")]
    # The head's check speaks of packing as well.
    others = [problem for problem in problems(plan) if problem.key not in {found.key for found in head}]
    config = plan.config(Config)
    return [*head, *others, *_other_head(plan), *in_range(config, from_0=("center_rewards",))]


def _other_head(plan: Plan) -> Iterator[Problem]:
    from ftcore_trainers._classes import own_classes

    if len(classes := own_classes(plan)) > 1:
        message = f"it was trained for {len(classes)} classes, and a reward is one number"
        key = "adapter.path" if getattr(plan.run.adapter, "path", None) else "model.id"
        yield Problem(key, message, "give a checkpoint without a head, or a reward model")


@hookimpl
def ftcore_make_trainer(
    plan: Plan, model: Any, tokenizer: Any, dataset: Any, callbacks: Any, optimizer: Any
) -> Trainer:
    """TRL's RewardTrainer."""
    from trl import RewardConfig

    from ftcore_trainers._arguments import early_stopping, quiet, shared
    from ftcore_trainers._dtypes import kept_dtypes
    from ftcore_trainers._reward_trainer import PairedRewardTrainer

    config = plan.config(Config)
    arguments = {
        "max_length": config.max_length,
        "center_rewards_coefficient": config.center_rewards or None,
        **shared(plan, "eval" in dataset),
    }
    with kept_dtypes(model):
        return quiet(
            PairedRewardTrainer(
                model=model,
                args=RewardConfig(**arguments),
                train_dataset=dataset["train"],
                eval_dataset=dataset.get("eval"),
                processing_class=tokenizer,
                callbacks=[*callbacks, *early_stopping(plan)],
                optimizers=(optimizer, None),
            )
        )
