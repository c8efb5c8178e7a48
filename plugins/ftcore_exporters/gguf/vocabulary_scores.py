"""Scores by which llama.cpp's SentencePiece tokenizer joins characters in the order of a tokenizer's merges."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from ftcore.errors import Problem, Refused
from ftcore_exporters.gguf.vocabulary_pre import parts_of

if TYPE_CHECKING:
    from ftcore_exporters.gguf.vocabulary_tokens import Tokens

NEVER = -1e9
"""Score of what no merge makes: below every rank."""


def scores_of(model: dict[str, Any], tokens: Tokens) -> list[float]:
    """One score per token: minus the rank of the first merge that makes it.

    SentencePiece always joins the two neighbours whose joint text is the token of the highest score (Kudo and
    Richardson, 2018, arXiv:1808.06226). That is BPE by merges if every way to make a token of two others is a merge,
    and if the merges that make a token stand together, as they do where transformers made them out of scores.

    :param model: the model of a `tokenizer.json`: BPE with byte fallback.
    :raises Refused: the merges cannot be told by scores.
    """
    from gguf import TokenType

    merges = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    # Added tokens are found in the text before anything is merged.
    words = {text for text, kind in zip(tokens.texts, tokens.types, strict=True) if kind == TokenType.NORMAL}
    ranks: dict[str, int] = {}
    last = ""
    for rank, (left, right) in enumerate(merges):
        word = left + right
        if word in words and word in ranks and word != last:
            raise _unlike(f"its merges to {word!r} do not stand together")
        ranks.setdefault(word, rank)
        last = word
    _check_closed(words, set(merges))
    return [float(-ranks[text]) if text in ranks else NEVER for text in tokens.texts]


def _check_closed(words: set[str], merges: set[tuple[str, ...]]) -> None:
    """Every two tokens that make a third must be a merge: llama.cpp joins them in any case."""
    for word in words:
        for cut in range(1, len(word)):
            left, right = word[:cut], word[cut:]
            if left in words and right in words and (left, right) not in merges:
                raise _unlike(f"{left!r} and {right!r} make a token, but are not merged")


def _unlike(why: str) -> Refused:
    return Refused(
        Problem(
            "export.gguf",
            f"llama.cpp's SentencePiece would give other token ids than this tokenizer: {why}",
            "export with +export=[safetensors]",
        )
    )


def is_spaced(backend: dict[str, Any]) -> bool:
    """Whether the tokenizer is BPE over `▁` for a space with bytes to fall back on, as SentencePiece is."""
    return bool(backend["model"].get("byte_fallback"))


def space_prefix(backend: dict[str, Any], text: str | None) -> bool:
    """Whether llama.cpp shall put a space at the start of a text and after each special token.

    transformers has two ways in between, which llama.cpp has not: a space at the start of a text only
    (`prepend_scheme` `first`), and one where there is none yet (`always`). Then what a conversation needs is taken, as
    conversations are what the model is used for; a text without special tokens may get another first token.

    :param text: a rendered conversation, if the tokenizer has a template.
    :raises Refused: spaces are treated in a way that llama.cpp does not know.
    """
    scheme, replaced = "never", False
    for part in (
        *parts_of(backend.get("normalizer"), "normalizers"),
        *parts_of(backend.get("pre_tokenizer"), "pretokenizers"),
    ):
        match part:
            case {"type": "Prepend", "prepend": "▁"}:
                scheme = "each"
            case {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}:
                replaced = True
            case {"type": "Metaspace", "replacement": "▁", "split": False, "prepend_scheme": scheme}:
                replaced = True
            case {"type": "Split", "pattern": {"String": " "}} if replaced:
                pass  # no space is left to split at
            case _:
                raise _unlike(f"it has the part {part}")
    if not replaced:
        raise _unlike("it does not write '▁' for a space")
    if scheme in ("each", "never"):
        return scheme == "each"
    return text is None or _prefixed(scheme, text, [token["content"] for token in backend["added_tokens"]])


def _prefixed(scheme: str, text: str, added: list[str]) -> bool:
    """Whether the pieces of the text between added tokens get a space in front."""
    marks = "|".join(re.escape(token) for token in sorted(added, key=len, reverse=True))
    pieces = re.split(marks, text) if marks else [text]
    gets = {
        not piece.startswith(" ") and (scheme == "always" or i == 0) for i, piece in enumerate(pieces) if piece.strip()
    }
    return gets.pop() if len(gets) == 1 else scheme == "always"
