"""What a reward keeps to."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

from ftcore.testing import runs
from ftcore.testing.plugin import PluginContract

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ftcore.specs import Reward

TEXTS = ("", "Paris", "The capital of France is Paris.", '{"answer": 12}', "ja ja ja\n\n<b>12</b> " * 20)
"""Completions of all sorts, the empty one too: a model writes them all."""


class RewardContract(PluginContract):
    """One finite number per completion, whether completions are texts or messages."""

    base: ClassVar[Sequence[str]] = runs.TINY
    """Overrides that select a model; a reward belongs to a plan."""
    columns: ClassVar[Mapping[str, Any]] = {}
    """Further columns of a row that the reward reads, such as `{"answer": "12"}`."""

    def rewards(self, *overrides: str) -> list[Reward]:
        """The plugin's functions."""
        from ftcore import hooks as h

        hooks, plan = runs.prepared([*self.base, *self.selected(), *overrides])
        return hooks.collect(h.ftcore_rewards, plan=plan)

    def values(self, reward: Reward, as_messages: bool) -> list[float]:
        """What the reward says to the texts, called as TRL calls it."""
        rows = len(TEXTS)
        prompts: list[Any] = ["Say something."] * rows
        completions: list[Any] = list(TEXTS)
        if as_messages:
            prompts = [[{"role": "user", "content": text}] for text in prompts]
            completions = [[{"role": "assistant", "content": text}] for text in completions]
        columns = {name: [value] * rows for name, value in self.columns.items()}
        said = reward(
            prompts=prompts, completions=completions, completion_ids=[[1]] * rows, trainer_state=None, **columns
        )
        return [math.nan if value is None else float(value) for value in said]

    def test_one_finite_number_each(self) -> None:
        """For texts and for messages, and the same for both."""
        rewards = self.rewards()
        assert rewards
        for reward in rewards:
            for_texts, for_messages = self.values(reward, False), self.values(reward, True)
            assert len(for_texts) == len(TEXTS)
            assert all(map(math.isfinite, for_texts))
            assert for_messages == for_texts

    def test_weight_is_a_factor(self) -> None:
        """`reward.NAME.weight` scales it."""
        kind, _, name = self.plugin.partition("/")
        name = name.rpartition(":")[2]
        for once, twice in zip(
            self.rewards(f"{kind}.{name}.weight=1"), self.rewards(f"{kind}.{name}.weight=2"), strict=True
        ):
            doubled = [2 * value for value in self.values(once, False)]
            assert all(map(math.isclose, self.values(twice, False), doubled))

    def test_names_tell_rewards_apart(self) -> None:
        """The functions' names are what the metrics are called."""
        names = [getattr(reward, "__name__", "") for reward in self.rewards()]
        assert all(names)
        assert "<lambda>" not in names
        assert len(set(names)) == len(names)
