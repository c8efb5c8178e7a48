"""What a model says to a prompt: for the answers before and after training, and for `ftcore chat`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ftcore.config import SamplingConfig
from ftcore.errors import Problem, Refused
from ftcore.pieces import Pieces, decoded
from ftcore.specs import Conversing, Generator, ModelFamily, Sampling, Streaming
from ftcore.tokens import render

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

TOP_K = 50
"""transformers draws from so many tokens where a checkpoint does not say how many."""

NO_GENERATOR = Problem("generator", "there is none to write the answers", "use generator=fast")


class Answers:
    """A model's answers, written by the run's generator.

    :param generator: None where the run has none; then nothing can be asked.
    """

    def __init__(
        self,
        generator: Generator | None,
        model: torch.nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        sampling: SamplingConfig,
    ) -> None:
        self._generator, self._model, self._tokenizer, self._settings = generator, model, tokenizer, sampling
        self._talk: Streaming | None = None

    def to(self, prompts: Sequence[str], continues: bool = False) -> list[str]:
        """One answer per prompt, each in a conversation of its own, all of them written at once.

        :param continues: prompts are texts to go on with, whatever the chat template.

        Raises Refused where there are prompts and no generator, or where one leaves no room for an answer.
        """
        if not prompts:
            return []
        system = [{"role": "system", "content": self._settings.system}] if self._settings.system else []
        talks = [[*system, {"role": "user", "content": prompt}] for prompt in prompts]
        ids = [self._continued(talk) if continues else self._asked(talk) for talk in talks]
        self._refuse_full(max(ids, key=len))
        with _memory_given_back(self._model), self.writing() as generator:
            written = generator.generate(ids, self._sampling()).ids
        return [decoded(self._tokenizer, row).strip() for row in written]

    def next(self, messages: Sequence[dict[str, str]], show: Callable[[str], None]) -> str:
        """The assistant's next message. A tokenizer without a chat template continues the last message's text.

        :param show: Called with what is new of it, again and again while it is written. What it raises ends the answer.

        Raises Refused where there is no generator, where the template does not take the conversation, or where the
        model's context has no room left.
        """
        pieces, said = Pieces(self._tokenizer), ""

        def shown(text: str) -> None:
            nonlocal said
            said += text
            show(text)

        generator, ids, sampling = self._talk or self._needed(), self._asked(messages), self._sampling()
        self._refuse_full(ids)
        if isinstance(generator, Streaming):
            generator.stream(ids, sampling, lambda new: shown(pieces.add(new)))
        else:
            [row] = generator.generate([ids], sampling).ids
            shown(pieces.add(row))
        shown(pieces.end())
        return said

    @contextmanager
    def writing(self) -> Iterator[Generator]:
        """Inside the block the generator may keep the memory that it needs. Raises Refused where there is none."""
        generator = self._needed()
        generator.begin_rollout()
        try:
            yield generator
        finally:
            generator.end_rollout()

    @contextmanager
    def talking(self) -> Iterator[None]:
        """As `writing`; what was read for a message is kept for the `next`, by a generator that can."""
        with self.writing() as generator:
            self._talk = generator.conversation() if isinstance(generator, Conversing) else None
            try:
                yield
            finally:
                self._talk = None

    def _needed(self) -> Generator:
        if self._generator is None:
            raise Refused(NO_GENERATOR)
        return self._generator

    def _refuse_full(self, ids: Sequence[int]) -> None:
        """Raises Refused where a prompt and a whole answer pass the context: beyond it a model writes nonsense."""
        new, config = self._settings.max_new_tokens, getattr(self._model, "config", None)
        context = getattr(config.get_text_config(), "max_position_embeddings", None) if config is not None else None
        if context and len(ids) + new > context:
            message = f"{len(ids)} tokens and an answer of {new} pass the {context} of the model's context"
            raise Refused(Problem("generator", message, "say less, or set sampling.max_new_tokens to less"))

    def _asked(self, messages: Sequence[dict[str, str]]) -> list[int]:
        if not self._tokenizer.chat_template:
            return self._continued(messages)
        text = render(self._tokenizer, messages, generate=True)
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _continued(self, messages: Sequence[dict[str, str]]) -> list[int]:
        ids: list[int] = self._tokenizer(messages[-1]["content"])["input_ids"]
        if ids:
            return ids
        first = self._tokenizer.bos_token_id
        return [self._tokenizer.eos_token_id if first is None else first]  # an empty text: what comes from nothing

    def _sampling(self) -> Sampling:
        """As the config says; `top_k`, `min_p` and the repetition penalty as the checkpoint's generation config.

        What else stands there, such as `no_repeat_ngram_size`, counts with `generator=transformers` alone.
        """
        asked, own = self._settings, getattr(self._model, "generation_config", None)
        top_k = getattr(own, "top_k", None)
        greedy = asked.temperature == 0  # the likeliest token is among any number of them
        return Sampling(
            max_new_tokens=asked.max_new_tokens,
            temperature=asked.temperature,
            top_p=asked.top_p,
            top_k=0 if greedy else TOP_K if top_k is None else max(top_k, 0),
            min_p=0.0 if greedy else getattr(own, "min_p", None) or 0.0,
            repetition_penalty=getattr(own, "repetition_penalty", None) or 1.0,
        )


def end_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids that end an answer: the tokenizer's and those of the model's generation config."""
    config = getattr(model.generation_config, "eos_token_id", None)
    ids = {tokenizer.eos_token_id, *(config if isinstance(config, list) else [config])}
    return sorted(i for i in ids if i is not None)


def turn_end_ids(family: ModelFamily, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of the family's turn ends, as far as the vocabulary has them."""
    vocabulary = tokenizer.get_vocab()
    return [vocabulary[token] for token in (family.chat.turn_ends if family.chat else ()) if token in vocabulary]


def stop_at_turn_ends(family: ModelFamily, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Have the model's generation config end an answer at the family's turn ends too.

    Base checkpoints such as Qwen3-Base name the end of a document alone, and what they are trained on here ends turns.
    """
    config = getattr(model, "generation_config", None)
    if config is None:
        return
    own = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    known = [one for one in (*own, tokenizer.eos_token_id) if one is not None]
    if new := [one for one in turn_end_ids(family, tokenizer) if one not in known]:
        config.eos_token_id = list(dict.fromkeys([*known, *new]))


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """The model in evaluation mode, and back to what it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _memory_given_back(model: Any) -> Iterator[None]:
    """What PyTorch keeps for the next answer is the GPU's again at the end: what comes next may need all of it."""
    try:
        yield
    finally:
        if model.device.type == "cuda":
            import torch

            torch.cuda.empty_cache()
