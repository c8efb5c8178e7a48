"""Recordings with transcripts, as the inputs of a speech model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ftcore import Plan, Problem, Refused, checkpoint
from ftcore.audio import read
from ftcore.errors import Exit
from ftcore_models._features import RATE, window
from ftcore_trainers._recordings import unfit, unfit_rows

if TYPE_CHECKING:
    import torch

IGNORED = -100


def problems(plan: Plan) -> Iterator[Problem]:
    """Every recording can be read, has the model's rate, and is no longer than what it hears at once."""
    assert plan.run.model is not None
    yield from unfit_rows(plan, RATE, _too_long(window(checkpoint.settings(plan.run.model, plan.family))))


def _too_long(seconds: int) -> Callable[[float], str | None]:
    return lambda lasts: f"and the model hears {seconds} s at once" if lasts > seconds else None


@dataclass(frozen=True)
class Transcripts:
    """Collates recordings and words."""

    extract: Any
    """The feature extractor."""
    tokenizer: Any
    start: int
    """Token that the decoder starts with."""
    prefix: tuple[int, ...]
    """Tokens that it says before the words: language, task, and that there are no times."""
    max_length: int
    """Longest transcript in tokens."""
    dtype: torch.dtype
    """Of the features: the model's."""

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return `input_features [rows, mels, frames]`, `labels` and `decoder_input_ids`, both `[rows, longest]`.

        Raises Refused for a recording that does not fit the model, or a transcript that is too long for it.
        """
        import torch

        features = self.extract(
            [self._samples(row["audio"]) for row in rows], sampling_rate=RATE, return_tensors="pt"
        ).input_features
        ids = [self.ids(row["text"]) for row in rows]
        longest = max(map(len, ids))
        labels = [one + [IGNORED] * (longest - len(one)) for one in ids]
        end = self.tokenizer.pad_token_id
        inputs = [[self.start, *one[:-1]] + [end] * (longest - len(one)) for one in ids]
        return {
            "input_features": features.to(self.dtype),
            "labels": torch.tensor(labels),
            "decoder_input_ids": torch.tensor(inputs),
        }

    def check(self, rows: Any) -> None:
        """Raises Refused for a transcript that is too long, before a step is made; a stream is not read ahead."""
        for text in rows["text"] if hasattr(rows, "__len__") else ():
            self.ids(text)

    def ids(self, text: str) -> list[int]:
        """What the decoder is to say: the prefix, the words, and the end token."""
        words = self.tokenizer(text, add_special_tokens=False).input_ids
        ids = [*self.prefix, *words, self.tokenizer.eos_token_id]
        if len(ids) > self.max_length:
            message = f"a transcript has {len(ids)} tokens, more than trainer.max_length={self.max_length}: {text[:40]}"
            raise Refused(Problem("data", message, "cut the recording, and its words with it", Exit.DATA))
        return ids

    def _samples(self, audio: Any) -> Any:
        samples, rate = read(audio)
        if problem := unfit("data", rate, len(samples) / rate, RATE, _too_long(self.extract.chunk_length)):
            raise Refused(problem)
        return samples
