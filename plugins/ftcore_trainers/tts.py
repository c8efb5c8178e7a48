"""Text to speech: cross entropy of a recording's codes given its words, for CSM; Orpheus is trained by `sft`."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ftcore import DataFormat, Plan, Problem, Refused, Shape, TrainerConfig, TrainerSpec, checkpoint, hookimpl
from ftcore_data.audio import VOICES
from ftcore_trainers._arguments import OWNED

if TYPE_CHECKING:
    from transformers import Trainer

SELECTS = {"data": "audio"}


@dataclass
class Config(TrainerConfig):
    """Text to speech's settings."""

    learning_rate: float = 2e-4
    """Peak learning rate; LoRA takes about ten times what full fine-tuning takes."""
    epochs: float = 3.0
    """Passes over the rows."""
    max_length: int = 1024
    """Longest row in tokens of words and frames of speech, of which a second has 12.5."""


@hookimpl
def ftcore_trainer_spec() -> TrainerSpec:
    """Takes recordings with their words."""
    return TrainerSpec(
        accepts=frozenset({Shape.AUDIO}),
        args="transformers.training_args:TrainingArguments",
        owned=OWNED | {"remove_unused_columns", "label_names", "dataloader_num_workers", "prediction_loss_only"},
        auto_class="AutoModelForTextToWaveform",
    )


@hookimpl(wrapper=True)
def ftcore_data_format() -> Generator[None, DataFormat | None, DataFormat | None]:
    """The shipped recordings are others: at the codec's rate."""
    form = yield
    return replace(form, sample=VOICES) if form and form.shape == Shape.AUDIO else form


@hookimpl
def ftcore_check_plan(plan: Plan) -> list[Problem]:
    """The family speaks by a backbone and a depth decoder, and every recording fits it."""
    from ftcore_trainers._heads import check_head

    found = [*check_head(plan, "MODEL_FOR_TEXT_TO_WAVEFORM_MAPPING_NAMES")]
    if found:
        return found
    try:
        return [*_recordings(plan)] if plan.format and plan.format.shape == Shape.AUDIO else []
    except (Refused, KeyError):  # named by core's checks
        return []


def _recordings(plan: Plan) -> Iterator[Problem]:
    from ftcore_trainers._recordings import unfit_rows
    from ftcore_trainers._utterances import FRAMES_A_SECOND, RATE, wrong_speaker

    assert plan.run.model is not None
    settings = checkpoint.settings(plan.run.model, plan.family)
    if not settings.get("depth_decoder_config", True):
        yield Problem("model", "the checkpoint has no depth decoder, which tts trains", "use +model=csm")
        return
    longest = plan.config(Config).max_length

    def too_long(seconds: float) -> str | None:
        frames = int(seconds * FRAMES_A_SECOND)
        return f"which is {frames} frames, more than trainer.max_length={longest}" if frames >= longest else None

    yield from unfit_rows(plan, RATE, too_long)
    yield from wrong_speaker(plan)


@hookimpl
def ftcore_make_trainer(
    plan: Plan, model: Any, tokenizer: Any, dataset: Any, callbacks: Any, optimizer: Any
) -> Trainer:
    """transformers' Trainer, with the mean over frames of one loss and over frames and codebooks of the other."""
    from transformers import TrainingArguments

    from ftcore_trainers._arguments import early_stopping, quiet, shared
    from ftcore_trainers._tts_trainer import VoiceTrainer
    from ftcore_trainers._utterances import Utterances

    base = getattr(model, "get_base_model", lambda: model)()
    arguments = shared(plan, "eval" in dataset) | {
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "prediction_loss_only": True,
    }
    return quiet(
        VoiceTrainer(
            model=model,
            args=TrainingArguments(**arguments),
            train_dataset=dataset["train"],
            eval_dataset=dataset.get("eval"),
            processing_class=tokenizer,
            data_collator=Utterances.of(base, tokenizer, plan.config(Config).max_length),
            callbacks=[*callbacks, *early_stopping(plan)],
            optimizers=(optimizer, None),
        )
    )
