"""What a chat template does with a short conversation, and where generation stops: the facts that checks compare."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftcore import checkpoint
from ftcore.chat import GENERATION, chat_encoder, marked_texts, render, training_texts
from ftcore.specs import Plan, Shape
from ftcore.tokens import IGNORED, RowTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ASKED, ANSWERED = ("Why?", "And then?"), ("Because.", "Nothing.")
TALK = [
    {"role": role, "content": words}
    for pair in zip(ASKED, ANSWERED, strict=True)
    for role, words in zip(("user", "assistant"), pair, strict=True)
]
CONTROL = re.compile(r"<\|[^\s<>|]{1,40}\|>|<｜[^\s<>｜]{1,40}｜>|<(?:start|end)_of_turn>")
"""Words that are control tokens in every family that writes them; `[INST]` is plain text in some."""


@dataclass(frozen=True)
class Probe:
    """Two turns as a template writes them."""

    text: str
    ids: list[int]
    end: str
    """Last token that the first answer is trained to write."""
    rewrites: bool
    """Whether the first answer is written otherwise once the second stands behind it."""
    by_marks: bool
    """Whether what is trained goes by the template's own marks, since it asks otherwise than it answers."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Probe:
        """Raises Refused for a template that does not take such a conversation."""
        encoder = chat_encoder(tokenizer)
        text = render(tokenizer, TALK)
        row = RowTokenizer(tokenizer, Shape.MESSAGES, 10**6)({"messages": TALK[:2]})[-1]
        trained = [label for label in row["labels"] if label != IGNORED]
        return cls(
            text=text,
            ids=encoder.encode(text)[0],
            end=str(tokenizer.convert_ids_to_tokens(trained[-1])) if trained else "",
            rewrites=len(training_texts(encoder, TALK)) > 1,
            by_marks=not render(tokenizer, TALK[:2]).startswith(render(tokenizer, TALK[:1], generate=True)),
        )


def marks_astray(tokenizer: PreTrainedTokenizerBase, probe: Probe) -> str | None:
    """What the template's `generation` marks stand around, where that is not the answers; None where they are right."""
    if not GENERATION.search(tokenizer.get_chat_template()):
        return None
    marked = marked_texts(tokenizer, TALK)
    around = len(marked) == len(ANSWERED) and all(words in text for words, text in zip(ANSWERED, marked, strict=True))
    strange = any(words in text for words in ASKED for text in marked)
    return "".join(marked)[:60] if strange or not around else None


def split_words(tokenizer: PreTrainedTokenizerBase, probe: Probe | None) -> Iterator[tuple[str, int]]:
    """Control tokens that are read as several tokens, and as how many: the template's, and the tokenizer's own."""
    named = [str(word) for word in tokenizer.special_tokens_map.values() if isinstance(word, str)]
    written = CONTROL.findall(probe.text) if probe is not None else []
    for word in dict.fromkeys([*written, *named]):
        pieces = tokenizer(word, add_special_tokens=False)["input_ids"]
        if len(pieces) != 1:
            yield word, len(pieces)


def ends_of(plan: Plan, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Tokens at which generation stops: the tokenizer's, those of the model's configs, and the family's turn ends."""
    vocabulary = tokenizer.get_vocab()
    ids: list[Any] = [tokenizer.eos_token_id]
    for name in ("generation_config.json", "config.json"):
        own = _stored(plan, name).get("eos_token_id")
        ids += own if isinstance(own, list) else [own]
    named = [token for token in (plan.family.chat.turn_ends if plan.family.chat else ()) if token in vocabulary]
    known = [str(tokenizer.convert_ids_to_tokens(one)) for one in ids if isinstance(one, int) and one < len(tokenizer)]
    return list(dict.fromkeys([*known, *named]))


def _stored(plan: Plan, name: str) -> dict[str, Any]:
    """A JSON file of the checkpoint, or nothing where it is not on this machine."""
    from huggingface_hub import try_to_load_from_cache

    assert plan.run.model is not None
    model = plan.run.model
    place = checkpoint.locate(model, plan.family)
    found = try_to_load_from_cache(place, name, revision=model.revision) if not Path(place).is_dir() else None
    file = Path(found) if isinstance(found, str) else Path(place) / name
    try:
        read = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return read if isinstance(read, dict) else {}
