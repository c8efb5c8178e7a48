"""`ftcore chat run=RUN`: talk to a trained model; prompts are read from standard input, one a line."""

from __future__ import annotations

import io
import sys
from dataclasses import replace

from ftcore.answers import answer
from ftcore.errors import Problem, Refused
from ftcore.report import note, paragraph
from ftcore.tasks._config import config_of
from ftcore.tasks._trained import load_trained

OF_SOUND = ("AutoModelForSpeechSeq2Seq", "AutoModelForTextToWaveform")
"""Models that generate, but take or give recordings."""


def main(argv: list[str]) -> int:
    """A conversation; an empty line starts a new one, end of input ends it. Without `run`: the base model."""
    config = config_of(argv)
    loaded = load_trained(replace(config, export={}))
    writes = getattr(loaded.model, "can_generate", None)
    if (writes is not None and not writes()) or loaded.plan.family.auto_class in OF_SOUND:
        message = f"{loaded.plan.family.auto_class} writes no text"
        raise Refused(Problem("run", message, "use the trained folder with transformers' pipeline"))
    sampling = config.sampling
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
        said = answer(messages, loaded.model, loaded.tokenizer, sampling)
        messages.append({"role": "assistant", "content": said})
        paragraph(said, indent="")
