"""Renders the chat templates of others: transformers' sandbox and functions, with limits on time, memory and length.

A template comes with a model, an adapter, a GGUF file, or in a file of somebody's, and is a program. In Jinja's sandbox
it reaches nothing of Python, but it can still loop for ever or fill the memory, maybe only for a certain row. So its
syntax tree gets a count at the head of each loop and macro, and what could make large values is measured first
(see `template_limits`). What a template renders stays the same, letter by letter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, wraps
from typing import Any

from jinja2 import Template, TemplateSyntaxError, pass_context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ftcore import template_limits as limits
from ftcore.template_counts import Counted
from ftcore.template_limits import METER, TEMPLATE, TooMuch

Span = tuple[int, int]
REASONING = ("reasoning_content", "thinking", "reasoning")
"""Keys under which messages carry what was thought before the answer."""
LAZY = frozenset({"map", "select", "reject", "selectattr", "rejectattr", "first", "default", "d", "length", "count"})
"""Filters that take no time by themselves."""
WIDTHS = frozenset({"center", "indent", "wordwrap", "batch", "slice", "tojson", "truncate"})
"""Filters whose numbers say how much they write."""


@lru_cache(maxsize=32)
def compiled(text: str) -> Template:
    """A template ready to render. Raises TooMuch for one that is too long, TemplateSyntaxError for no template."""
    if len(text) > TEMPLATE:
        raise TooMuch(f"is {len(text):,} characters long, and {TEMPLATE:,} is the most")
    METER.start()
    environment = LimitedSandbox(_of_transformers())
    try:
        tree = Counted(environment).visit(environment.parse(text))
        return Template.from_code(environment, environment.compile(tree), environment.make_globals(None))
    except TemplateSyntaxError:
        raise
    except (SyntaxError, RecursionError, MemoryError) as error:  # Python's compiler gives up on deep nesting
        raise TemplateSyntaxError(f"it is nested too deeply ({type(error).__name__})", 1) from error


def rendered(text: str, messages: Sequence[Mapping[str, Any]], **words: Any) -> tuple[str, list[Span]]:
    """A conversation as the template writes it, and where its `{% generation %}` marks stand.

    :param words: what else the template reads: `tools`, `add_generation_prompt`, special tokens.
    Raises TooMuch beyond a limit, and whatever the template raises.
    """
    template = compiled(text)
    METER.start()
    data = {name: _plain(value) for name, value in words.items()}
    known = {"tools": None, "documents": None, "add_generation_prompt": False, **data}
    blocks: list[str] = []
    marks: list[Span] = []
    length = 0
    tracker: Any = template.environment
    try:
        with tracker.activate_tracker(blocks, marks):
            for block in template.generate(messages=_with_reasoning(messages), **known):
                length += len(block)
                limits.room_for(length)
                METER.tick()
                blocks.append(block)
    except (RecursionError, MemoryError, OverflowError) as error:
        raise TooMuch(f"goes too deep ({type(error).__name__})") from error
    return "".join(blocks), marks


class LimitedSandbox(ImmutableSandboxedEnvironment):
    """A sandbox that has what another one has, and asks `template_limits` before each step.

    :param like: the environment whose settings, functions, filters and tags this one takes over.
    """

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "**", "%"})

    def __init__(self, like: ImmutableSandboxedEnvironment) -> None:
        # What is computed while a template is compiled would be computed without limits.
        super().__init__(
            trim_blocks=like.trim_blocks,
            lstrip_blocks=like.lstrip_blocks,
            extensions=[type(extension) for extension in like.extensions.values()],
            optimized=False,
            finalize=_output,
        )
        self.globals.update(like.globals)
        self.globals["lipsum"] = _no_filler
        self.tests.update(like.tests)
        self.filters = {name: _limited(name, function) for name, function in like.filters.items()} | dict(STEPS)

    def call(__self, __context: Any, __obj: Any, *args: Any, **named: Any) -> Any:  # noqa: N805 - as Jinja names them
        """A call, unless it would cost too much."""
        METER.tick()
        limits.method(__obj, args, named)
        return limits.counted(super().call(__context, __obj, *args, **named))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """An operation, unless it would cost too much."""
        if operator == "+" and type(left) is str and type(right) is str:  # most are
            length = len(left) + len(right)
            limits.room_for(length)
            METER.make(length)
            return left + right
        limits.operation(operator, left, right)
        return limits.checked(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """`str.format` and `str.format_map`, unless their text would be too long."""
        safe = super().wrap_str_format(value)
        if safe is None:
            return None

        @wraps(safe)
        def asked(*args: Any, **named: Any) -> str:
            limits.spread(value.__self__, args, named)
            return safe(*args, **named)

        return asked


def _joined(*parts: Any) -> str:
    """The operator `~`."""
    limits.room_for(sum(map(limits.weight, parts)))
    return str(limits.counted("".join(map(str, parts))))


def _sliced(value: Any, start: Any, stop: Any, step: Any) -> Any:
    """`value[start:stop:step]`."""
    METER.tick()
    return limits.counted(value[start:stop:step])


STEPS: Mapping[str, Callable[..., Any]] = {
    "ftcore tick": METER.tick,
    "ftcore joined": _joined,
    "ftcore sliced": _sliced,
    "ftcore built": limits.checked,
}
"""What the syntax tree gets, as filters: Jinja calls those the quickest. No template can write names with a space."""


@lru_cache(maxsize=1)
def _of_transformers() -> ImmutableSandboxedEnvironment:
    """The environment that transformers renders in: its functions and its tag are what templates are written for."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    environment: ImmutableSandboxedEnvironment = _compile_jinja_template("").environment
    return environment


@pass_context
def _output(context: Any, value: Any) -> str:
    """What `{{ value }}` writes."""
    if not isinstance(value, str):
        limits.weight(value)
    text = str(value)
    METER.write(len(text))
    return text


def _no_filler(*_: Any, **__: Any) -> str:
    raise TooMuch("writes filler text")


def _limited(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that counts as a step."""
    if name in LAZY:
        return function
    place = 1 if hasattr(function, "jinja_pass_arg") else 0

    @wraps(function)
    def asked(*args: Any, **named: Any) -> Any:
        METER.tick()
        if len(args) > place:
            value = args[place]
            if isinstance(value, Iterator):
                value = limits.listed(value)
                args = (*args[:place], value, *args[place + 1 :])
            _ask(name, value, [*args[place + 1 :], *named.values()])
        return limits.counted(function(*args, **named))

    return asked


def _ask(name: str, value: Any, given: list[Any]) -> None:
    heavy = limits.weight(value)
    if name == "format":
        limits.spread(value, given)
    elif name == "replace" and len(given) > 1:
        limits.replacing(value if isinstance(value, str) else str(value), given[0], given[1])
    elif name == "join" and hasattr(value, "__len__"):
        limits.room_for(heavy + len(value) * sum(map(limits.weight, given)))
    elif name == "sum" and not all(isinstance(one, (int, float, str, type(None))) for one in given):
        limits.room_for(heavy * heavy)
    elif name in WIDTHS:
        wide = max((one if isinstance(one, int) else limits.weight(one) for one in given), default=0)
        many = value.count("\n") + 1 if isinstance(value, str) else heavy if name == "tojson" else 1
        limits.room_for(wide * many)


def _plain(value: Any) -> Any:
    """The value in plain JSON types: the methods of other things in a row, such as an image, no sandbox can judge."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_plain, value)) if type(value) in (list, tuple) else list(map(_plain, value))
    return f"<{type(value).__name__}>"


def _with_reasoning(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages without empty keys; what was thought stands under the names that templates read."""
    talk = []
    for message in messages:
        plain = {key: value for key, value in _plain(message).items() if value is not None}
        thought = next((plain[key] for key in REASONING if plain.get(key) is not None), None)
        talk.append(plain if thought is None else {"thinking": thought, **plain, "reasoning_content": thought})
    return talk
