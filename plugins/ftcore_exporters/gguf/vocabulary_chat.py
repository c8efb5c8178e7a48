"""What a tokenizer's chat template shows: a rendered conversation, and the token that ends an answer in it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_QUESTION, _ANSWER = "thatisthequestion", "thatistheanswer"


def conversation(tokenizer: PreTrainedTokenizerFast) -> str | None:
    """A question and its answer as the chat template writes them; None without a template that does."""
    from ftcore.chat import render
    from ftcore.errors import Refused

    if not tokenizer.chat_template:
        return None
    messages = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = render(tokenizer, messages)
    except (Refused, ValueError):  # made for something else, or none is the default
        return None
    return text if _QUESTION in text and _ANSWER in text else None


def turn_end(tokenizer: PreTrainedTokenizerFast, text: str) -> int | None:
    """Id of the added token that ends the answer in a `conversation`; None where something else does."""
    rest = text.rpartition(_ANSWER)[2].lstrip()
    ids = tokenizer.encode(rest, add_special_tokens=False)
    return ids[0] if ids and ids[0] in tokenizer.added_tokens_decoder else None
