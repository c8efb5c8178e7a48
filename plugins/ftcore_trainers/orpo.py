"""ORPO by TRL: supervised fine-tuning with a preference term, no reference (Hong et al. 2024, arXiv 2403.07691)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ftcore import Passes, Plan, Problem, Shape, TrainerConfig, TrainerSpec, hookimpl
from ftcore_trainers._arguments import OWNED
from ftcore_trainers._preference import OWNED_BY_PREFERENCES, in_range, not_streamed, problems
from ftcore_trainers._rendered import ftcore_format_dataset as ftcore_format_dataset

if TYPE_CHECKING:
    from transformers import Trainer

SELECTS = {"data": "preference"}


@dataclass
class Config(TrainerConfig):
    """ORPO's settings."""

    learning_rate: float = 1e-4
    """Peak learning rate; LoRA takes about ten times what full fine-tuning takes."""
    beta: float = 0.1
    """Weight of the odds ratio beside the likelihood of the chosen rows, prompts among them; lambda of the paper."""


@hookimpl
def ftcore_trainer_spec() -> TrainerSpec:
    """Takes pairs of answers."""
    return TrainerSpec(
        accepts=frozenset({Shape.PREFERENCE}),
        args="trl.experimental.orpo.orpo_config:ORPOConfig",
        owned=OWNED | OWNED_BY_PREFERENCES | {"beta", "remove_unused_columns", "generate_during_eval"},
        measures=("rewards/accuracies",),
        passes=Passes(sequences=2, logprobs=True),
    )


@hookimpl
def ftcore_check_plan(plan: Plan) -> list[Problem]:
    """A weight above 0, and rows that can be tokenized before."""
    return [*problems(plan), *not_streamed(plan), *in_range(plan.config(Config), above_0=("beta",))]


@hookimpl
def ftcore_make_trainer(
    plan: Plan, model: Any, tokenizer: Any, dataset: Any, callbacks: Any, optimizer: Any
) -> Trainer:
    """TRL's ORPOTrainer on the fused head."""
    from ftcore_trainers._arguments import early_stopping, quiet, shared
    from ftcore_trainers._dtypes import kept_dtypes
    from ftcore_trainers._experimental import experimental

    with experimental():
        from trl.experimental.orpo import ORPOConfig

        from ftcore_trainers._orpo_trainer import FusedORPOTrainer

    config = plan.config(Config)
    arguments = {
        "max_length": config.max_length,
        "beta": config.beta,
        "remove_unused_columns": False,
        **shared(plan, "eval" in dataset),
    }
    with kept_dtypes(model):
        return quiet(
            FusedORPOTrainer(
                model=model,
                args=ORPOConfig(**arguments),
                train_dataset=dataset["train"],
                eval_dataset=dataset.get("eval"),
                processing_class=tokenizer,
                callbacks=[*callbacks, *early_stopping(plan)],
                optimizers=(optimizer, None),
            )
        )
