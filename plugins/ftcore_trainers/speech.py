"""Speech to text: cross entropy of the transcript's tokens given the recording, by transformers' Seq2SeqTrainer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ftcore import Plan, Problem, Refused, Shape, TrainerConfig, TrainerSpec, checkpoint, hookimpl
from ftcore_trainers._arguments import OWNED

if TYPE_CHECKING:
    from transformers import Trainer

SELECTS = {"data": "audio"}
ENGLISH = 51864
"""Tokens of the checkpoints that know English only; the others have more."""
TARGETS = 448
"""Positions of Whisper's decoder, in every published checkpoint."""


@dataclass
class Config(TrainerConfig):
    """Speech recognition's settings."""

    learning_rate: float = 1e-4
    """Peak learning rate; LoRA takes about ten times what full fine-tuning takes."""
    epochs: float = 3.0
    """Passes over the rows."""
    max_length: int = TARGETS
    """Longest transcript in tokens."""
    language: str | None = None
    """Language that is spoken, such as `en`: for checkpoints that know several."""
    task: str = "transcribe"
    """`transcribe`, or `translate` into English."""


@hookimpl
def ftcore_trainer_spec() -> TrainerSpec:
    """Takes recordings with transcripts."""
    return TrainerSpec(
        accepts=frozenset({Shape.AUDIO}),
        args="transformers.training_args_seq2seq:Seq2SeqTrainingArguments",
        owned=OWNED | {"remove_unused_columns", "label_names", "predict_with_generate", "generation_max_length"},
        auto_class="AutoModelForSpeechSeq2Seq",
        measures=("wer",),
    )


@hookimpl
def ftcore_check_plan(plan: Plan) -> list[Problem]:
    """The family hears, knows the language, and every recording fits it."""
    from ftcore_trainers._heads import check_head
    from ftcore_trainers._hearing import problems

    found = [*check_head(plan, "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES")]
    if found:
        return found
    try:
        found += _settings(plan)
        return found + ([*problems(plan)] if plan.format and plan.format.shape == Shape.AUDIO else [])
    except (Refused, KeyError):  # named by core's checks
        return found


def _settings(plan: Plan) -> list[Problem]:
    assert plan.run.model is not None
    config, found = plan.config(Config), []
    settings = checkpoint.settings(plan.run.model, plan.family)
    longest, tokens = settings.get("max_target_positions", TARGETS), settings.get("vocab_size")
    if config.max_length > longest:
        message = f"{config.max_length} tokens are more than the decoder's {longest}"
        found.append(Problem("trainer.max_length", message, f"use trainer.max_length={longest}"))
    if config.language and not known_language(config.language):
        fix = "write its English name or its code, such as french or fr"
        found.append(Problem("trainer.language", f"Whisper knows no language '{config.language}'", fix))
    if config.task not in ("transcribe", "translate"):
        found.append(Problem("trainer.task", f"'{config.task}' is no task", "use transcribe or translate"))
    if tokens and tokens <= ENGLISH and (config.language or config.task == "translate"):
        key = "language" if config.language else "task"
        found.append(Problem(f"trainer.{key}", "the checkpoint knows English only", f"leave trainer.{key} out"))
    elif tokens and tokens > ENGLISH and not config.language:
        fix = "say which language is spoken, such as trainer.language=en"
        found.append(Problem("trainer.language", "the checkpoint knows many languages, and none is named", fix))
    return found


def known_language(name: str) -> bool:
    """Whether the name or the code of a language is one of Whisper's."""
    from transformers.models.whisper.tokenization_whisper import LANGUAGES, TO_LANGUAGE_CODE

    return name.lower() in LANGUAGES or name.lower() in TO_LANGUAGE_CODE


@hookimpl
def ftcore_make_trainer(
    plan: Plan, model: Any, tokenizer: Any, dataset: Any, callbacks: Any, optimizer: Any
) -> Trainer:
    """transformers' Seq2SeqTrainer; held-out recordings are transcribed."""
    from transformers import Seq2SeqTrainingArguments

    from ftcore_models._features import whisper_features
    from ftcore_trainers._arguments import early_stopping, quiet, shared
    from ftcore_trainers._hearing import Transcripts
    from ftcore_trainers._speech_trainer import SpeechTrainer, speak

    config = plan.config(Config)
    base = getattr(model, "get_base_model", lambda: model)()
    prefix = speak(base, tokenizer, config.language, config.task)
    collate = Transcripts(
        extract=whisper_features(plan),
        tokenizer=tokenizer,
        start=base.config.decoder_start_token_id,
        prefix=prefix,
        max_length=config.max_length,
        dtype=base.model.encoder.conv1.weight.dtype,
    )
    for split in dataset.values():
        collate.check(split)
    arguments = shared(plan, "eval" in dataset) | {
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "predict_with_generate": True,
        "generation_max_length": config.max_length,
    }
    return quiet(
        SpeechTrainer(
            model=model,
            args=Seq2SeqTrainingArguments(**arguments),
            train_dataset=dataset["train"],
            eval_dataset=dataset.get("eval"),
            processing_class=tokenizer,
            data_collator=collate,
            callbacks=[*callbacks, *early_stopping(plan)],
            optimizers=(optimizer, None),
        )
    )
