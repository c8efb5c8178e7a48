"""Text of token ids while more of them come: what was handed out once does not change any more."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INCOMPLETE = "\ufffd"
"""What decoders write for bytes that are no whole character, or not yet."""
LETTERS = string.ascii_letters + string.digits + string.punctuation
"""Of words that are handed out whole: `ftcore.redaction` knows a secret only by all its letters. Those of other scripts
are handed out one by one, since some scripts put no blanks between words."""


def decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of an answer, without special tokens, and as the model wrote it: no blanks are taken out."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


class Pieces:
    """An answer in pieces: one behind the other they are its text, without blanks around it.

    Bytes at its end that are no whole character are left out.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._given = ""

    def add(self, ids: Sequence[int]) -> str:
        """What is certain of the text, now that these ids are there, and was not handed out yet; may be empty."""
        self._ids += ids
        text = self._whole().rstrip(LETTERS).rstrip()
        return self._new(text) if text.startswith(self._given) else ""

    def end(self) -> str:
        """The rest."""
        return self._new(self._whole().rstrip())

    def _whole(self) -> str:
        # Decoded from the first id on: some tokenizers write a word otherwise when none is before it, and where single
        # bytes are tokens, one that completes no character yet may spoil the characters before it.
        return decoded(self._tokenizer, self._ids).rstrip(INCOMPLETE).lstrip()

    def _new(self, text: str) -> str:
        new, self._given = text[len(self._given) :], text
        return new
