"""Rows of speech as Orpheus' tokens: the words are read, the codes are trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ftcore import Plan, Problem, Refused
from ftcore.audio import read
from ftcore.control import Encoder
from ftcore.errors import Exit
from ftcore.tokens import IGNORED, Tokens
from ftcore_data.codes import CODEBOOK, LAYERS
from ftcore_models import _orpheus_tokens as own
from ftcore_models._snac import Snac
from ftcore_models.orpheus import Config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BEFORE_WORDS = (own.START_OF_HUMAN, "<|begin_of_text|>")
AFTER_WORDS = ("<|eot_id|>", own.END_OF_HUMAN)
BEFORE_CODES = (own.START_OF_AI, own.START_OF_SPEECH)
AFTER_CODES = (own.END_OF_SPEECH, own.END_OF_AI)


def speech_rows(plan: Plan, tokenizer: PreTrainedTokenizerBase) -> SpeechRows:
    """What makes token ids of rows of shape `codes` or `audio`."""
    assert plan.run.trainer is not None
    return SpeechRows(tokenizer, plan.run.trainer.max_length, plan.config(Config).codec, plan.device.kind)


class SpeechRows:
    """Token ids and labels of words and speech.

    Trained is what the model writes once it is asked: that speech starts, its codes, and that it ends. The script that
    the checkpoints were trained with trains the words as well.

    :param codec: hub id or folder of the codec, which is loaded for the first row that brings a recording.
    :raises Refused: when the tokenizer has no tokens of speech.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int, codec: str, device: str) -> None:
        self._words, self._max_length, self._codec, self._device = Encoder(tokenizer), max_length, codec, device
        self._first = _ids(tokenizer, (own.ALL[own.MARKS],))[0]
        _ids(tokenizer, own.ALL[-1:])
        names = (BEFORE_WORDS, AFTER_WORDS, BEFORE_CODES, AFTER_CODES)
        self._before_words, self._after_words, self._before_codes, self._after_codes = (
            _ids(tokenizer, group) for group in names
        )

    def __call__(self, row: Mapping[str, Any]) -> list[Tokens]:
        """The one training row of a row, with `input_ids` and `labels`.

        :param row: `text`, perhaps `speaker`, and `codes` from 0 to 4095, seven a frame, or `audio`.
        :raises Refused: when it is longer than `max_length`, or the recording does not fit the codec.
        """
        speaker = row.get("speaker")
        text = f"{speaker}: {row['text']}" if speaker else row["text"]
        words, _ = self._words.encode(self._words.marked(text))
        codes = row["codes"] if row.get("codes") else self._snac.codes(*read(row["audio"]))
        asked = [*self._before_words, *words, *self._after_words]
        said = [*self._before_codes, *self._tokens(codes), *self._after_codes]
        length = len(asked) + len(said)
        if length > self._max_length:
            message = f"{length} tokens of words and speech, more than trainer.max_length={self._max_length}"
            fix = f"set trainer.max_length={length}, or cut the speech, and its words with it"
            raise Refused(Problem("data", message, fix, Exit.DATA))
        return [{"input_ids": asked + said, "labels": [IGNORED] * len(asked) + said}]

    def _tokens(self, codes: Sequence[int]) -> list[int]:
        return [self._first + CODEBOOK * (place % len(LAYERS)) + code for place, code in enumerate(codes)]

    @cached_property
    def _snac(self) -> Snac:
        return Snac(self._codec, self._device)


def _ids(tokenizer: PreTrainedTokenizerBase, names: Sequence[str]) -> list[int]:
    known: Any = tokenizer.convert_tokens_to_ids(list(names))
    for name, token in zip(names, known, strict=True):
        if token is None or token == tokenizer.unk_token_id:
            message = f"the tokenizer has no token {name}, so the checkpoint is none of Orpheus'"
            raise Refused(Problem("model", message, "use an Orpheus checkpoint with its own tokenizer"))
    return list(known)
