"""What a checkpoint without the trained head does not bring: trained whole and saved with the adapter, or left out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TASKS: dict[str, str | None] = {
    "AutoModel": "FEATURE_EXTRACTION",
    "AutoModelForSequenceClassification": "SEQ_CLS",
    "AutoModelForMaskedLM": None,
    "AutoModelForSpeechSeq2Seq": None,
    "AutoModelForTextToWaveform": None,
}
"""PEFT's names of the tasks that are no text generation, by auto class; None takes the inputs as they are."""


def new_modules(model: PreTrainedModel, task: str | None) -> list[str]:
    """Paths of the modules that may have started at random.

    For classification everything beside the base model, and its pooler; for embeddings the pooler, which is not used.
    """
    poolers = [path for path, _ in model.named_modules() if path.rpartition(".")[2] == "pooler"]
    if task != "SEQ_CLS":
        return poolers if task == "FEATURE_EXTRACTION" else []
    beside = (pair for pair in model.named_children() if pair[0] != model.base_model_prefix)
    return [*(name for name, child in beside if next(child.parameters(), None) is not None), *poolers]


def inside(paths: Sequence[str]) -> str | None:
    """The regular expression of the modules at and under the paths; None for no paths."""
    return "|".join(rf"{re.escape(path)}(\..*)?" for path in paths) or None
