"""Rows to token ids and labels, for training and for `ftcore preview` alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ftcore.errors import Exit, Problem, Refused
from ftcore.specs import Shape

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""Label of a token that is read but not trained, as PyTorch's cross entropy takes it."""

Span = tuple[int, int]


def tokenize_row(
    tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any], shape: str, max_length: int
) -> dict[str, list[int]]:
    """Token ids and labels of one row, cut to `max_length` tokens.

    Conversations train the assistants' words and the token that ends their turn; prompt-completion rows train the
    completion; text trains everything. Raises Refused when the chat template gives no clear answer to which tokens
    those are.
    """
    if shape == Shape.MESSAGES:
        ids, labels = _conversation(tokenizer, row["messages"], row.get("tools"))
    elif shape == Shape.PROMPT_COMPLETION:
        prompt = tokenizer(row["prompt"])["input_ids"]
        rest = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
        ids, labels = _with_end(tokenizer, prompt + rest, [IGNORED] * len(prompt) + rest)
    elif shape == Shape.TEXT:
        ids = tokenizer(row["text"])["input_ids"]
        ids, labels = _with_end(tokenizer, ids, list(ids))
    else:
        raise LookupError(
            f"rows of shape '{shape}' cannot be tokenized here; trainers that take it tokenize it themselves"
        )
    return {"input_ids": ids[:max_length], "labels": labels[:max_length]}


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], generate: bool = False, tools: Any = None
) -> str:
    """The conversation as text, through the tokenizer's own chat template."""
    if not tokenizer.chat_template:
        raise Refused(
            Problem(
                "data",
                "the rows are conversations, but the tokenizer has no chat template",
                "take an instruct checkpoint, or rows of plain text with data=text",
                Exit.DATA,
            )
        )
    text = tokenizer.apply_chat_template(list(messages), tools=tools, tokenize=False, add_generation_prompt=generate)
    assert isinstance(text, str)
    return text


def _conversation(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], tools: Any
) -> tuple[list[int], list[int]]:
    text = render(tokenizer, messages, tools=tools)
    spans = assistant_spans(tokenizer, messages, text, tools)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids: list[int] = encoded["input_ids"]
    labels = [
        token if any(start < end and first <= start and end <= last for first, last in spans) else IGNORED
        for token, (start, end) in zip(ids, encoded["offset_mapping"], strict=True)
    ]
    return ids, labels


def assistant_spans(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], text: str, tools: Any = None
) -> list[Span]:
    """Character ranges in `text` that the assistant would have written itself, ends of turns included.

    Each range runs from where the template hands over to the assistant to where its turn ends, both found by
    rendering the conversation up to there; nothing is searched for, so words that look like a template are harmless.
    """
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(tokenizer, messages[:index], generate=True, tools=tools)
        upto = render(tokenizer, messages[: index + 1], tools=tools)
        if not (text.startswith(upto) and upto.startswith(before)):
            raise Refused(
                Problem(
                    "data",
                    f"the chat template rewrites earlier turns, so what turn {index + 1} trains is not certain",
                    "end each row with the turn that is to be trained, or use another chat template",
                    Exit.DATA,
                )
            )
        if _leaves_out_calls(message, upto[len(before) :]):
            raise Refused(
                Problem(
                    "data",
                    f"the chat template leaves out the tool calls of turn {index + 1}",
                    "use a checkpoint whose chat template renders tool calls, or take these rows out",
                    Exit.DATA,
                )
            )
        spans.append((len(before), _end_of_turn(tokenizer, upto, len(before))))
    return spans


def _leaves_out_calls(message: Mapping[str, Any], said: str) -> bool:
    """Whether a function that the turn calls is not named in its text: it would be trained to say nothing instead."""
    calls = [call for call in message.get("tool_calls") or () if isinstance(call, Mapping)]
    return any(str((call.get("function") or call).get("name") or "") not in said for call in calls)


def _end_of_turn(tokenizer: PreTrainedTokenizerBase, upto: str, start: int) -> int:
    """The end of a turn without the white space that only separates it from the next one."""
    trimmed = upto.rstrip()
    ends_with_token = any(trimmed.endswith(token) for token in tokenizer.all_special_tokens)
    return max(len(trimmed), start) if ends_with_token else len(upto)


def _with_end(tokenizer: PreTrainedTokenizerBase, ids: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
    end = tokenizer.eos_token_id
    if end is None or (ids and ids[-1] == end):
        return ids, labels
    return [*ids, end], [*labels, end]
