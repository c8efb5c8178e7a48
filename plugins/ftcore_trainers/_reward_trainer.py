"""TRL's RewardTrainer without a mask where none is needed."""

from __future__ import annotations

from typing import Any

from trl import RewardTrainer

from ftcore_trainers._preference_trainer import PreferenceTrainer


class PairedRewardTrainer(PreferenceTrainer, RewardTrainer):
    """The loss is TRL's."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._choose_mask()
