"""KTO by TRL: answers that are each wanted or not, without pairs (Ethayarajh et al. 2024, arXiv 2402.01306)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ftcore import Passes, Plan, Problem, Shape, TrainerConfig, TrainerSpec, hookimpl
from ftcore.memory import micro_batch
from ftcore_trainers._arguments import OWNED
from ftcore_trainers._preference import (
    OWNED_BY_PREFERENCES,
    OWNED_BY_REFERENCE,
    ReferenceModel,
    in_range,
    problems,
    reference_problems,
    unknown_loss,
)
from ftcore_trainers._rendered import ftcore_format_dataset as ftcore_format_dataset

if TYPE_CHECKING:
    from transformers import Trainer

SELECTS = {"data": "unpaired"}

LOSS_TYPES = ("kto", "apo_zero_unpaired")


@dataclass
class Config(TrainerConfig):
    """KTO's settings. Rows are shuffled once, and every epoch takes them in that order; streamed rows in their own."""

    learning_rate: float = 5e-5
    """Peak learning rate; LoRA takes about ten times what full fine-tuning takes."""
    beta: float = 0.1
    """How strongly the policy is held to the reference model."""
    loss_type: str = "kto"
    """`kto`, or `apo_zero_unpaired` (arXiv 2408.06266), which needs no baseline."""
    desirable_weight: float = 1.0
    """Factor of the loss of wanted answers: raise it where they are few."""
    undesirable_weight: float = 1.0
    """Factor of the loss of unwanted answers."""
    reference: ReferenceModel = ReferenceModel.start
    """`start` is the policy as training finds it, with the adapter of `adapter.path`; `base` is without any adapter."""
    precompute_reference: bool = False
    """Compute the reference model's log-probabilities once before training; full fine-tuning then needs no copy."""


@hookimpl
def ftcore_trainer_spec(config: Config) -> TrainerSpec:
    """Takes answers with a label, or pairs of answers, of which it makes two rows each."""
    own = {"beta", "loss_type", "desirable_weight", "undesirable_weight", "train_sampling_strategy"}
    # Mismatched rows for the baseline are read by the policy, and by the reference as the rows themselves are.
    mismatched = config.loss_type == "kto"
    unlearnt = mismatched + (0 if config.precompute_reference else 1 + mismatched)
    return TrainerSpec(
        accepts=frozenset({Shape.UNPAIRED, Shape.PREFERENCE}),
        reference_model=True,
        args="trl.trainer.kto_config:KTOConfig",
        owned=OWNED | OWNED_BY_PREFERENCES | OWNED_BY_REFERENCE | own,
        measures=("rewards/margins",),
        passes=Passes(unlearnt=unlearnt, least_rows=2 if mismatched else 1, logprobs=True),
    )


@hookimpl
def ftcore_check_plan(plan: Plan) -> list[Problem]:
    """The loss exists, and its baseline has rows to be taken from."""
    config = plan.config(Config)
    return [
        *problems(plan),
        *reference_problems(plan, config.reference, config.precompute_reference),
        *in_range(config, above_0=("beta",), from_0=("desirable_weight", "undesirable_weight")),
        *unknown_loss(config.loss_type, LOSS_TYPES),
        *_baseline(plan, config),
    ]


def _baseline(plan: Plan, config: Config) -> Iterator[Problem]:
    if config.loss_type == "kto" and config.global_batch > 0 and micro_batch(plan) < 2:
        key = "global_batch" if config.global_batch < 2 else "micro_batch"
        message = "the baseline pairs a row with another row's answer, and a micro-batch of one has no other"
        fix = f"use at least trainer.{key}=2, or trainer.loss_type=apo_zero_unpaired"
        yield Problem(f"trainer.{key}", message, fix)


@hookimpl
def ftcore_make_trainer(
    plan: Plan, model: Any, tokenizer: Any, dataset: Any, callbacks: Any, optimizer: Any
) -> Trainer:
    """TRL's KTOTrainer; the logits of whole rows never exist, in training or evaluation."""
    from trl import KTOConfig

    from ftcore_trainers._arguments import early_stopping, quiet, shared
    from ftcore_trainers._dtypes import kept_dtypes
    from ftcore_trainers._kto_trainer import FusedKTOTrainer
    from ftcore_trainers._reference import reference_of

    config = plan.config(Config)
    arguments = {
        "max_length": config.max_length,
        "beta": config.beta,
        "loss_type": config.loss_type,
        "desirable_weight": config.desirable_weight,
        "undesirable_weight": config.undesirable_weight,
        "precompute_ref_log_probs": config.precompute_reference,
        **shared(plan, "eval" in dataset),
    }
    # Before training, the policy is its own reference.
    needless = config.precompute_reference and not hasattr(model, "peft_config")
    with kept_dtypes(model):
        return quiet(
            FusedKTOTrainer(
                reference=None if needless else reference_of(plan, model, config.reference.value),
                model=model,
                args=KTOConfig(**arguments),
                train_dataset=dataset["train"],
                eval_dataset=dataset.get("eval"),
                processing_class=tokenizer,
                callbacks=[*callbacks, *early_stopping(plan)],
                optimizers=(optimizer, None),
            )
        )
