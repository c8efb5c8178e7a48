"""transformers' Seq2SeqTrainer with a loss over the tokens of the whole step, and the word error rate."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import Seq2SeqTrainer

from ftcore import Problem, Refused
from ftcore_trainers._hearing import IGNORED
from ftcore_trainers._lean_loop import LeanLoop
from ftcore_trainers._measures import word_error_rate

UNTIMED = "<|notimestamps|>"


class SpeechTrainer(LeanLoop, Seq2SeqTrainer):
    """Takes batches of `Transcripts`."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(compute_loss_func=token_loss, compute_metrics=self.measure, **kwargs)

    def measure(self, output: Any) -> dict[str, float]:
        """The word error rate of what the model writes."""
        said, heard = (self._texts(ids) for ids in (output.label_ids, output.predictions))
        return {"wer": word_error_rate(said, heard)}

    def _texts(self, ids: Any) -> list[str]:
        tokenizer: Any = self.processing_class
        ids = np.where(ids == IGNORED, tokenizer.pad_token_id, ids)
        return list(tokenizer.batch_decode(ids, skip_special_tokens=True))


def token_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """Cross entropy of logits `[rows, length, tokens]`, over the labelled tokens of the step, or of the batch.

    transformers' Whisper takes the mean of each micro-batch by itself, whatever its number of tokens.
    """
    logits = outputs["logits"].float().flatten(0, 1)
    total = torch.nn.functional.cross_entropy(logits, labels.flatten(), ignore_index=IGNORED, reduction="sum")
    return total / ((labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch)


def speak(model: Any, tokenizer: Any, language: str | None, task: str) -> tuple[int, ...]:
    """Make the model and its tokenizer begin with the language and the task; returns the tokens after the start.

    A plain `tokenizer.json` knows no such prefix, but may have the token for text without times. Raises Refused where
    such a one is to know a language.
    """
    if language is not None:
        if not hasattr(tokenizer, "set_prefix_tokens"):
            message = "the checkpoint's tokenizer is not Whisper's own, so it knows no languages"
            raise Refused(
                Problem("trainer.language", message, "take a checkpoint that was saved with WhisperTokenizer")
            )
        tokenizer.set_prefix_tokens(language=language, task=task)
        model.generation_config.language, model.generation_config.task = language, task
    if hasattr(tokenizer, "prefix_tokens"):
        return tuple(tokenizer.prefix_tokens[1:])
    untimed = tokenizer.get_vocab().get(UNTIMED)
    return () if untimed is None else (untimed,)
