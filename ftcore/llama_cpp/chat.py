"""What a GGUF file says in a conversation, through llama.cpp and the file's own chat template."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ftcore.chat import render
from ftcore.config import SamplingConfig
from ftcore.errors import Problem, Refused
from ftcore.llama_cpp.client import LlamaCpp

CONTEXT = 4096
"""Most tokens of a conversation, or fewer where the model was trained for fewer."""


class Full(Exception):
    """The conversation and its answer do not fit into the context."""


class GgufChat:
    """A conversation partner from a GGUF file. Raises Refused as `LlamaCpp` does."""

    def __init__(self, file: str | Path, sampling: SamplingConfig) -> None:
        self.sampling = sampling
        self._consumer = LlamaCpp(file, context=CONTEXT, kv="f16")
        self._template: Any = _Template(self._consumer)
        self.room = min(CONTEXT, self._consumer.facts["trained_context"] or CONTEXT)

    def answer(self, messages: Sequence[dict[str, str]]) -> str:
        """The assistant's next message; a file without a chat template continues the last message's text.

        Raises Full where there is no room for it, Refused where the template does not take the conversation.
        """
        if self._template.chat_template:
            try:
                text = render(self._template, messages, generate=True)
            except Refused as refused:
                message = refused.problems[0].message.replace("this row", "the conversation")
                raise Refused(Problem(str(self._consumer.file), message, "leave out sampling.system")) from refused
        else:
            text = messages[-1]["content"]
        ids = self._consumer.tokens(text)
        if len(ids) + self.sampling.max_new_tokens > self.room:
            raise Full(f"{len(ids)} tokens and an answer of {self.sampling.max_new_tokens} pass {self.room} tokens")
        return self._consumer.text(self._written(ids)).strip()

    def close(self) -> None:
        """End llama.cpp."""
        self._consumer.close()

    def _written(self, ids: Sequence[int]) -> list[int]:
        count, temperature = self.sampling.max_new_tokens, self.sampling.temperature
        if temperature > 0:
            return self._consumer.sample(ids, count, temperature, top_p=self.sampling.top_p)
        return self._consumer.greedy(ids, count)


class _Template:
    """The file's chat template as `ftcore.chat.render` takes a tokenizer's."""

    def __init__(self, consumer: LlamaCpp) -> None:
        self.chat_template = consumer.chat_template()
        special = {"bos_token": consumer.facts["bos_text"], "eos_token": consumer.facts["eos_text"]}
        self.special_tokens_map = {name: text for name, text in special.items() if text is not None}

    def get_chat_template(self, tools: Any = None) -> str | None:
        return self.chat_template
