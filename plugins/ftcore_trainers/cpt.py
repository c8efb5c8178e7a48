"""Continued pre-training: next-token cross entropy on every token of raw text, by TRL's SFTTrainer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ftcore import Plan, Shape, TrainerConfig, TrainerSpec, hookimpl
from ftcore_trainers._arguments import OF_TOKENS, OWNED_BY_SFT

if TYPE_CHECKING:
    from transformers import Trainer

SELECTS = {"data": "text"}


@dataclass
class Config(TrainerConfig):
    """Continued pre-training's settings."""

    learning_rate: float = 2e-4
    """Peak learning rate; LoRA takes about ten times what full fine-tuning takes."""
    max_length: int = 1024
    """Length of a row in tokens; a longer text becomes several rows."""
    packing: bool = True
    """Fill each row of a batch with several texts, which do not see each other."""


@hookimpl
def ftcore_trainer_spec() -> TrainerSpec:
    """Takes token ids, which ftcore makes of texts; no chat template."""
    return TrainerSpec(
        accepts=frozenset({Shape.TEXT, Shape.TOKENS}),
        tokenized=True,
        splits=True,
        continues=True,
        args="trl.trainer.sft_config:SFTConfig",
        owned=OWNED_BY_SFT,
        measures=OF_TOKENS,
    )


@hookimpl
def ftcore_make_trainer(
    plan: Plan, model: Any, tokenizer: Any, dataset: Any, collator: Any, callbacks: Any, optimizer: Any
) -> Trainer:
    """The trainer of `sft`, on texts."""
    from ftcore_trainers._sft_trainer import make

    return make(plan, model, tokenizer, dataset, collator, callbacks, optimizer, {})
