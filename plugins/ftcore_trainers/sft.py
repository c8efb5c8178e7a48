"""Supervised fine-tuning: next-token cross entropy on the assistant's tokens, by TRL."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ftcore import Plan, Problem, Shape, TrainerConfig, TrainerSpec, hookimpl
from ftcore_trainers._arguments import OF_TOKENS, OWNED_BY_SFT

if TYPE_CHECKING:
    from transformers import Trainer

SPEECH = frozenset({Shape.AUDIO, Shape.CODES})
"""Shapes for families that speak in tokens."""


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
        accepts=frozenset({Shape.MESSAGES, Shape.TEXT, Shape.PROMPT_COMPLETION, Shape.TOKENS, Shape.IMAGES}) | SPEECH,
        tokenized=True,
        args="trl.trainer.sft_config:SFTConfig",
        owned=OWNED_BY_SFT,
        measures=OF_TOKENS,
    )


@hookimpl
def ftcore_check_plan(plan: Plan) -> list[Problem]:
    """Rows with images need a model that reads them, and are not packed; rows of speech need one that speaks."""
    assert plan.run.model is not None and plan.run.trainer is not None
    other = any(limit.key == "trainer" and limit.applies(plan) for limit in plan.family.limits)
    if plan.format and plan.format.shape in SPEECH - set(plan.family.row_tokenizers) and not other:
        message = f"the rows are speech, for which {plan.run.model.name} has no tokens"
        return [Problem("data", message, "use a model that has, such as +model=orpheus")]
    if not _has_images(plan):
        return []
    if plan.family.vision is None:
        message = f"the rows have images, which {plan.run.model.name} does not read"
        return [Problem("data", message, "use a model that reads them; `ftcore plugins model` lists them")]
    if plan.run.trainer.packing:
        reason = "an image belongs to the positions of its own row, which packed rows do not keep"
        return [Problem("trainer.packing", reason, "leave it out")]
    return []


def _has_images(plan: Plan) -> bool:
    return plan.format is not None and plan.format.shape == Shape.IMAGES


@hookimpl
def ftcore_make_collator(plan: Plan, tokenizer: Any) -> Any | None:
    """For rows with images; TRL's own collator takes the others."""
    if not _has_images(plan):
        return None
    from ftcore.vision import processor_of
    from ftcore_trainers._vision_collator import VisionCollator

    assert plan.family.vision is not None
    return VisionCollator(processor_of(tokenizer), plan.family.vision)


@hookimpl
def ftcore_make_trainer(
    plan: Plan, model: Any, tokenizer: Any, dataset: Any, collator: Any, callbacks: Any, optimizer: Any
) -> Trainer:
    """TRL's SFTTrainer on rows that are tokenized already, so that what `ftcore preview` shows is what is trained."""
    from ftcore_trainers._sft_trainer import make

    # TRL would take the pictures out of rows that have their tokens already.
    kept = {"remove_unused_columns": False, "dataset_kwargs": {"skip_prepare_dataset": True}}
    return make(plan, model, tokenizer, dataset, collator, callbacks, optimizer, kept if _has_images(plan) else {})
