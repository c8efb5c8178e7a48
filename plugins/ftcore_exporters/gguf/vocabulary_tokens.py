"""The list of tokens of a GGUF file: their texts and types."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ftcore.errors import Problem, Refused

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Tokens:
    """One entry per row of the embedding."""

    texts: list[str]
    types: list[int]
    """Values of `gguf.TokenType`."""


def tokens_of(tokenizer: PreTrainedTokenizerFast, rows: int, *, spaces: bool) -> Tokens:
    """Texts and types of all tokens; rows of the embedding that have no token are padding.

    :param rows: rows of the embedding; tokens beyond them, which the model cannot read, are left out.
    :param spaces: whether `▁` stands for a space (SentencePiece), and `<0x0A>` for a byte.
    :raises Refused: two tokens would have the same text, which llama.cpp does not load.
    """
    from gguf import TokenType

    texts, types = [""] * rows, [int(TokenType.UNUSED)] * rows
    added = tokenizer.added_tokens_decoder
    unknown = tokenizer.backend_tokenizer.model.unk_token
    for word, index in tokenizer.get_vocab().items():
        if index >= rows:
            continue
        kind = TokenType.NORMAL
        if word == unknown:
            kind = TokenType.UNKNOWN
        elif index in added:
            kind = TokenType.CONTROL if added[index].special else TokenType.USER_DEFINED
        elif spaces and _is_byte(word):
            kind = TokenType.BYTE
        if kind == TokenType.USER_DEFINED and spaces:
            word = word.replace("▁", " ")  # it is searched for in the text, where spaces are still spaces
        texts[index], types[index] = word, int(kind)
    # Padding must be nothing that a text is read as. SentencePiece joins any two tokens whose text is a third, but
    # never around a space, which is `▁` by then.
    texts = [text or (f"[PAD {i}]" if spaces else f"[PAD{i}]") for i, text in enumerate(texts)]
    if len(set(texts)) < rows:
        twice = next(text for i, text in enumerate(texts) if text in texts[:i])
        raise Refused(Problem("export.gguf", f"two tokens are both {twice!r}", "remove the one that was added"))
    return Tokens(texts, types)


def check_added(backend: dict[str, Any], stripping: bool) -> None:
    """Added tokens must be found in a text as llama.cpp finds them.

    :param stripping: whether the tokens that take the space after them are those that llama.cpp knows of.
    """
    for token in backend["added_tokens"]:
        taken = token["single_word"] or ((token["lstrip"] or token["rstrip"]) and not stripping)
        if taken:
            message = f"the added token {token['content']!r} takes spaces around it, which a GGUF file cannot say"
            raise Refused(Problem("export.gguf", message, "set its lstrip, rstrip and single_word to false"))


def _is_byte(word: str) -> bool:
    return len(word) == 6 and word.startswith("<0x") and word.endswith(">")
