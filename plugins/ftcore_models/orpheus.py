"""Orpheus: text to speech by Llama 3.2 3B that writes codes of SNAC, seven tokens for a twelfth of a second."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from ftcore import DataFormat, Limit, ModelConfig, ModelFamily, Plan, Problem, Refused, Shape, checkpoint, hookimpl
from ftcore_data.audio import VOICES
from ftcore_models._llama_like import LORA_TARGETS, TINY
from ftcore_models._orpheus_tokens import ALL, RATE
from ftcore_models.csm import WAVEFORM
from ftcore_models.llama import ROLES

ROWS = "ftcore_models._orpheus_rows:speech_rows"
WORDS = 128256
"""Tokens of Llama 3, which those of speech follow."""


@dataclass
class Config(ModelConfig):
    """Orpheus' settings."""

    id: str = "canopylabs/orpheus-3b-0.1-ft"
    """Checkpoint id on the Hugging Face hub."""
    codec: str = "hubertsiuzdak/snac_24khz"
    """Codec that makes codes of recordings: a hub id or a folder. Rows that bring their codes need none."""


@hookimpl
def ftcore_model_family() -> ModelFamily:
    """Llama's layers, and a vocabulary with a token for each code at each place of a frame."""
    tokens = ("<|begin_of_text|>", "<|eot_id|>", *ALL)
    return ModelFamily(
        model_types=("llama",),
        roles=ROLES,
        lora_targets=LORA_TARGETS,
        tiny=TINY | {"vocab_size": 259 + len(tokens), "tie_word_embeddings": True},
        tokens=tokens,
        row_tokenizers={Shape.CODES: ROWS, Shape.AUDIO: ROWS},
        checkpoints=("canopylabs/orpheus-3b-0.1-ft", "canopylabs/orpheus-3b-0.1-pretrained"),
        limits=(
            Limit(
                key="trainer",
                reason="Orpheus writes its codes as tokens of text",
                fix="use +trainer=sft",
                applies=lambda plan: plan.trainer is not None and plan.trainer.auto_class == WAVEFORM,
            ),
        ),
        sampling={"speech": {"temperature": 0.6, "top_p": 0.95, "repetition_penalty": 1.1}},
    )


@hookimpl(wrapper=True)
def ftcore_data_format() -> Generator[None, DataFormat | None, DataFormat | None]:
    """The shipped recordings are others: at the codec's rate."""
    form = yield
    return replace(form, sample=VOICES) if form and form.shape == Shape.AUDIO else form


@hookimpl
def ftcore_check_plan(plan: Plan) -> list[Problem]:
    """The checkpoint has tokens of speech, and recordings have a codec."""
    if _silent(plan):
        message = f"the checkpoint has no tokens of speech, {ALL[0]} to {ALL[-1]}"
        return [Problem("model", message, "use an Orpheus checkpoint, or +model=llama for text")]
    return [*_speech(plan)] if plan.trainer and plan.format else []


def _silent(plan: Plan) -> bool:
    """Whether it is known already that the checkpoint is another Llama: by its tokenizer, or by its size on the hub."""
    assert plan.run.model is not None
    try:
        source = checkpoint.find(plan.run.model, plan.family)
        known = checkpoint.settings(plan.run.model, plan.family).get("vocab_size")
    except (Refused, KeyError):  # a problem of the checkpoint's own, named by another check
        return False
    file = Path(source.name) / "tokenizer.json"
    if source.kind == "path" and file.is_file():
        return ALL[-1].encode() not in file.read_bytes()
    return source.kind == "hub" and known is not None and known < WORDS + len(ALL)


def _speech(plan: Plan) -> Iterator[Problem]:
    assert plan.format is not None
    if plan.format.shape in plan.family.row_tokenizers and plan.run.prompts:
        yield Problem("prompts", "a model that learns to speak answers in codes, not in words", "leave it out")
    if plan.format.shape == Shape.AUDIO:
        from ftcore_models._snac import missing
        from ftcore_trainers._recordings import unfit_rows

        lacking = missing(plan.config(Config).codec)
        yield from [lacking] if lacking else unfit_rows(plan, RATE, lambda seconds: None)
