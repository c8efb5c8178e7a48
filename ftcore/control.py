"""Control tokens stay text where a row's own words look like one, and tokens begin where the assistant begins.

Both are said with noncharacters that Unicode keeps free for a program's own use (U+FDD0, U+FDD1): MARK stands inside a
look-alike until the tokenizer's normalizer takes it out, which is after it has found its added tokens; CUT stands where
no token may reach across.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ftcore.errors import Exit, Problem, Refused

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

MARK = "\ufdd0"
CUT = "\ufdd1"

Span = tuple[int, int]


class Encoder:
    """A fast tokenizer that tells what the template wrote from what the row says.

    :param tokenizer: fast; the plain one is used wherever a text holds no MARK and needs no CUT.
    :param turns: tokens that open and close turns in the chat template, besides the tokenizer's special ones.
    :raises Refused: when the tokenizer gives no offsets.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, turns: Iterable[str] = ()) -> None:
        if not tokenizer.is_fast:
            message = f"{type(tokenizer).__name__} gives no offsets, so which tokens are trained is not certain"
            fix = "use a checkpoint with a tokenizer.json, which loads as a fast tokenizer"
            raise Refused(Problem("model", message, fix))
        self.tokenizer, self.turns = tokenizer, tuple(turns)
        special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        self.control = tuple(sorted({*special, *self.turns}, key=len, reverse=True))
        self._pattern = re.compile("|".join(map(re.escape, self.control)) or "(?!)")
        self._marking: Tokenizer | None = None

    def marked(self, value: Any) -> Any:
        """The same words with MARK inside every look-alike of a control token, in texts, lists and objects.

        :raises Refused: when the words hold one of the two noncharacters.
        """
        if isinstance(value, str):
            if MARK in value or CUT in value:
                message = "holds the noncharacter U+FDD0 or U+FDD1, which stands for nothing in a text"
                raise Refused(Problem("data", message, "take it out of the row", Exit.DATA))
            return self._pattern.sub(lambda found: MARK.join(found[0]), value)
        if isinstance(value, Mapping):
            return {key: self.marked(item) for key, item in value.items()}
        return [self.marked(item) for item in value] if isinstance(value, (list, tuple)) else value

    def encode(self, text: str, cuts: Iterable[int] = ()) -> tuple[list[int], list[Span]]:
        """Token ids, and the characters of `text` that each stands for; nothing is added in front or behind.

        :param text: as rendered from `marked` messages.
        :param cuts: positions in `text` that no token reaches across.
        :raises Refused: when the tokenizer reads a look-alike as a control token all the same.
        """
        places = sorted(set(cuts))
        if MARK not in text and not places:
            encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            return encoded["input_ids"], encoded["offset_mapping"]
        if self._marking is None:
            self._marking = _marking(self.tokenizer)
        pieces = [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]
        encoding = self._marking.encode(CUT.join(pieces), add_special_tokens=False)
        with_cuts = [place + number for number, place in enumerate(places)]
        cut = self._marking.token_to_id(CUT)
        ids, spans = [], []
        for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if token != cut:
                ids.append(token)
                spans.append((start - bisect_left(with_cuts, start), end - bisect_left(with_cuts, end)))
        self._check(text, ids, spans)
        return ids, spans

    def _check(self, text: str, ids: list[int], spans: list[Span]) -> None:
        control = set(self.tokenizer.convert_tokens_to_ids(list(self.control)))
        for token, (start, end) in zip(ids, spans, strict=True):
            if token in control and MARK in text[start:end]:
                word = self.tokenizer.convert_ids_to_tokens(token)
                message = f"a row says {word!r}, and this tokenizer cannot read it as text"
                raise Refused(Problem("data", message, "write the word in another way in that row", Exit.DATA))


def plain(text: str) -> str:
    """The text without the noncharacters."""
    return text.replace(MARK, "").replace(CUT, "")


def _marking(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    from tokenizers import AddedToken, Tokenizer, normalizers

    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in parts["added_tokens"]:
        token["normalized"] = False  # or it would be looked for again once MARK is out
    copy: Tokenizer = Tokenizer.from_str(json.dumps(parts))
    take_out = normalizers.Replace(MARK, "")
    copy.normalizer = normalizers.Sequence([take_out, copy.normalizer]) if copy.normalizer else take_out
    copy.add_special_tokens([AddedToken(CUT, normalized=False, special=True)])
    copy.no_truncation()
    copy.no_padding()
    return copy
