"""Classification of texts and of pairs of texts: cross entropy over the classes that the rows name."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ftcore import Plan, Problem, Refused, Shape, TrainerConfig, TrainerSpec, hookimpl
from ftcore.drift import FOUND
from ftcore_trainers._arguments import OWNED, OWNED_WITH_SMOOTHING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Trainer

SELECTS = {"data": "labels"}
LOADED_WITH = "ftcore_trainers._class_names"
"""Hooks with which a trained model is loaded again."""


@dataclass
class Config(TrainerConfig):
    """Classification's settings."""

    learning_rate: float = 5e-4
    """Peak learning rate; LoRA takes about ten times what full fine-tuning takes."""
    epochs: float = 3.0
    """Passes over the rows."""
    max_length: int = 512
    """Longest row in tokens; the rest is cut off."""
    labels: list[str] = field(default_factory=list, metadata={FOUND: True})
    """Names of the classes in their order; empty finds them in the rows. A number in a row is a place in this list,
    unless a class is called so."""
    multi_label: bool = field(default=False, metadata={FOUND: True})
    """A row may have several classes or none; found where a row's label is a list."""


@hookimpl
def ftcore_trainer_spec(config: Config) -> TrainerSpec:
    """Takes labelled texts; the model's config gets the names of the classes."""
    kind = "multi_label_classification" if config.multi_label else "single_label_classification"
    settings = {
        "id2label": dict(enumerate(config.labels)),
        "label2id": {name: number for number, name in enumerate(config.labels)},
        "problem_type": kind,
    }
    return TrainerSpec(
        accepts=frozenset({Shape.LABELS}),
        args="transformers.training_args:TrainingArguments",
        # transformers smooths labels of one class a row alone.
        owned=(OWNED if config.multi_label else OWNED_WITH_SMOOTHING) | {"remove_unused_columns", "label_names"},
        auto_class="AutoModelForSequenceClassification",
        settings=settings if config.labels else {},
        measures=("accuracy", "macro_f1"),
    )


@hookimpl(wrapper=True)
def ftcore_make_plan() -> Generator[None, Plan, Plan]:
    """The classes are part of the plan, and so of the record: they are found before any weight is read."""
    from ftcore_trainers._classes import found

    plan = yield
    config = plan.config(Config)
    if plan.format is None or plan.format.shape != Shape.LABELS:
        return plan
    try:
        names, several = found(plan)
    except Refused:  # named by core's checks
        return plan
    config = replace(config, labels=list(config.labels) or names, multi_label=config.multi_label or several)
    spec = ftcore_trainer_spec(config)
    return replace(plan, run=replace(plan.run, trainer=config), trainer=spec, family=spec.headed(plan.family))


@hookimpl
def ftcore_check_plan(plan: Plan) -> list[Problem]:
    """The family has the head, and every row a class."""
    from ftcore_trainers._classes import problems
    from ftcore_trainers._heads import check_head

    heads = [*check_head(plan, "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES")]
    if plan.format is None or plan.format.shape != Shape.LABELS:
        return heads
    try:
        return [*heads, *problems(plan, plan.config(Config).labels)]
    except Refused:  # named by core's checks
        return heads


@hookimpl(wrapper=True)
def ftcore_load_tokenizer(plan: Plan) -> Generator[None, PreTrainedTokenizerBase, PreTrainedTokenizerBase]:
    """Saved with the names of the classes, which an adapter's folder would not have."""
    from ftcore_trainers._class_names import saved_with_names

    tokenizer = yield
    saved_with_names(plan, tokenizer)
    return tokenizer


@hookimpl
def ftcore_make_trainer(
    plan: Plan, model: Any, tokenizer: Any, dataset: Any, callbacks: Any, optimizer: Any
) -> Trainer:
    """transformers' Trainer, with the loss of the model's own head."""
    from transformers import TrainingArguments

    from ftcore_trainers._arguments import early_stopping, quiet, shared
    from ftcore_trainers._classes import LabelledTexts
    from ftcore_trainers._encoded import Encoder
    from ftcore_trainers._mean_trainer import MeanTrainer
    from ftcore_trainers._measures import accuracy, macro_f1

    config = plan.config(Config)

    def measure(output: Any) -> dict[str, float]:
        logits, true = output.predictions, output.label_ids
        predicted = (logits > 0).astype(true.dtype) if config.multi_label else logits.argmax(axis=1)
        return {"accuracy": accuracy(predicted, true), "macro_f1": macro_f1(predicted, true)}

    arguments = shared(plan, "eval" in dataset) | {"remove_unused_columns": False, "label_names": ["labels"]}
    encode = Encoder.of(model, tokenizer, config.max_length)
    return quiet(
        MeanTrainer(
            model=model,
            args=TrainingArguments(**arguments),
            train_dataset=dataset["train"],
            eval_dataset=dataset.get("eval"),
            processing_class=tokenizer,
            data_collator=LabelledTexts(encode, config.labels, config.multi_label),
            compute_metrics=measure,
            callbacks=[*callbacks, *early_stopping(plan)],
            optimizers=(optimizer, None),
        )
    )
