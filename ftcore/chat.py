"""Conversations to text through a chat template, and which characters of the text the assistant writes itself.

Nothing is searched for. A turn runs from where the template hands over to the assistant to where that turn ends, both
found by rendering the conversation up to there. Where a template writes a turn otherwise once the conversation goes on
(Qwen3 drops the thinking of earlier answers), the turn is trained in a text of its own that ends with it: exactly what
the model reads and writes when it answers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ftcore.control import Encoder, Span, plain
from ftcore.errors import Exit, Problem, Refused

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, Any]

REASONING = ("reasoning_content", "thinking", "reasoning")
"""Keys under which messages carry what was thought before the answer; transformers fills in one from another."""
GENERATION = re.compile(r"{%-?\s*generation\s*-?%}")
"""How a template marks what the assistant writes, by transformers' convention."""


@dataclass(frozen=True)
class Rendered:
    """A text, and the character ranges in it that are trained."""

    text: str
    spans: tuple[Span, ...]


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], generate: bool = False, tools: Any = None
) -> str:
    """The conversation as text, through the tokenizer's chat template in a sandbox with limits.

    Raises Refused when there is no template, or when it does not take the conversation.
    """
    return _render(tokenizer, messages, tools, add_generation_prompt=generate)[0]


def render_whole(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    answers_from: int,
    generate: bool = False,
    tools: Any = None,
) -> str:
    """As `render`, of a template that says all that counts.

    Raises Refused as well where it leaves out what the assistant is told, or a part of an answer from the message with
    the number `answers_from` (the first is 0) on.
    """
    text = render(tokenizer, messages, generate=generate, tools=tools)
    _nothing_lost(tokenizer, messages, tools, text)
    for index, message in enumerate(messages):
        if message["role"] == "assistant" and index >= answers_from:
            _answer_is_whole(message, index, text)
    return text


def marked_texts(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[str]:
    """What stands between the template's own `generation` marks, in their order. Raises Refused as `render` does."""
    text, marks = _render(tokenizer, messages, None)
    return [text[start:end] for start, end in marks]


def turn_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Added tokens with which the template opens and closes turns, special or not.

    Tokens that it writes within an answer, such as `<think>`, are none of them: a row's words may hold those.
    """
    user, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    try:
        asked, opened = render(tokenizer, [user]), render(tokenizer, [user], generate=True)
        talk = render(tokenizer, [user, answer, user])
    except Refused:  # a template of another kind; its special tokens are known without it
        return set()
    added = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    return {t for t in added if not t.isspace() and (t in asked or (t in opened and t in talk))}


def chat_encoder(tokenizer: PreTrainedTokenizerBase) -> Encoder:
    """The tokenizer with the control tokens of its chat template. Raises Refused when it gives no offsets."""
    return Encoder(tokenizer, turn_tokens(tokenizer) if tokenizer.chat_template else ())


def training_texts(encoder: Encoder, messages: Sequence[Message], tools: Any = None, skip: int = 0) -> list[Rendered]:
    """The texts that train every answer of a conversation once: one, unless the template rewrites earlier turns.

    An answer with `weight: 0`, and one among the first `skip` messages, is read but not trained.

    Raises Refused when the template gives no clear answer to what the assistant writes, or leaves words out.
    """
    tokenizer = encoder.tokenizer
    messages, tools, text = _marked(encoder, messages, tools)
    _nothing_lost(tokenizer, messages, tools, text)
    wanted = [i for i, m in enumerate(messages) if m["role"] == "assistant" and i >= skip and m.get("weight", 1)]
    turns = [_turn(tokenizer, messages, index, tools) for index in wanted]
    if stray := next((turn for turn in turns if not turn.upto.startswith(turn.before)), None):
        return [_as_marked(encoder, messages, tools, stray, trains_all=len(wanted) == _answers(messages))]
    texts = []
    while turns:
        spans: list[Span] = []
        left: list[_Turn] = []
        for turn in turns:
            end = _end(encoder.control, turn, text)
            if end is None:
                left.append(turn)
            else:
                spans.append((len(turn.before), end))
        if spans:
            texts.append(Rendered(text, tuple(spans)))
        turns = left
        text = turns[-1].upto if turns else ""
    return texts[::-1]


def _marked(encoder: Encoder, messages: Sequence[Message], tools: Any) -> tuple[list[Message], Any, str]:
    """Messages and tools with look-alikes of control tokens marked, and their text, which is otherwise the same."""
    given = [dict(message) for message in messages]
    marked, marked_tools = encoder.marked(given), encoder.marked(tools)
    text = render(encoder.tokenizer, marked, tools=marked_tools)
    if (marked != given or marked_tools != tools) and plain(text) != render(encoder.tokenizer, given, tools=tools):
        message = "the row says control tokens, and the chat template changes what it says because of them"
        raise Refused(Problem("data", message, "take them out of the row", Exit.DATA))
    return marked, marked_tools, text


@dataclass(frozen=True)
class _Turn:
    """One answer: the text that asks for it, and the text that ends with it."""

    number: int
    before: str
    upto: str


def _answers(messages: Sequence[Message]) -> int:
    return sum(m["role"] == "assistant" for m in messages)


def _turn(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], index: int, tools: Any) -> _Turn:
    before = render(tokenizer, messages[:index], generate=True, tools=tools)
    upto = render(tokenizer, messages[: index + 1], tools=tools)
    _answer_is_whole(messages[index], index, upto)
    return _Turn(index + 1, before, upto)


def _end(closers: Sequence[str], turn: _Turn, text: str) -> int | None:
    """Where the turn ends in `text`, or None when it is written otherwise there."""
    upto = turn.upto
    while not text.startswith(upto):
        # Some templates close a whole conversation too: without that closing, the turn may stand here all the same.
        upto = upto.rstrip()
        closer = next((token for token in closers if upto.endswith(token)), None)
        upto = upto.removesuffix(closer or upto)
    ends = upto == turn.upto or any(map(upto.rstrip().endswith, closers))
    return _end_of_turn(closers, upto, len(turn.before)) if ends and len(upto) > len(turn.before) else None


def _end_of_turn(closers: Sequence[str], upto: str, start: int) -> int:
    """The end of a turn without the white space that only separates it from the next one."""
    trimmed = upto.rstrip()
    return max(len(trimmed), start) if any(map(trimmed.endswith, closers)) else len(upto)


def _as_marked(encoder: Encoder, messages: Sequence[Message], tools: Any, stray: _Turn, trains_all: bool) -> Rendered:
    """By the template's own `{% generation %}` marks, which do not depend on how it hands over.

    Raises Refused when it has none, or when they would train an answer that is not to be.
    """
    template = encoder.tokenizer.get_chat_template(tools=tools)
    if not GENERATION.search(template) or not trains_all:
        same = next((i for i, (a, b) in enumerate(zip(stray.before, stray.upto, strict=False)) if a != b), 0)
        opens = stray.before[same:]
        message = (
            f"the chat template asks for an answer with {plain(opens)[:60]!r}, which the answer of turn "
            f"{stray.number} does not have, so what it trains is not certain"
        )
        fix = "name a template made for training, such as data.template=qwen3_training, or a .jinja file of your own"
        raise Refused(Problem("data", message, fix, Exit.DATA))
    text, marks = _render(encoder.tokenizer, messages, tools)
    spans = []
    for start, end in marks:
        opened = next((t for t in encoder.turns if text.startswith(t, start)), "")  # the template's, not an answer's
        spans.append((start + len(opened), _end_of_turn(encoder.control, text[:end], start)))
    return Rendered(text, tuple(spans))


def _nothing_lost(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Any, text: str) -> None:
    """What the assistant is told stands in the text: the system's, the user's and tools' words, and the tools."""
    for number, message in enumerate(messages, 1):
        if message["role"] in ("system", "developer", "user"):
            lost = next((words for words in _texts(message.get("content")) if not _within(words, text)), None)
            if lost is not None:
                problem = f"the chat template leaves out words of message {number} ({message['role']})"
                fix = "use another data.template, or put these words into the user's message"
                raise Refused(Problem("data", problem, fix, Exit.DATA))
        elif message["role"] == "tool" and _unheard(tokenizer, messages, number - 1, tools, text):
            problem = f"the chat template leaves out message {number} (tool)"
            fix = "use a checkpoint or a data.template that renders what tools answer, or take these rows out"
            raise Refused(Problem("data", problem, fix, Exit.DATA))
    if tools and render(tokenizer, messages) == text:
        fix = "use a checkpoint or a data.template that renders tools, or take the tools out"
        raise Refused(Problem("data", "the chat template leaves out the tools", fix, Exit.DATA))


def _unheard(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], index: int, tools: Any, text: str
) -> bool:
    """Whether the text is the same whatever a tool said: templates may write its words otherwise, such as in JSON."""
    said = _texts(messages[index].get("content"))
    if not said or all(_within(words, text) for words in said):
        return False
    other = {**messages[index], "content": "something else"}
    try:
        return render(tokenizer, [*messages[:index], other, *messages[index + 1 :]], tools=tools) == text
    except Refused:  # it looks into the words
        return False


def _answer_is_whole(message: Message, index: int, text: str) -> None:
    for what in _left_out(message, text):
        fix = "use a checkpoint or a data.template that renders them, or take these rows out"
        problem = f"the chat template leaves out the {what} of turn {index + 1}"
        raise Refused(Problem("data", problem, fix, Exit.DATA))


def _left_out(message: Message, upto: str) -> Iterator[str]:
    """What an answer says and its text does not: it would be trained to say less."""
    calls = [call for call in message.get("tool_calls") or () if isinstance(call, Mapping)]
    if any(str((call.get("function") or call).get("name") or "") not in upto for call in calls):
        yield "tool calls"
    if any(not _within(words, upto) for words in _texts(message.get("content"))):
        yield "words"
    thought = next((message[key] for key in REASONING if message.get(key)), "")
    if not _within(str(thought), upto):
        yield "thoughts"


def _texts(content: Any) -> list[str]:
    parts = content if isinstance(content, list) else [content]
    texts = (part.get("text") if isinstance(part, Mapping) else part for part in parts)
    return [text for text in texts if isinstance(text, str)]


def _within(words: str, text: str) -> bool:
    """The words are in the text: whole, or line for line where a template puts them together anew."""
    return words.strip() in text or all(line.strip() in text for line in words.splitlines())


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Any, **options: Any
) -> tuple[str, list[Span]]:
    from jinja2 import TemplateError

    from ftcore.template_limits import TooMuch
    from ftcore.template_sandbox import rendered

    if not tokenizer.chat_template:
        message = "the rows are conversations, but the tokenizer has no chat template"
        fix = "take an instruct checkpoint, name a template with data.template, or give rows of plain text"
        raise Refused(Problem("data.template", message, fix, Exit.DATA))
    template = tokenizer.get_chat_template(tools=tools)
    try:
        return rendered(template, messages, tools=tools or None, **options, **tokenizer.special_tokens_map)
    except TooMuch as error:
        fix = "set another data.template; look at this one before you use the model elsewhere"
        message = f"the chat template, given this row, {error}"
        raise Refused(Problem("data.template", message, fix, Exit.DATA)) from error
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        reason = " ".join(str(error).split())[:200]
        fix = "change the row to what the template takes, or set another data.template"
        raise Refused(Problem("data", f"the chat template does not take this row: {reason}", fix, Exit.DATA)) from error
