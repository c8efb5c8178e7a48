"""What trainers declare, ask for and report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from ftcore.specs.family import ModelFamily


@dataclass(frozen=True, slots=True, kw_only=True)
class Passes:
    """What becomes of one row of a micro-batch, for the forecast of memory and time. The default is SFT's row."""

    sequences: int = 1
    """Sequences that one forward with its backward reads: 2 where a row is a pair of answers."""
    unlearnt: float = 0.0
    """Sequences that are read without a backward besides, such as those of a reference model."""
    written: int = 0
    """Tokens at the end of a sequence that the model writes itself before it learns from them."""
    times: int = 1
    """How often it learns from what was written, or read without a backward, once."""
    least_rows: int = 1
    """Rows that a micro-batch has at least, where the loss compares them."""
    logprobs: bool = False
    """Whether the loss is one of log-probabilities, whose backward computes the logits again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerSpec:
    """What a trainer takes: the answer of a trainer plugin."""

    accepts: frozenset[str]
    """Data shapes."""
    tokenized: bool = False
    """The trainer takes `input_ids` and `labels`; ftcore tokenizes and masks the rows before it sees them."""
    splits: bool = False
    """A text of more than `trainer.max_length` tokens becomes several rows; otherwise the rest is cut off."""
    continues: bool = False
    """Prompts are continued as they stand, without the chat template."""
    wants_rewards: bool = False
    reference_model: bool = False
    teacher: bool = False
    """Another model says what is learnt."""
    args: str | None = None
    """`package.module:Class` of the trainer library's own arguments, whose names `trainer.args` is checked against."""
    owned: frozenset[str] = frozenset()
    """Names of those arguments that ftcore's own keys set, so that `trainer.args` may not."""
    fuses: frozenset[str] = frozenset()
    """Roles that a foreign trainer takes over itself, so that no kernel is put there."""
    auto_class: str | None = None
    """Auto class that loads the model with the head that is trained; None keeps the family's."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Values of the model's config that the head needs, such as `id2label`."""
    measures: tuple[str, ...] = ()
    """What is measured on held-out rows besides the loss: `accuracy` is logged as `eval_accuracy`."""
    compares: bool = False
    """The loss compares the rows of a micro-batch, so that a run which goes on keeps `trainer.micro_batch`."""
    passes: Passes | None = None
    """What a row of a micro-batch costs; None leaves the run out of the forecast, but for a `tokenized` trainer of one
    model, whose row is one sequence."""

    def headed(self, family: ModelFamily) -> ModelFamily:
        """The family with the head that this trainer trains."""
        auto_class = self.auto_class or family.auto_class
        return replace(family, auto_class=auto_class, settings={**family.settings, **self.settings})


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are drawn."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


COLDEST = 1e-6
"""Lowest temperature above 0: logits divided by a smaller one may leave the range of 32 bits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completions:
    """What a generator wrote, one row per prompt."""

    ids: list[list[int]]
    """Token ids without padding, the end token included where the model wrote one."""
    logprobs: list[list[float]] | None = None
    """Log-probability of each token under the sampling model, in nats, when the generator knows them."""


class Generator(Protocol):
    """Who writes text: completions to learn from, and answers to people."""

    def generate(self, prompt_ids: Sequence[Sequence[int]], sampling: Sampling) -> Completions:
        """Complete each prompt once. Prompts of a group are given once per wanted completion."""
        ...

    def begin_rollout(self) -> None:
        """Called before the completions of a step are asked for; memory may be taken here."""
        ...

    def end_rollout(self) -> None:
        """Called once they are there; memory is given back here."""
        ...

    def weights_changed(self) -> None:
        """Called after each optimizer step."""
        ...


@runtime_checkable
class Streaming(Protocol):
    """A generator that shows a completion while it writes it. Those that cannot are shown as a whole."""

    def stream(self, prompt_ids: Sequence[int], sampling: Sampling, show: Callable[[list[int]], None]) -> list[int]:
        """Complete one prompt, as `generate` would, and return all token ids.

        :param show: Called in between with the ids that are new, each once and in order. What it raises ends the
            completion and comes through; the generator can write on afterwards.
        """
        ...


@runtime_checkable
class Conversing(Protocol):
    """A generator that can keep what it has read between the turns of a conversation."""

    def conversation(self) -> Streaming:
        """Streams as the generator does, to the same tokens, whatever each prompt has in common with the one before.

        What is kept is dropped by every other call of the generator; `end_rollout` gives its memory back.
        """
        ...


@runtime_checkable
class Batching(Protocol):
    """A generator that takes any number of prompts in a call, and decides itself how many it completes at once.

    An evaluation gives it the prompts of many batches together. Others are given those of one: `trainer.micro_batch`.
    """

    @property
    def at_once(self) -> int:
        """Prompts that it completes at once, if the memory is there; 1 or more."""
        ...


@runtime_checkable
class KeepsBeside(Protocol):
    """A trainer that trains more than the model, such as a value head, of which its evaluation makes use."""

    def save_beside(self, folder: Path) -> None:
        """Write it into the folder of the trained model."""
        ...

    def load_beside(self, folder: Path) -> None:
        """Take what `save_beside` wrote; nothing changes where there is nothing."""
        ...


Reward = Callable[..., Sequence[float | None]]
"""`f(prompts, completions, **columns) -> one float per completion`, as TRL defines reward functions."""


@dataclass(frozen=True, kw_only=True)
class TrainReport:
    """What training did."""

    steps: int
    metrics: Mapping[str, float]
    history: Sequence[Mapping[str, float]] = ()
