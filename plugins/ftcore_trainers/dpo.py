"""DPO by TRL: preferences without a reward model (Rafailov et al. 2023, arXiv 2305.18290), and losses after it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ftcore import Passes, Plan, Problem, Shape, TrainerConfig, TrainerSpec, hookimpl
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

SELECTS = {"data": "preference"}

LOSS_TYPES = (
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
)
SMOOTHED = {"exo_pair": "1e-3", "robust": "0.1", "aot": "0.1", "aot_unpaired": "0.1"}
"""Losses with label smoothing, and a usual value."""
ANY_DIVERGENCE = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft")
"""Losses on the difference of two rewards, which have a form for other divergences than the reverse KL."""


@dataclass
class Config(TrainerConfig):
    """DPO's settings."""

    learning_rate: float = 5e-5
    """Peak learning rate; LoRA takes about ten times what full fine-tuning takes."""
    beta: float = 0.1
    """How strongly the policy is held to the reference model; tau of `ipo`."""
    loss_type: Any = "sigmoid"
    """`sigmoid` (DPO), `hinge` (SLiC), `ipo`, `robust`, `apo_zero` or another of TRL's names; a list adds them up.
    `aot` sorts within the micro-batch, `sft` is a mean over its tokens."""
    loss_weights: list[float] = field(default_factory=list)
    """Factors of the losses of a list; empty takes 1 for each."""
    label_smoothing: float = 0.0
    """Part of the pairs that are taken for labelled the wrong way round: for `robust`, `exo_pair` and `aot`."""
    reference: ReferenceModel = ReferenceModel.start
    """`start` is the policy as training finds it, with the adapter of `adapter.path`; `base` is without any adapter."""
    precompute_reference: bool = False
    """Compute the reference model's log-probabilities once before training; full fine-tuning then needs no copy."""


@hookimpl
def ftcore_trainer_spec(config: Config) -> TrainerSpec:
    """Takes pairs of answers; the reference model is the policy's own weights."""
    own = {"beta", "loss_type", "loss_weights", "label_smoothing"}
    return TrainerSpec(
        accepts=frozenset({Shape.PREFERENCE}),
        reference_model=True,
        args="trl.trainer.dpo_config:DPOConfig",
        owned=OWNED | OWNED_BY_PREFERENCES | OWNED_BY_REFERENCE | own,
        measures=("rewards/accuracies",),
        passes=Passes(sequences=2, unlearnt=0 if config.precompute_reference else 2, logprobs=True),
    )


@hookimpl
def ftcore_check_plan(plan: Plan) -> list[Problem]:
    """The losses exist, and have what they need."""
    config = plan.config(Config)
    return [
        *problems(plan),
        *reference_problems(plan, config.reference, config.precompute_reference),
        *in_range(config, above_0=("beta",)),
        *_losses(config),
    ]


def _losses(config: Config) -> Iterator[Problem]:
    names = losses_of(config)
    for name in names:
        yield from unknown_loss(name, LOSS_TYPES)
    if not names:
        yield Problem("trainer.loss_type", "names no loss", f"use one of {', '.join(LOSS_TYPES)}")
    if config.loss_weights and len(config.loss_weights) != len(names):
        message = f"has {len(config.loss_weights)} numbers for {len(names)} of trainer.loss_type"
        yield Problem("trainer.loss_weights", message, "give one for each loss")
    smoothing, smoothed = config.label_smoothing, [name for name in names if name in SMOOTHED]
    if not 0 <= smoothing < 0.5:
        yield Problem("trainer.label_smoothing", f"is {smoothing}", "give a number from 0 to below 0.5")
    elif smoothing and not smoothed:
        message = f"{', '.join(map(str, names))} has no label smoothing"
        yield Problem("trainer.label_smoothing", message, "leave it out, or use trainer.loss_type=robust")
    elif "exo_pair" in names and not smoothing:
        message = "exo_pair needs a part of wrong labels above 0"
        yield Problem("trainer.label_smoothing", message, f"set trainer.label_smoothing={SMOOTHED['exo_pair']}")
    divergence = config.args.get("f_divergence_type", "reverse_kl")
    if divergence != "reverse_kl" and (others := [name for name in names if name not in ANY_DIVERGENCE]):
        message = f"{others[0]} has no form for {divergence}"
        yield Problem("trainer.args.f_divergence_type", message, f"use a loss of {', '.join(ANY_DIVERGENCE)}")


def losses_of(config: Config) -> list[Any]:
    """The losses by name; what is no name is left as it is, to be refused."""
    return list(config.loss_type) if isinstance(config.loss_type, (list, tuple)) else [config.loss_type]


@hookimpl
def ftcore_make_trainer(
    plan: Plan, model: Any, tokenizer: Any, dataset: Any, callbacks: Any, optimizer: Any
) -> Trainer:
    """TRL's DPOTrainer; the logits of whole rows never exist, in training or evaluation."""
    from trl import DPOConfig

    from ftcore_trainers._arguments import early_stopping, quiet, shared
    from ftcore_trainers._dpo_trainer import FusedDPOTrainer
    from ftcore_trainers._dtypes import kept_dtypes
    from ftcore_trainers._reference import reference_of

    config = plan.config(Config)
    arguments = {
        "max_length": config.max_length,
        "beta": config.beta,
        "loss_type": losses_of(config),
        "loss_weights": list(config.loss_weights) or None,
        "label_smoothing": config.label_smoothing,
        "precompute_ref_log_probs": config.precompute_reference,
        **shared(plan, "eval" in dataset),
    }
    # Before training, the policy is its own reference.
    needless = config.precompute_reference and not hasattr(model, "peft_config")
    with kept_dtypes(model):
        return quiet(
            FusedDPOTrainer(
                reference=None if needless else reference_of(plan, model, config.reference.value),
                model=model,
                args=DPOConfig(**arguments),
                train_dataset=dataset["train"],
                eval_dataset=dataset.get("eval"),
                processing_class=tokenizer,
                callbacks=[*callbacks, *early_stopping(plan)],
                optimizers=(optimizer, None),
            )
        )
