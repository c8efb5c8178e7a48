"""SimPO by TRL: preferences by the mean log-probability, without a reference (Meng et al. 2024, arXiv 2405.14734)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ftcore import Passes, Plan, Problem, Shape, TrainerConfig, TrainerSpec, hookimpl
from ftcore_trainers._arguments import OWNED
from ftcore_trainers._preference import OWNED_BY_PREFERENCES, in_range, not_streamed, problems, unknown_loss
from ftcore_trainers._rendered import ftcore_format_dataset as ftcore_format_dataset

if TYPE_CHECKING:
    from transformers import Trainer

SELECTS = {"data": "preference"}

LOSS_TYPES = ("simpo", "sigmoid", "hinge", "ipo")
SMOOTHED = ("simpo", "sigmoid")


@dataclass
class Config(TrainerConfig):
    """SimPO's settings, and those of CPO, which it is a form of."""

    learning_rate: float = 1e-5
    """Peak learning rate; LoRA takes about ten times what full fine-tuning takes."""
    beta: float = 2.0
    """Factor of the rewards; tau of `ipo`."""
    gamma: float = 1.0
    """Margin by which the chosen answer's reward is to be above the other's: for `simpo`."""
    loss_type: str = "simpo"
    """`simpo`, or CPO (arXiv 2401.08417) with `sigmoid`, `hinge` or `ipo`: by sums over tokens, `ipo` by means."""
    nll_weight: float = 0.0
    """Weight of the likelihood of the chosen answers; CPO takes 1."""
    label_smoothing: float = 0.0
    """Part of the pairs that are taken for labelled the wrong way round: for `simpo` and `sigmoid`."""


@hookimpl
def ftcore_trainer_spec() -> TrainerSpec:
    """Takes pairs of answers."""
    own = {"beta", "loss_type", "simpo_gamma", "cpo_alpha", "label_smoothing"}
    return TrainerSpec(
        accepts=frozenset({Shape.PREFERENCE}),
        args="trl.experimental.cpo.cpo_config:CPOConfig",
        owned=OWNED | OWNED_BY_PREFERENCES | own | {"remove_unused_columns", "generate_during_eval"},
        measures=("rewards/accuracies",),
        passes=Passes(sequences=2, logprobs=True),
    )


@hookimpl
def ftcore_check_plan(plan: Plan) -> list[Problem]:
    """The loss exists, and has what it is given."""
    config = plan.config(Config)
    return [
        *problems(plan),
        *not_streamed(plan),
        *in_range(config, above_0=("beta",), from_0=("gamma", "nll_weight")),
        *unknown_loss(config.loss_type, LOSS_TYPES),
        *_unused(config),
    ]


def _unused(config: Config) -> Iterator[Problem]:
    if not 0 <= config.label_smoothing < 0.5:
        yield Problem("trainer.label_smoothing", f"is {config.label_smoothing}", "give a number from 0 to below 0.5")
    elif config.label_smoothing and config.loss_type in LOSS_TYPES and config.loss_type not in SMOOTHED:
        message = f"{config.loss_type} has no label smoothing"
        yield Problem("trainer.label_smoothing", message, "leave it out, or use trainer.loss_type=simpo")
    if config.gamma != Config.gamma and config.loss_type in LOSS_TYPES and config.loss_type != "simpo":
        message = f"{config.loss_type} has no margin"
        yield Problem("trainer.gamma", message, "leave it out, or use trainer.loss_type=simpo")


@hookimpl
def ftcore_make_trainer(
    plan: Plan, model: Any, tokenizer: Any, dataset: Any, callbacks: Any, optimizer: Any
) -> Trainer:
    """TRL's CPOTrainer on the fused head."""
    from ftcore_trainers._arguments import early_stopping, quiet, shared
    from ftcore_trainers._dtypes import kept_dtypes
    from ftcore_trainers._experimental import experimental

    with experimental():
        from trl.experimental.cpo import CPOConfig

        from ftcore_trainers._simpo_trainer import FusedSimPOTrainer

    config = plan.config(Config)
    arguments = {
        "max_length": config.max_length,
        "beta": config.beta,
        "simpo_gamma": config.gamma,
        "loss_type": config.loss_type,
        "cpo_alpha": config.nll_weight,
        "label_smoothing": config.label_smoothing,
        "remove_unused_columns": False,
        **shared(plan, "eval" in dataset),
    }
    with kept_dtypes(model):
        return quiet(
            FusedSimPOTrainer(
                model=model,
                args=CPOConfig(**arguments),
                train_dataset=dataset["train"],
                eval_dataset=dataset.get("eval"),
                processing_class=tokenizer,
                callbacks=[*callbacks, *early_stopping(plan)],
                optimizers=(optimizer, None),
            )
        )
