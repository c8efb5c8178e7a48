"""What trainers declare, ask for and report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from ftcore.specs.family import ModelFamily


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Completions:
    """What a generator wrote, one row per prompt."""

    ids: list[list[int]]
    """Token ids without padding, the end token included where the model wrote one."""
    logprobs: list[list[float]] | None = None
    """Log-probability of each token under the sampling model, in nats, when the generator knows them."""


class Generator(Protocol):
    """Who writes completions for reinforcement learning."""

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


Reward = Callable[..., Sequence[float | None]]
"""`f(prompts, completions, **columns) -> one float per completion`, as TRL defines reward functions."""


@dataclass(frozen=True, kw_only=True)
class TrainReport:
    """What training did."""

    steps: int
    metrics: Mapping[str, float]
    history: Sequence[Mapping[str, float]] = ()
