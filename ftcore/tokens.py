"""Rows to token ids and labels, for training and for `ftcore preview` alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ftcore.chat import Rendered, chat_encoder, training_texts
from ftcore.chat import render as render
from ftcore.control import Encoder
from ftcore.errors import Exit, Problem, Refused
from ftcore.specs import Shape

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""Label of a token that is read but not trained, as PyTorch's cross entropy takes it."""

TOKENIZED = frozenset({Shape.TEXT, Shape.MESSAGES, Shape.PROMPT_COMPLETION, Shape.TOKENS})
"""Shapes whose ids and labels are made here; trainers of the others tokenize them themselves."""

Tokens = dict[str, list[int]]


class RowTokenizer:
    """Token ids and labels of rows.

    Conversations train the assistants' words and the tokens that end their turns; prompt-completion rows train the
    completion; text trains everything; rows of token ids train what their labels say.

    :param shape: one of `TOKENIZED`; LookupError otherwise.
    :param max_length: rows are cut to so many tokens.
    :param splits: what is cut off a text or a row of token ids becomes further rows.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, shape: str, max_length: int, splits: bool = False) -> None:
        if shape not in TOKENIZED:
            raise LookupError(
                f"rows of shape '{shape}' cannot be tokenized here; trainers that take it tokenize it themselves"
            )
        self.tokenizer, self.shape, self.max_length = tokenizer, shape, max_length
        self._splits = splits and shape in (Shape.TEXT, Shape.TOKENS)
        self._chat: Encoder | None = None

    def __call__(self, row: Mapping[str, Any]) -> list[Tokens]:
        """The training rows of one row: one, unless it is split, or its chat template rewrites earlier turns.

        :param row: columns of the shape.
        :returns: `input_ids` and `labels` of each, of the same length.
        :raises Refused: when it is not certain which tokens are trained, or the ids are not the tokenizer's.
        """
        made, length = self._made(row), self.max_length
        return [
            {"input_ids": ids[start : start + length], "labels": labels[start : start + length]}
            for ids, labels in made
            for start in (range(0, len(ids), length) if self._splits else (0,))
        ]

    def _made(self, row: Mapping[str, Any]) -> list[tuple[list[int], list[int]]]:
        if self.shape == Shape.MESSAGES:
            return self._conversation(row["messages"], row.get("tools"))
        if self.shape == Shape.TEXT:
            ids = self._plain(row["text"])
            return [_with_end(self.tokenizer, ids, list(ids))]
        if self.shape == Shape.TOKENS:
            return [self._given(row)]
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(prompt, list):
            return self._conversation([*prompt, *completion], row.get("tools"), skip=len(prompt))
        asked, both = self._plain(prompt), self._plain(prompt + completion)
        # What begins a text, some tokenizers write with a space in front, which the completion does not have.
        said = both[len(asked) :] if both[: len(asked)] == asked else self._bare(completion)
        return [_with_end(self.tokenizer, asked + said, [IGNORED] * len(asked) + said)]

    def _conversation(self, messages: Sequence[Any], tools: Any, skip: int = 0) -> list[tuple[list[int], list[int]]]:
        if self._chat is None:
            self._chat = chat_encoder(self.tokenizer)
        return [self._closed(text) for text in training_texts(self._chat, messages, tools, skip)]

    def _closed(self, rendered: Rendered) -> tuple[list[int], list[int]]:
        """With the end token, where the text ends with an answer that the template does not close."""
        assert self._chat is not None
        ids, labels = masked(self._chat, rendered)
        answered = bool(rendered.spans) and rendered.spans[-1][1] == len(rendered.text)
        closed = any(map(rendered.text.endswith, self._chat.control))
        return _with_end(self.tokenizer, ids, labels) if answered and not closed else (ids, labels)

    def _plain(self, text: str) -> list[int]:
        """The text as the tokenizer takes it, with one token in front where it puts one there, and none behind."""
        ids: list[int] = self.tokenizer(text, verbose=False)["input_ids"]
        bare = self._bare(text)
        front = len(ids) - len(bare)
        while front > 0 and ids[front : front + len(bare)] != bare:
            front -= 1
        ids = ids[: front + len(bare)]
        begin = self.tokenizer.bos_token_id
        return ids[1:] if begin is not None and ids[:2] == [begin, begin] else ids

    def _bare(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _given(self, row: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        ids = list(row["input_ids"])
        known = len(self.tokenizer)
        if strange := next((token for token in ids if not 0 <= token < known), None):
            message = f"the token id {strange} is none of the tokenizer's {known}"
            raise Refused(Problem("data", message, "tokenize the rows with this model's tokenizer", Exit.DATA))
        return ids, list(row.get("labels") or ids)


def tokenize_row(tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any], shape: str, max_length: int) -> Tokens:
    """Token ids and labels of one row; the last training row, where the chat template makes several of it."""
    return RowTokenizer(tokenizer, shape, max_length)(row)[-1]


def masked(encoder: Encoder, rendered: Rendered) -> tuple[list[int], list[int]]:
    """Token ids of a rendered conversation, and labels on what the assistant writes.

    Where a token would reach from the prompt into the answer, the text is cut between them: the prompt then has the
    tokens that it has when the model is asked, and the answer those that it would write.
    """
    ids, spans = encoder.encode(rendered.text)
    starts = _starts(spans)
    edges = {place for span in rendered.spans for place in span}
    cuts = {
        place
        for place in _straddled(edges, starts, spans)
        if place not in {end for _, end in rendered.spans} or not _is_control(encoder, ids, starts, spans, place)
    }
    if cuts:
        ids, spans = encoder.encode(rendered.text, cuts)
        starts = _starts(spans)
        _no_added_space(encoder, rendered.text, ids, starts, cuts)
    labels, left = [], list(rendered.spans)
    for token, start in zip(ids, starts, strict=True):
        while left and start >= left[0][1]:
            left.pop(0)
        labels.append(token if left and left[0][0] <= start else IGNORED)
    return ids, labels


def _starts(spans: Sequence[tuple[int, int]]) -> list[int]:
    """Where each token starts, with the white space in front of it that some tokenizers leave out of its offsets."""
    starts, behind = [], 0
    for start, end in spans:
        starts.append(min(start, behind))
        behind = max(behind, end)
    return starts


def _straddled(edges: set[int], starts: list[int], spans: Sequence[tuple[int, int]]) -> set[int]:
    """The edges that lie within a token."""
    return {edge for start, (_, end) in zip(starts, spans, strict=True) for edge in edges if start < edge < end}


def _is_control(
    encoder: Encoder, ids: list[int], starts: list[int], spans: Sequence[tuple[int, int]], place: int
) -> bool:
    """Whether the token at `place` is a control token, which may swallow white space behind it."""
    control = set(encoder.tokenizer.convert_tokens_to_ids(list(encoder.control)))
    return any(
        start < place < end and token in control for token, start, (_, end) in zip(ids, starts, spans, strict=True)
    )


def _no_added_space(encoder: Encoder, text: str, ids: list[int], starts: list[int], cuts: set[int]) -> None:
    for token, start in zip(ids, starts, strict=True):
        if start in cuts and text[start : start + 1] != " ":
            piece = str(encoder.tokenizer.convert_ids_to_tokens(token))
            if piece.startswith("▁"):
                message = "an answer begins with characters that the tokenizer joins with the template's before it"
                raise Refused(Problem("data", message, "take the white space in front of the answer out", Exit.DATA))


def _with_end(tokenizer: PreTrainedTokenizerBase, ids: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
    end = tokenizer.eos_token_id
    if end is None or (ids and ids[-1] == end):
        return ids, labels
    return [*ids, end], [*labels, end]
