"""Completions by ftcore's own decoding: the weights that are trained, on the GPU that trains, a CUDA graph a token.

Prompts are read once for all their completions; rows that have ended make room for prompts that wait; the cache of keys
and values is given back before training goes on. Layers that there are no steps for, such as mixtures of experts,
compute as they are, with ftcore's attention in them. What has none of both is completed by transformers. Why is printed
once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from threading import RLock
from typing import TYPE_CHECKING, Any, TypeVar

from ftcore import Completions, GeneratorConfig, Plan, Problem, Sampling, hookimpl
from ftcore_generators.transformers import TransformersGenerator, fewer

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from ftcore.specs import Streaming
    from ftcore_kernels.decoding.engine import Engine
    from ftcore_kernels.decoding.kept import Kept

T = TypeVar("T")


@dataclass
class Config(GeneratorConfig):
    """The fast generator's settings."""

    batch: int = 256
    """Completions written at once, if the memory is there."""
    memory_fraction: float = 0.85
    """Part of the GPU's free memory that the cache of keys and values may fill while completions are written."""
    prompt_tokens: int = 8192
    """Tokens of prompts that are read in one pass."""


@hookimpl
def ftcore_check_plan(plan: Plan) -> list[Problem]:
    """Numbers that mean something."""
    return list(_problems(plan.config(Config)))


def _problems(config: Config) -> Iterator[Problem]:
    if config.batch < 1:
        yield Problem("generator.batch", f"is {config.batch}", "give a number above 0")
    if not 0 < config.memory_fraction <= 1:
        message = f"is {config.memory_fraction}"
        yield Problem("generator.memory_fraction", message, "give a number above 0 and up to 1, such as 0.85")
    if config.prompt_tokens < 1:
        yield Problem("generator.prompt_tokens", f"is {config.prompt_tokens}", "give a number above 0")


@hookimpl
def ftcore_make_generator(plan: Plan, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> FastGenerator:
    """A generator over the model that is trained: no copy."""
    return FastGenerator(plan, plan.config(Config), model, tokenizer)


class FastGenerator:
    """The engine of `ftcore_kernels.decoding` over the model, or transformers where that has none for it."""

    def __init__(self, plan: Plan, config: Config, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        self._plan, self._config, self._model, self._tokenizer = plan, config, model, tokenizer
        self._base: Any = model.get_base_model() if hasattr(model, "peft_config") else model
        self._other = TransformersGenerator(model, tokenizer, config.batch)
        self._engine: Engine | None = None
        self._kept: Kept | None = None
        self._drops = 0
        """Times that what was kept had to go."""
        self._covered, self._busy = True, False
        self._most, self._tokens = config.batch, config.prompt_tokens
        """Completions at a time, and tokens of prompts in a pass, that the memory was there for."""
        self._said: set[str] = set()
        self._one = RLock()
        """One call at a time: the engine computes in the model's own modules. Who is shown tokens may call again."""

    @property
    def at_once(self) -> int:
        """Completions written at once, if the memory is there."""
        return self._config.batch

    def generate(
        self,
        prompt_ids: Sequence[Sequence[int]],
        sampling: Sampling,
        media: Sequence[Mapping[str, Any] | None] | None = None,
    ) -> Completions:
        """One completion per prompt, with the log-probabilities at this temperature.

        :param media: For each prompt what the model takes besides its tokens, such as `pixel_values`, as the family's
            processor made it of this prompt alone.
        """
        self._drop()
        requests = cache(partial(_requests, prompt_ids, sampling, media))
        return self._written(
            lambda engine, ends: engine.run(requests(), sampling, ends),
            lambda: self._other.generate(prompt_ids, sampling, media),
        )

    def stream(self, prompt_ids: Sequence[int], sampling: Sampling, show: Callable[[list[int]], None]) -> list[int]:
        """Complete one prompt, and show what is new every few tokens."""
        self._drop()
        return self._streamed(prompt_ids, sampling, show)

    def conversation(self) -> Streaming:
        """Streams too, and keeps keys and values from one call to the next, until the generator is used otherwise."""
        return _Conversation(self)

    def begin_rollout(self) -> None:
        """Nothing to take before the prompts are known: they say how long the cache must be."""
        self._drop()

    def end_rollout(self) -> None:
        """Everything was given back with the last completion, but for a conversation."""
        self._drop()

    def weights_changed(self) -> None:
        """The weights are the trained ones themselves, read anew for every call."""
        self._drop()

    def _drop(self) -> None:
        self._kept, self._drops = None, self._drops + 1

    def _streamed(
        self,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        show: Callable[[list[int]], None],
        kept: Kept | None = None,
    ) -> list[int]:
        return self._written(
            lambda engine, ends: engine.stream(_requests([prompt_ids], sampling, None)[0], sampling, ends, show, kept),
            lambda: self._other.stream(prompt_ids, sampling, show),
        )

    def _next(self, prompt_ids: Sequence[int], sampling: Sampling, show: Callable[[list[int]], None]) -> list[int]:
        """As `_streamed`, from what was kept with the weights of now."""
        from ftcore.guards.memory import NoMemory
        from ftcore_kernels.decoding.kept import Kept, Weights

        with self._one:
            # Nobody else's meanwhile: who is shown tokens may go on with a conversation.
            kept, self._kept, drops = self._kept, None, self._drops
            if kept is None or not kept.weights.are(self._model):
                kept = Kept(Weights(self._model))
            try:
                return self._streamed(prompt_ids, sampling, show, kept)
            except NoMemory:
                self._drop()
                raise
            finally:
                kept.weights = Weights(self._model)  # a pass may write to some, as PEFT's wrapper of experts does
                if self._drops == drops:
                    self._kept = kept

    def _written(self, by_engine: Callable[[Engine, list[int]], T], otherwise: Callable[[], T]) -> T:
        from ftcore.answers import end_ids, evaluating
        from ftcore.guards.shortage import is_out_of_memory
        from ftcore_kernels.layers.uncovered import Uncovered

        with self._one, self._own_engine(), evaluating(self._model):
            while (engine := self._ready()) is not None:
                try:
                    return by_engine(engine, end_ids(self._model, self._tokenizer))
                except Uncovered as reason:  # of these prompts; the next may be others
                    self._say(f"transformers writes the completions, because {reason}")
                    break
                except RuntimeError as error:
                    if not is_out_of_memory(error):
                        raise
                    said = str(error).splitlines()[0]
                finally:
                    engine.close()
                # Past the `except`, whose traceback held the cache. Each request has a seed of its own: the same again.
                self._with_fewer(engine.rows, said)
            self._drop()
            return otherwise()

    @contextmanager
    def _own_engine(self) -> Iterator[None]:
        """A call inside another one, by who is shown its tokens, has an engine of its own: the other's is recorded."""
        outer, busy = self._engine, self._busy
        self._engine, self._busy = None if busy else outer, True
        try:
            yield
        finally:
            self._busy = busy
            if busy:
                self._engine = outer

    def _with_fewer(self, rows: int, error: str) -> None:
        """The next engine writes half as many completions at a time, and reads half as many tokens of prompts."""
        self._most, self._engine, self._tokens = fewer(rows, error), None, max(self._tokens // 2, 1)
        self._drop()
        self._say(
            f"out of memory with {rows} completions at a time; going on with {self._most} "
            f"(generator.batch={self._most} spares the attempt)"
        )

    def _ready(self) -> Engine | None:
        """The engine with the weights of now, or None where transformers has to do it."""
        from ftcore_kernels.decoding.engine import Engine, Limits
        from ftcore_kernels.layers.uncovered import Uncovered

        if not self._covered:
            return None
        if self._engine is None:
            memory = self._memory if self._base.device.type == "cuda" else None
            limits = Limits(self._most, self._tokens, memory)
            self._engine = Engine(self._base, self._plan.family.roles, limits)
        try:
            self._engine.open()
        except Uncovered as reason:
            self._say(f"transformers writes the completions, because {reason}")
            self._engine, self._covered = None, False
            return None
        if self._engine.no_steps is not None:
            self._say(f"the layers' own modules compute, because {self._engine.no_steps}")
        return self._engine

    def _say(self, what: str) -> None:
        if what not in self._said:
            print(f"generator: {what}")
            self._said.add(what)

    def _memory(self) -> int:
        """Bytes that the cache may take now."""
        import torch

        device = self._base.device
        free = torch.cuda.mem_get_info(device)[0]
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        limit = self._plan.run.memory_limit
        if limit is not None:
            free = min(free, int(limit * 2**30) - torch.cuda.memory_allocated(device))
        return max(0, int(self._config.memory_fraction * free))


class _Conversation:
    """The generator for the turns of a conversation, one after the other."""

    def __init__(self, generator: FastGenerator) -> None:
        self._generator = generator

    def stream(self, prompt_ids: Sequence[int], sampling: Sampling, show: Callable[[list[int]], None]) -> list[int]:
        """As the generator's own; only what is behind the longest known beginning of the prompt is read."""
        return self._generator._next(prompt_ids, sampling, show)


def _requests(
    prompt_ids: Sequence[Sequence[int]], sampling: Sampling, media: Sequence[Mapping[str, Any] | None] | None
) -> list[Any]:
    """One for each prompt, with a seed of its own from torch's generator, which the run's seed governs."""
    import torch

    from ftcore_kernels.decoding.requests import Request

    seeds = torch.randint(0, 2**32, (len(prompt_ids),)).tolist()
    shown = [None] * len(prompt_ids) if media is None else media
    return [
        Request(index, tuple(prompt), sampling.max_new_tokens, seed, images)
        for index, (prompt, seed, images) in enumerate(zip(prompt_ids, seeds, shown, strict=True))
    ]
