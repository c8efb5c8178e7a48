"""Which layout a chat template writes: proved by rendering, never guessed.

A template is mapped when Ollama's text of every conversation in `PROBES` is, character for character, the text that
the model's own Jinja template writes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ftcore_exporters._ollama.layouts import EOS, LAYOUTS, Conversation, Layout, Place

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SYSTEM = ("system", 'Answer in one line.\nNever say "no"; write {{ .Content }} and <b> as they stand.')
_ASK, _SAY = ("user", "What is 2 + 2?\n\n```python\nprint(2 + 2)\n```"), ("assistant", "4, naïvely — 四 🙂\n- four")
_MORE, _LESS = ("user", "And # 3?"), ("assistant", "6")
PROBES: tuple[Conversation, ...] = (
    (_ASK,),
    (_SYSTEM, _ASK),
    (("system", ""), _ASK),
    (_ASK, _SAY, _MORE),
    (_SYSTEM, _ASK, _SAY, _MORE),
    (("system", ""), _ASK, _SAY, _MORE),
    (_ASK, _SAY, _MORE, _LESS, _ASK),
    (_SYSTEM, _ASK, _SAY, _MORE, _LESS, ("user", "")),
)
"""Conversations that end with a question."""
OPEN: tuple[Conversation, ...] = ((_ASK, _SAY), (_SYSTEM, _ASK, _SAY, _MORE, _LESS))
"""Conversations that end with an answer, which is gone on with."""
_EDGES: Conversation = (("user", " a \n"), ("assistant", " b \n"), ("user", "\tc "))


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """A template's layout, and what the layout leaves out."""

    layout: Layout
    writes_bos: bool
    """Whether the template writes the begin-of-text token itself, before all else."""
    no_system: bool = False
    """The template refuses a system message, or leaves it out."""
    strips: tuple[str, ...] = ()
    """Roles whose words lose the white space around them in the template; Ollama leaves it."""
    dated: bool = False
    """The template writes the date of the day; the layout holds that of the export."""


class Jinja:
    """A tokenizer's chat template.

    :param strips_bos: texts come without the begin-of-text token in front, where the template writes it there.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, strips_bos: bool = True) -> None:
        self._tokenizer = tokenizer
        self.text: str = tokenizer.get_chat_template()
        self._bos = str(tokenizer.bos_token or "")
        self.eos = str(tokenizer.eos_token or "")
        first = self._rendered(PROBES[0], True) or ""
        self.writes_bos = strips_bos and bool(self._bos) and first.startswith(self._bos)

    def __call__(self, talk: Conversation, ask: bool = True, **options: Any) -> str | None:
        """The conversation's text; None where the template refuses it."""
        text = self._rendered(talk, ask, **options)
        return text.removeprefix(self._bos) if text is not None and self.writes_bos else text

    def _rendered(self, talk: Conversation, ask: bool, **options: Any) -> str | None:
        from jinja2 import TemplateError

        from ftcore.template_sandbox import rendered

        messages = [{"role": role, "content": words} for role, words in talk]
        if thoughts := options.pop("thoughts", None):
            next(m for m in messages if m["role"] == "assistant")["reasoning_content"] = thoughts
        try:
            words = {**self._tokenizer.special_tokens_map, **options}
            return rendered(self.text, messages, add_generation_prompt=ask, **words)[0]
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError):
            return None


def fit(tokenizer: PreTrainedTokenizerBase) -> Fit | None:
    """The layout of the tokenizer's chat template; None where none of `LAYOUTS` is proved to be it."""
    # SmolLM2's begin-of-text token opens turns as well: then it belongs to the format.
    jinja = Jinja(tokenizer)
    found = _fit(jinja)
    return _fit(Jinja(tokenizer, strips_bos=False)) if found is None and jinja.writes_bos else found


def _fit(jinja: Jinja) -> Fit | None:
    texts = {talk: jinja(talk) for talk in PROBES}
    no_system = all(text in (None, jinja(talk[1:])) for talk, text in texts.items() if _has_system(talk))
    texts |= {talk: jinja(talk, ask=False) for talk in OPEN}
    wanted = {talk: text for talk, text in texts.items() if not (no_system and _has_system(talk))}
    candidates = (candidate for layout in LAYOUTS for candidate in _candidates(layout, jinja, no_system))
    for layout in candidates:
        if all(_same(layout, talk, text) for talk, text in wanted.items()):
            strips = _strips(layout, jinja)
            if strips is not None:
                dated = "strftime_now" in jinja.text
                return Fit(layout=layout, writes_bos=jinja.writes_bos, no_system=no_system, strips=strips, dated=dated)
    return None


def _has_system(talk: Conversation) -> bool:
    return talk[0][0] == "system"


def _same(layout: Layout, talk: Conversation, text: str | None) -> bool:
    """Whether the layout writes the text; of an open conversation the template closes the last answer as well."""
    ours = layout.render(talk)
    return text == ours if talk in PROBES else text is not None and text.startswith(ours)


def _candidates(layout: Layout, jinja: Jinja, no_system: bool) -> Iterator[Layout]:
    """The layout with what the template says by itself, which is read off where it writes the layout's own words."""
    system, user, assistant = (
        (before.replace(EOS, jinja.eos), after.replace(EOS, jinja.eos))
        for before, after in (layout.system, layout.user, layout.assistant)
    )
    layout = replace(layout, system=system, user=user, assistant=assistant)
    if no_system:
        # Where Gemma 3 puts it; Ollama would otherwise leave the system's words out without a word.
        yield _asking(replace(layout, system=("", "\n\n"), place=Place.first), jinja)
        return
    if layout.place is Place.turn:
        layout = _with_default(layout, jinja)
    for drops_empty in (False, True):
        yield _asking(replace(layout, drops_empty=drops_empty), jinja)


def _with_default(layout: Layout, jinja: Jinja) -> Layout:
    """What is written before the system's words, and instead of them, such as a date or a name."""
    (before, after), question = layout.system, layout.user[0] + _ASK[1]
    said = _between(jinja((_SYSTEM, _ASK)), before, _SYSTEM[1] + after + question)
    if said is None:
        return layout
    layout = replace(layout, system=(before + said, after))
    if (jinja((_ASK,)) or "").startswith(question):
        return layout
    default = _between(jinja((_ASK,)), before + said, after + question)
    return replace(layout, default=default)


def _between(text: str | None, before: str, after: str) -> str | None:
    """What stands between a text's beginning and the first place of `after`."""
    if text is None or not text.startswith(before) or (end := text.find(after, len(before))) < 0:
        return None
    return text[len(before) : end]


def _asking(layout: Layout, jinja: Jinja) -> Layout:
    """How the template asks for an answer, with and without thoughts."""
    body, text = layout.render((_ASK,)), jinja((_ASK,)) or ""
    if not text.startswith(body):
        return layout
    quiet = jinja((_ASK,), enable_thinking=False) or ""
    quiet = quiet[len(text) :] if quiet.startswith(text) else ""
    return _thinking(replace(layout, ask=text[len(body) :], quiet=quiet), jinja, body + layout.assistant[0])


def _thinking(layout: Layout, jinja: Jinja, before: str) -> Layout:
    """Where the template writes what was thought before an answer; `before` is the text in front of the answer."""
    last, earlier, thought = (_ASK, _LESS), (_ASK, _LESS, _MORE), "Hm."
    text = jinja(last, ask=False, thoughts=thought)
    if opens := _between(text, before, thought):
        closes = _between(text, before + opens + thought, _LESS[1]) or ""
        layout = replace(layout, thinking=(opens, closes))
    if layout.thinking is None:
        return layout
    opens, closes = layout.thinking
    return replace(
        layout,
        keeps_thoughts=(jinja(earlier, thoughts=thought) or "").startswith(before + opens + thought + closes),
        empty_thoughts=(jinja(last, ask=False) or "").startswith(before + opens + closes + _LESS[1]),
    )


def _strips(layout: Layout, jinja: Jinja) -> tuple[str, ...] | None:
    """Roles whose words lose the white space around them; None where something else happens to it."""
    text = jinja(_EDGES)
    for roles in ((), ("user", "assistant"), ("assistant",), ("user",)):
        talk = [(role, words.strip() if role in roles else words) for role, words in _EDGES]
        if layout.render(talk) == text:
            return roles
    return None
