"""Chat formats as plain facts: what stands around each turn.

Both Ollama's Go template (`go_template`) and the text that it writes (`Layout.render`) are made from these facts, so
that the second can be compared with what the model's own Jinja template writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

Turn = tuple[str, str]
"""What stands before and after the words of a turn."""
Conversation = Sequence[tuple[str, str]]
"""Role (`system`, `user` or `assistant`) and words of each message, as Ollama hands them to a template: neighbours of
one role are one message there."""

EOS = "\N{SYMBOL FOR END OF TEXT}"
"""Stands for the tokenizer's own end token in the layouts below."""


class Place(Enum):
    """Where the system's words go."""

    turn = "a turn of their own"
    first = "into the next question"
    last = "into the last question"


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A chat format without its tools."""

    name: str
    user: Turn
    assistant: Turn
    system: Turn
    place: Place = Place.turn
    default: str | None = None
    """What the system says where a conversation does not begin with a system message."""
    drops_empty: bool = False
    """A system message without words is not written."""
    ask: str = ""
    """What asks for an answer, after a last message that is none."""
    thinking: Turn | None = None
    """What stands around the thoughts of a last answer, which is gone on with."""
    keeps_thoughts: bool = False
    """Whether earlier answers have theirs as well."""
    empty_thoughts: bool = False
    """Whether the marks stand around no thoughts as well."""
    quiet: str = ""
    """What follows `ask` to keep a model that can think from it."""

    def render(self, conversation: Conversation, quiet: bool = False) -> str:
        """What Ollama writes, without a begin-of-text token. A last answer is left open, to be gone on with."""
        out, before = "", ""
        for number, (role, words) in enumerate(conversation):
            last = number == len(conversation) - 1
            if number == 0 and role != "system" and self.default is not None:
                out += self.system[0] + self.default + self.system[1]
            if role == "system":
                said = self.system[0] + words + self.system[1] if words or not self.drops_empty else ""
                out, before = (out + said, "") if self.place is Place.turn else (out, said)
            elif role == "user":
                put = self.place is Place.first or last
                out += self.user[0] + (before if put else "") + words + self.user[1]
                before = "" if put else before
            else:
                thinks = self.thinking and self.empty_thoughts and (last or self.keeps_thoughts)
                thoughts = "".join(self.thinking or ()) if thinks else ""
                out += self.assistant[0] + thoughts + words + ("" if last else self.assistant[1])
        if conversation[-1][0] != "assistant":
            out += self.ask + (self.quiet if quiet else "")
        return out


def _llama3(role: str) -> Turn:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>"


LAYOUTS = (
    Layout(
        name="ChatML",
        system=("<|im_start|>system\n", "<|im_end|>\n"),
        user=("<|im_start|>user\n", "<|im_end|>\n"),
        assistant=("<|im_start|>assistant\n", "<|im_end|>\n"),
    ),
    Layout(name="Llama 3", system=_llama3("system"), user=_llama3("user"), assistant=_llama3("assistant")),
    Layout(
        name="Gemma",
        system=("", "\n\n"),
        user=("<start_of_turn>user\n", "<end_of_turn>\n"),
        assistant=("<start_of_turn>model\n", "<end_of_turn>\n"),
        place=Place.first,
    ),
    Layout(
        name="Phi-3",
        system=("<|system|>\n", "<|end|>\n"),
        user=("<|user|>\n", "<|end|>\n"),
        assistant=("<|assistant|>\n", "<|end|>\n"),
    ),
    Layout(
        name="Phi-4",
        system=("<|im_start|>system<|im_sep|>", "<|im_end|>"),
        user=("<|im_start|>user<|im_sep|>", "<|im_end|>"),
        assistant=("<|im_start|>assistant<|im_sep|>", "<|im_end|>"),
    ),
    Layout(
        name="Mistral, system message in the first question",
        system=("", "\n\n"),
        user=("[INST] ", "[/INST]"),
        assistant=(" ", EOS),
        place=Place.first,
    ),
    Layout(
        name="Mistral v0.3",
        system=("", "\n\n"),
        user=("[INST] ", "[/INST]"),
        assistant=(" ", EOS),
        place=Place.last,
    ),
    Layout(
        name="Mistral Nemo",
        system=("", "\n\n"),
        user=("[INST]", "[/INST]"),
        assistant=("", EOS),
        place=Place.last,
    ),
    Layout(
        name="Mistral v7",
        system=("[SYSTEM_PROMPT] ", "[/SYSTEM_PROMPT]"),
        user=("[INST] ", "[/INST]"),
        assistant=(" ", EOS),
    ),
    Layout(
        name="Mistral v0.1",
        system=("", "\n\n"),
        user=("[INST] ", " [/INST]"),
        assistant=("", EOS),
        place=Place.first,
    ),
    Layout(
        name="Mistral v0.2",
        system=("", "\n\n"),
        user=(" [INST] ", " [/INST]"),
        assistant=(" ", EOS),
        place=Place.first,
    ),
    Layout(
        name="Zephyr",
        system=("<|system|>\n", EOS + "\n"),
        user=("<|user|>\n", EOS + "\n"),
        assistant=("<|assistant|>\n", EOS + "\n"),
    ),
    Layout(
        name="Alpaca",
        system=("", "\n\n"),
        user=("### Instruction:\n", "\n\n"),
        assistant=("### Response:\n", EOS + "\n\n"),
    ),
    Layout(
        name="Vicuna",
        system=("", "\n\n"),
        user=("USER: ", "\n"),
        assistant=("ASSISTANT: ", EOS + "\n"),
    ),
    Layout(
        name="DeepSeek",
        system=("", ""),
        user=("<｜User｜>", ""),
        assistant=("<｜Assistant｜>", "<｜end▁of▁sentence｜>"),
        thinking=("<think>\n", "\n</think>\n\n"),
    ),
)
"""Formats that are tried; what a model's own template says by default, and how it asks, is read from the template."""
