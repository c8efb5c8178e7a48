"""Sentence embeddings: mean pooling, trained on pairs that belong together or on scored ones."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ftcore import Plan, Problem, Refused, Shape, TrainerConfig, TrainerSpec, hookimpl
from ftcore_trainers._arguments import OWNED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Trainer

SELECTS = {"data": "pairs"}
LOADED_WITH = "ftcore_trainers._pooling"
"""Hooks with which a trained model is loaded again."""


@dataclass
class Config(TrainerConfig):
    """Sentence embedding's settings."""

    learning_rate: float = 2e-4
    """Peak learning rate; LoRA takes about ten times what full fine-tuning takes."""
    global_batch: int = 32
    """Rows per optimizer step of one process."""
    micro_batch: int = 0
    """Rows per forward pass, which are each other's negatives; 0 takes the whole global batch."""
    max_length: int = 256
    """Longest text in tokens; the rest is cut off."""
    scale: float = 20.0
    """Factor of the cosines in the ranking loss: the inverse of a temperature."""


@hookimpl
def ftcore_trainer_spec() -> TrainerSpec:
    """Takes pairs of texts; the model is loaded without a head."""
    return TrainerSpec(
        accepts=frozenset({Shape.PAIRS}),
        args="transformers.training_args:TrainingArguments",
        owned=OWNED | {"remove_unused_columns", "label_names"},
        auto_class="AutoModel",
        measures=("recall_at_1", "spearman"),
        compares=True,
    )


@hookimpl(wrapper=True)
def ftcore_make_plan() -> Generator[None, Plan, Plan]:
    """A micro-batch is the whole global batch unless the user says otherwise: more rows are more negatives."""
    plan = yield
    config = plan.config(Config)
    config = replace(config, micro_batch=max(config.micro_batch, 0) or config.global_batch)
    return replace(plan, run=replace(plan.run, trainer=config))


@hookimpl
def ftcore_check_plan(plan: Plan) -> list[Problem]:
    """The family has the model, the checkpoint pools by the mean, and the rows are of one kind."""
    from ftcore_trainers._heads import check_head
    from ftcore_trainers._pairs import problems
    from ftcore_trainers._pooling import folder_of, other_pooling

    assert plan.run.model is not None
    config, found = plan.config(Config), [*check_head(plan, "MODEL_MAPPING_NAMES")]
    if config.scale <= 0:
        found.append(Problem("trainer.scale", f"is {config.scale}", "give a number above 0; 20 is usual"))
    if (folder := folder_of(plan)) and (other := other_pooling(folder)):
        key = "model.path" if plan.run.model.path else "model.id"
        message = f"{plan.run.model.path or plan.run.model.id} pools by {other}, and +trainer=embed by the mean"
        found.append(Problem(key, f"{message} of the tokens", "use a checkpoint that pools by the mean"))
    if plan.format is None or plan.format.shape != Shape.PAIRS:
        return found
    try:
        return [*found, *problems(plan)]
    except Refused:  # named by core's checks
        return found


@hookimpl(wrapper=True)
def ftcore_load_tokenizer(plan: Plan) -> Generator[None, PreTrainedTokenizerBase, PreTrainedTokenizerBase]:
    """Saved with the files that say how the model pools."""
    from ftcore_trainers._pooling import saved_with_pooling

    tokenizer = yield
    saved_with_pooling(plan, tokenizer)
    return tokenizer


@hookimpl
def ftcore_make_trainer(
    plan: Plan, model: Any, tokenizer: Any, dataset: Any, callbacks: Any, optimizer: Any
) -> Trainer:
    """transformers' Trainer with a loss over pairs of embeddings."""
    from transformers import TrainingArguments

    from ftcore_trainers._arguments import early_stopping, quiet, shared
    from ftcore_trainers._embed_trainer import EmbedTrainer
    from ftcore_trainers._encoded import Encoder
    from ftcore_trainers._pairs import Pairs

    config = plan.config(Config)
    arguments = shared(plan, "eval" in dataset) | {"remove_unused_columns": False, "label_names": ["labels"]}
    return quiet(
        EmbedTrainer(
            scale=config.scale,
            model=model,
            args=TrainingArguments(**arguments),
            train_dataset=dataset["train"],
            eval_dataset=dataset.get("eval"),
            processing_class=tokenizer,
            data_collator=Pairs(Encoder.of(model, tokenizer, config.max_length)),
            callbacks=[*callbacks, *early_stopping(plan)],
            optimizers=(optimizer, None),
        )
    )
