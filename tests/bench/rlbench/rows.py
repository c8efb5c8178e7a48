"""Rows whose tokenized lengths are exact: letters through a byte-level tokenizer, a token each."""

from __future__ import annotations

import random
import string
from collections.abc import Sequence
from typing import Any

from rlbench.works import TrainerWork

LETTERS = string.ascii_letters
"""A template may strip spaces, and letters of more than one byte are more than one token."""
Row = dict[str, Any]


def dataset(work: TrainerWork, tokenizer: Any) -> Any:
    """The rows of all steps in their order, as ftcore's data formats hand them to a trainer and TRL takes them."""
    from datasets import Dataset

    drawn = random.Random(1)
    make = {"dpo": _pair, "kto": _judged, "grpo": _asked}[work.trainer]
    count = work.total * (work.prompts if work.trainer == "grpo" else work.batch)
    asked, answered = _sizes(work, tokenizer)
    return Dataset.from_list([make(drawn, number, asked, answered) for number in range(count)])


def completions(work: TrainerWork, tokenizer: Any, prompt_ids: Sequence[Sequence[int]]) -> list[list[int]]:
    """What is learnt from in place of generated text: as many tokens as a row has left, the same on every side."""
    letters = tokenizer(LETTERS, add_special_tokens=False)["input_ids"]
    found = []
    for number, ids in enumerate(prompt_ids):
        drawn = random.Random(f"{number} {list(ids)}")
        found.append(drawn.choices(letters, k=work.length - len(ids)))
    return found


def by_place(completions: Sequence[Any], **_: Any) -> list[float]:
    """A reward that needs no words: 0 for the first of a group to 1 for the last."""
    return [number / max(len(completions) - 1, 1) for number in range(len(completions))]


def _sizes(work: TrainerWork, tokenizer: Any) -> tuple[int, int]:
    """Letters of a prompt, and of an answer, so that with the template's tokens a row has `length` of them."""

    def tokens(*words: str, generate: bool) -> int:
        text = tokenizer.apply_chat_template(_talk(*words), tokenize=False, add_generation_prompt=generate)
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    asked = work.prompt - (tokens("a", generate=True) - 1)
    both = tokens("a", "a", generate=False) - 2
    answered = work.length - both - asked
    if asked < 1 or answered < 1:
        message = f"the chat template leaves {asked} tokens for a prompt and {answered} for an answer"
        raise SystemExit(f"{message}: raise --prompt and --length")
    return asked, answered


def _talk(*words: str) -> list[dict[str, str]]:
    return [{"role": role, "content": said} for role, said in zip(("user", "assistant"), words, strict=False)]


def _text(drawn: random.Random, size: int) -> str:
    return "".join(drawn.choices(LETTERS, k=size))


def _answer(drawn: random.Random, size: int) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": _text(drawn, size)}]


def _asked(drawn: random.Random, number: int, asked: int, answered: int) -> Row:
    return {"prompt": _talk(_text(drawn, asked))}


def _judged(drawn: random.Random, number: int, asked: int, answered: int) -> Row:
    row = _asked(drawn, number, asked, answered)
    return {**row, "completion": _answer(drawn, answered), "label": number % 2 == 0}


def _pair(drawn: random.Random, number: int, asked: int, answered: int) -> Row:
    row = _asked(drawn, number, asked, answered)
    return {**row, "chosen": _answer(drawn, answered), "rejected": _answer(drawn, answered)}
