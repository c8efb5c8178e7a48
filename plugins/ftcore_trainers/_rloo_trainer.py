"""TRL's RLOOTrainer with ftcore's generator in place of its own generation, and the model's own fused head."""

from __future__ import annotations

from typing import Any

from trl import RLOOTrainer

from ftcore_trainers._fused_head import take_over
from ftcore_trainers._rollouts import Rollouts
from ftcore_trainers._shared_prompts import SharedPrompts


class GeneratorRLOOTrainer(SharedPrompts, Rollouts, RLOOTrainer):
    """Asks a :class:`ftcore.specs.Generator` for the completions; everything else is TRL's."""

    def __init__(self, share_prompts: bool, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.share_prompts = take_over(self, temperature=self.temperature) and share_prompts

    def _generate_single_turn(
        self, prompt_ids: list[list[int]], images: Any, multimodal_fields: Any
    ) -> list[list[int]]:
        return self.complete(prompt_ids, images).ids
