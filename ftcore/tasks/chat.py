"""`ftcore chat run=RUN` or `gguf=FILE`: talk to a model; prompts are read from standard input, one a line."""

from __future__ import annotations

import io
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace

from ftcore import hooks as h
from ftcore import pipeline
from ftcore.answers import Answers
from ftcore.config import RunConfig, SamplingConfig
from ftcore.errors import Problem, Refused
from ftcore.llama_cpp.chat import Full, GgufChat
from ftcore.report import note
from ftcore.signals import numbers
from ftcore.tasks._config import config_of
from ftcore.tasks._trained import prepared

OF_SOUND = ("AutoModelForSpeechSeq2Seq", "AutoModelForTextToWaveform")
"""Models that generate, but take or give recordings."""

Show = Callable[[str], None]
Answering = Callable[[Sequence[dict[str, str]], Show], object]
"""Shows the next message of a conversation, piece by piece."""


class Enough(Exception):
    """The person has read enough of this answer."""


def main(argv: list[str]) -> int:
    """A conversation; an empty line starts a new one, end of input ends it. Without `run` or `gguf`: the base model."""
    _keep_one(argv)
    config = config_of(argv)
    if config.gguf is not None:
        return _talk_with_file(config)
    hooks, plan = prepared(replace(config, export={}))
    pipeline.refuse_without_generator(hooks)
    loaded = pipeline.load(hooks, plan)
    writes = getattr(loaded.model, "can_generate", None)
    if (writes is not None and not writes()) or plan.family.auto_class in OF_SOUND:
        hears = plan.family.auto_class == "AutoModelForSpeechSeq2Seq"
        what = "hears recordings, and is not asked in words" if hears else "writes no text"
        message = f"{plan.family.auto_class} {what}"
        raise Refused(Problem("run", message, "use the trained folder with transformers' pipeline"))
    generator = hooks.maybe(h.ftcore_make_generator, plan=plan, model=loaded.model, tokenizer=loaded.tokenizer)
    answers = Answers(generator, loaded.model, loaded.tokenizer, config.sampling)
    with answers.talking():
        return _talk(answers.next, config.sampling)


def _keep_one(argv: list[str]) -> None:
    """Raises Refused when more than one model is named: one would be left out in silence."""
    named = [word.partition("=")[0].lstrip("+") for word in argv if not word.startswith("-")]
    if "gguf" in named and (other := next((key for key in ("run", "model") if key in named), None)):
        raise Refused(Problem("gguf", f"a GGUF file is a model of its own, and {other} is set too", "keep one of them"))


def _talk_with_file(config: RunConfig) -> int:
    """Through llama.cpp, with the file's own chat template; no model is loaded here."""
    assert config.gguf is not None
    partner = GgufChat(config.gguf, config.sampling)
    try:
        return _talk(lambda messages, show: show(partner.answer(messages)), config.sampling)
    finally:
        partner.close()


def _talk(answering: Answering, sampling: SamplingConfig) -> int:
    opening = [{"role": "system", "content": sampling.system}] if sampling.system else []
    messages = list(opening)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # a byte that is not UTF-8 spoils its letter, not the conversation
    on_terminal = sys.stdin.isatty()
    if on_terminal:
        note("Write a message; an empty line starts a new conversation, Ctrl-C ends an answer, Ctrl-D the chat.")
    while True:
        if on_terminal:
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return 0
        if not line.strip():
            messages = list(opening)
            continue
        messages.append({"role": "user", "content": line.strip()})
        try:
            said = _said(answering, messages)
        except Full as full:
            messages.pop()
            note(f"No room: {full}; an empty line starts a new conversation.")
            continue
        except Refused as refused:
            messages.pop()
            if len(messages) == len(opening) or not refused.problems[0].key.startswith("generator"):
                raise  # not for the conversation's length
            note(f"No room: {refused}\nAn empty line starts a new conversation.")
            continue
        if said.strip():
            messages.append({"role": "assistant", "content": said})
        else:
            messages.pop()  # ended before its first word: an answer that says nothing is none


def _said(answering: Answering, messages: Sequence[dict[str, str]]) -> str:
    """Print an answer while it is written. Returns what was printed: all of it, or up to where Ctrl-C ended it."""
    said = ""
    with _ctrl_c() as pressed:

        def show(text: str) -> None:
            nonlocal said
            if pressed():
                raise Enough
            print(text, end="", flush=True)
            said += text

        with suppress(Enough):
            answering(messages, show)
    print(flush=True)
    return said


@contextmanager
def _ctrl_c() -> Iterator[Callable[[], bool]]:
    """Inside the block Ctrl-C interrupts nothing, so that nothing stays half done; pressed again, it ends the chat.

    Gives a function that says whether it was pressed.
    """
    pressed = False

    def handler(*_: object) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    if signal.SIGINT not in numbers():
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)
