"""`ftcore chat run=RUN` or `gguf=FILE`: talk to a model; prompts are read from standard input, one a line."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

from ftcore.answers import answer
from ftcore.config import RunConfig, SamplingConfig
from ftcore.errors import Problem, Refused
from ftcore.llama_cpp.chat import Full, GgufChat
from ftcore.report import note, paragraph
from ftcore.tasks._config import config_of
from ftcore.tasks._trained import load_trained

OF_SOUND = ("AutoModelForSpeechSeq2Seq", "AutoModelForTextToWaveform")
"""Models that generate, but take or give recordings."""

Answering = Callable[[Sequence[dict[str, str]]], str]


def main(argv: list[str]) -> int:
    """A conversation; an empty line starts a new one, end of input ends it. Without `run` or `gguf`: the base model."""
    _keep_one(argv)
    config = config_of(argv)
    if config.gguf is not None:
        return _talk_with_file(config)
    loaded = load_trained(replace(config, export={}))
    writes = getattr(loaded.model, "can_generate", None)
    if (writes is not None and not writes()) or loaded.plan.family.auto_class in OF_SOUND:
        message = f"{loaded.plan.family.auto_class} writes no text"
        raise Refused(Problem("run", message, "use the trained folder with transformers' pipeline"))
    return _talk(lambda messages: answer(messages, loaded.model, loaded.tokenizer, config.sampling), config.sampling)


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
        return _talk(partner.answer, config.sampling)
    finally:
        partner.close()


def _talk(answering: Answering, sampling: SamplingConfig) -> int:
    opening = [{"role": "system", "content": sampling.system}] if sampling.system else []
    messages = list(opening)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # a byte that is not UTF-8 spoils its letter, not the conversation
    on_terminal = sys.stdin.isatty()
    if on_terminal:
        note("Write a message; an empty line starts a new conversation, Ctrl-D ends.")
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
            said = answering(messages)
        except Full as full:
            messages.pop()
            note(f"No room: {full}; an empty line starts a new conversation.")
            continue
        messages.append({"role": "assistant", "content": said})
        paragraph(said, indent="")
