"""Supervised fine-tuning: next-token cross entropy on the assistant's tokens, by TRL."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ftcore import Plan, Shape, TrainerConfig, TrainerSpec, hookimpl
from ftcore_trainers._arguments import OWNED

if TYPE_CHECKING:
    from transformers import Trainer


@dataclass
class Config(TrainerConfig):
    """SFT's settings."""

    learning_rate: float = 1e-3
    """Peak learning rate; LoRA takes about ten times what full fine-tuning takes."""
    epochs: float = 2.0
    """Passes over the rows."""


@hookimpl
def ftcore_trainer_spec() -> TrainerSpec:
    """Takes token ids and labels, which ftcore makes."""
    return TrainerSpec(
        accepts=frozenset({Shape.MESSAGES, Shape.TEXT, Shape.PROMPT_COMPLETION, Shape.TOKENS}),
        tokenized=True,
        args="trl.trainer.sft_config:SFTConfig",
        owned=OWNED | {"assistant_only_loss", "completion_only_loss", "dataset_kwargs"},
    )


@hookimpl
def ftcore_make_trainer(
    plan: Plan, model: Any, tokenizer: Any, dataset: Any, collator: Any, callbacks: Any, optimizer: Any
) -> Trainer:
    """TRL's SFTTrainer on rows that are tokenized already, so that what `ftcore preview` shows is what is trained."""
    from trl import SFTConfig

    from ftcore_trainers._arguments import early_stopping, quiet, shared
    from ftcore_trainers._dtypes import kept_dtypes
    from ftcore_trainers._sft_trainer import FusedSFTTrainer

    trainer = plan.config(Config)
    arguments = {
        "max_length": trainer.max_length,
        "packing": trainer.packing,
        "eval_packing": False,
        **shared(plan, "eval" in dataset),
    }
    with kept_dtypes(model):
        return quiet(
            FusedSFTTrainer(
                model=model,
                args=SFTConfig(**arguments),
                train_dataset=dataset["train"],
                eval_dataset=dataset.get("eval"),
                processing_class=tokenizer,
                data_collator=collator,
                callbacks=[*callbacks, *early_stopping(plan)],
                optimizers=(optimizer, None),
            )
        )
